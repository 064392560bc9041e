"""Describe each kind of layer: its sides, their widths, and the tensor that holds its outputs."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from deploypipe.pruning.modules.axis_reductions import is_statistic
from deploypipe.records import Side

ATTRIBUTE = "@"  # side "@num_heads": an attribute that holds the number of the indices


def is_stored(side: Side) -> bool:
    """Whether a side is an axis of a tensor, rather than a size in an attribute or what an operation reads."""
    return not side.startswith(ATTRIBUTE) and not is_statistic(side)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one filter per channel: input and output channel i are the same structure."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def has_two_sides(module: nn.Module) -> bool:
    """Whether inputs and outputs are separate structures; all other layers are edited on their "out" side."""
    return isinstance(module, nn.Linear | _ConvNd) and not is_depthwise(module)


def out_tensor(module: nn.Module) -> tuple[str, int] | None:
    """The tensor and axis that hold a layer's outputs; None for modules whose tensors are cut one by one."""
    axis = 0
    match module:
        case nn.Embedding():
            axis = 1
        case _ConvTransposeNd() if not is_depthwise(module):
            axis = 1
        case nn.Linear() | _ConvNd() | nn.GroupNorm() | nn.PReLU():
            pass
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1:
            pass
        case _NormBase():
            return ("weight", 0) if module.affine else ("running_mean", 0)
        case _:
            return None
    has_weight = "weight" in module._parameters  # a parametrization computes it from others
    return ("weight", axis) if has_weight or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) else None


def width(module: nn.Module, side: Side) -> int | None:
    """Number of indices on that side; None if modules of this type do not have it."""
    match module, side:
        case nn.Linear(), "in" | "out":
            return module.in_features if side == "in" else module.out_features
        case _ConvNd(), "in" | "out":
            return module.in_channels if side == "in" else module.out_channels
        case _NormBase(), "out":
            return module.num_features
        case nn.GroupNorm(), "out":
            return module.num_channels
        case ((nn.LayerNorm() | nn.RMSNorm()), "out") if len(module.normalized_shape) == 1:
            return module.normalized_shape[0]
        case nn.PReLU(), "out":
            return module.num_parameters
        case nn.Embedding(), "out":
            return module.embedding_dim
    name, _, axis = side.rpartition(".")
    tensor = getattr(module, name, None) if axis.isdigit() else None
    return tensor.shape[int(axis)] if isinstance(tensor, Tensor) and int(axis) < tensor.dim() else None


def filters_per_group(module: nn.Module, side: Side) -> int | None:
    """Indices of that side per group of a grouped convolution; None for everything else."""
    if not isinstance(module, _ConvNd) or module.groups == 1 or is_depthwise(module):
        return None
    return (module.in_channels if side == "in" else module.out_channels) // module.groups


def normalizes_over_channels(module: nn.Module) -> bool:
    """Whether a leaf layer normalizes over all its channels: LayerNorm, RMSNorm or a user's own class like them."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    is_leaf = next(module.children(), None) is None
    known = nn.Linear | _ConvNd | _NormBase | nn.Embedding | nn.PReLU | nn.MultiheadAttention
    own = list(module.parameters())
    return (
        is_leaf
        and not isinstance(module, known)
        and bool(own)
        and all(max(p.shape, default=1) == p.numel() for p in own)
    )
