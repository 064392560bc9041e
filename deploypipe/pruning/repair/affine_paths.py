"""Find the point up to which a layer's output is an affine function of its weights: a batch norm or an addition.

One small forward pass finds these paths; hooks then watch them in the passes over the calibration samples.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deploypipe.observe.calibration_pass import hooked
from deploypipe.observe.collectors import BY_KEYWORD
from deploypipe.observe.layer_regressions import (
    LinearLike,
    has_channels_last,
    is_linear_like,
    num_groups,
    sample_inputs,
    sample_outputs,
    sample_positions,
    weight_blocks,
)
from deploypipe.pruning.modules.module_calls import ADDITIONS
from deploypipe.task import forward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FEW = 64  # output positions of a sample at which a layer is seen to compute what its weights say
_SAME = 1e-2  # of the largest output: half-precision sums differ by less, another computation by more


@dataclass(slots=True)
class SignalPath:
    """The path from a layer to the point where its output is compared with the dense network's."""

    layer: str
    norm: str | None = None  # the batch norm that reads it
    is_added: bool = False  # whether it ends as an operand of an addition
    num_calls: int = 0
    why_not: str = ""  # why it cannot be solved; "" if it can


@dataclass(frozen=True, slots=True)
class PathEnd:
    """The values at the end of a path."""

    path: SignalPath
    args: tuple[Any, ...]  # of the layer's call
    value: Tensor
    other: Tensor | None = None  # the addition's other operand


Finish = Callable[[PathEnd], Tensor]  # returns the value to continue with


def find_paths(model: nn.Module, inputs: Any) -> dict[str, SignalPath]:
    """Layer name -> path, for every linear-like layer, from one small forward pass."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    paths = {
        name: SignalPath(name, why_not=_why_not(m, owners)) for name, m in model.named_modules() if is_linear_like(m)
    }
    norm_calls: Counter[str] = Counter()
    trace = _FindAdditions(list(paths))

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            paths[name].num_calls += 1
            paths[name].why_not = paths[name].why_not or _differs(module, args, output)
            if not paths[name].why_not:
                trace.follow(paths[name], output, args[0])

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            norm_calls[name] += 1
            before = trace.find(args[0]) if args else None
            if before is not None and before.path.norm is None and _is_per_output(model, before.path, output):
                before.path.norm = name
                trace.follow(before.path, output, before.source)

        return hook

    hooks = [(name, layer_hook(name)) for name in paths] + _norm_hooks(model, norm_hook)
    with hooked(model, hooks), torch.no_grad(), trace:
        forward(model, inputs)
    _settle_(paths, trace.steps, norm_calls)
    return paths


def _settle_(paths: Mapping[str, SignalPath], steps: Sequence["_Step"], norm_calls: Mapping[str, int]) -> None:
    """Shorten paths whose tensors have other readers, and paths through modules that are called more than once."""
    for step in steps:  # other readers of a tensor must find the value it had before
        if step.num_uses > 1:
            step.path.is_added = False
            step.path.norm = step.path.norm if step.is_after_norm else None
    for path in paths.values():
        if path.norm is not None and norm_calls[path.norm] > 1:
            path.norm, path.is_added = None, False
        if path.num_calls != 1:
            path.why_not = "is called more than once" if path.num_calls else "is not called"


def common_paths(paths: Mapping[str, SignalPath], others: Mapping[str, SignalPath]) -> dict[str, SignalPath]:
    """Paths as far as they are the same in both networks. Without a removed block they may differ."""
    for name, path in paths.items():
        other = others[name]
        if path.norm != other.norm:
            path.norm, path.is_added = None, False
        path.is_added = path.is_added and other.is_added
        path.why_not = path.why_not or other.why_not
    return dict(paths)


def layers_without_path(model: nn.Module) -> dict[str, str]:
    """Modules with weight matrices that are not linear-like layers, and why they are not solved.

    Embedding tables read no activations, so what is left of them needs no repair.
    """
    found = {}
    for name, module in model.named_modules():
        matrices = [n for n, p in module.named_parameters(recurse=False) if sum(size > 1 for size in p.shape) > 1]
        if matrices and not is_linear_like(module) and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kind = type(module).__name__
            found[name or kind] = f"only the code of {kind} knows what it computes with {', '.join(matrices)}"
    return found


def _why_not(layer: nn.Module, owners: Mapping[int, int]) -> str:
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weights are computed from other tensors"
    return "shares its weights with another module" if owners[id(weight)] > 1 else ""


def _differs(layer: LinearLike, args: tuple[Any, ...], output: Tensor) -> str:
    """Why the layer does not compute what its kind does, as subclasses and unusual calls may; "" if it does."""
    if not args:
        return BY_KEYWORD
    if output.dim() < layer.weight.dim():
        return "is called without a batch axis"
    positions = sample_positions(layer, output, _FEW, torch.Generator().manual_seed(0))
    blocks = weight_blocks(layer)
    rows = sample_inputs(layer, args[0], output, positions)
    products = torch.einsum("ngp,gop->ngo", rows.view(len(rows), num_groups(layer), -1), blocks).flatten(1)
    written = sample_outputs(layer, output, positions)
    error = (written - products - (0 if layer.bias is None else layer.bias)).abs().max()
    return "does not compute what its weights say" if error > _SAME * written.abs().max() + 1e-30 else ""


@dataclass(slots=True)
class _Step:
    """A tensor on a path. The reference keeps its id unique; the versions detect changes in place."""

    path: SignalPath
    tensor: Tensor
    source: Tensor  # the layer's input
    is_after_norm: bool
    versions: tuple[int, int]
    num_uses: int = 0

    def is_as_it_was(self) -> bool:
        return self.versions == (self.tensor._version, self.source._version)


class _FindAdditions(TorchFunctionMode):
    """Mark the paths that end in an addition, and count the readers of the tensors on them."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order
        self.steps: list[_Step] = []
        self.by_id: dict[int, _Step] = {}

    def follow(self, path: SignalPath, tensor: Tensor, source: Tensor) -> None:
        step = _Step(path, tensor, source, path.norm is not None, (tensor._version, source._version))
        self.steps.append(step)
        self.by_id[id(tensor)] = step

    def find(self, tensor: Any) -> _Step | None:
        step = self.by_id.get(id(tensor))
        return step if step is not None and step.is_as_it_was() else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [a for each in given if isinstance(each, (list, tuple)) for a in each]
        read = [(a, step) for a in given if (step := self.find(a)) is not None]
        if read and _is_plain_sum(func, args, kwargs):
            # Of two branches the one that is computed last corrects the error of the other.
            max((step.path for _, step in read), key=lambda path: self.order.index(path.layer)).is_added = True
        result = func(*args, **(kwargs or {}))
        for tensor, step in read:
            step.num_uses += result is not tensor and isinstance(result, (Tensor, list, tuple))
        return result


def _is_plain_sum(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call adds two tensors of one shape without a factor."""
    if getattr(func, "__name__", "") not in ADDITIONS or kwargs or len(args) != 2:
        return False
    return all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape


def _is_per_output(model: nn.Module, path: SignalPath, output: Tensor) -> bool:
    """Whether the batch norm normalizes along the axis of the layer's outputs."""
    return output.dim() == 2 or not has_channels_last(model.get_submodule(path.layer))


def _norm_hooks(model: nn.Module, hook: Callable[[str], Callable[..., Any]]) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks for the batch norms that can store a solution."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NORMS)}
    return [(name, hook(name)) for name, m in norms.items() if m.affine and m.running_mean is not None]


@contextmanager
def hook_path_ends(model: nn.Module, paths: Mapping[str, SignalPath], finish: Finish) -> Iterator[None]:
    """Within the `with` block, call `finish` at the end of each path and continue with the value it returns."""
    carried: dict[int, PathEnd] = {}

    def end_or_carry(end: PathEnd, is_end: bool) -> Tensor:
        if is_end:
            return finish(end)
        carried[id(end.value)] = end
        return end.value

    def layer_hook(path: SignalPath) -> Callable[..., Tensor]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return end_or_carry(PathEnd(path, args, output), path.norm is None and not path.is_added)

        return hook

    def norm_hook(name: str) -> Callable[..., Tensor]:
        def hook(_m: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            before = carried.get(id(args[0])) if args else None
            if before is None or before.path.norm != name:
                return output
            del carried[id(args[0])]
            return end_or_carry(replace(before, value=output), not before.path.is_added)

        return hook

    hooks = [(name, layer_hook(path)) for name, path in paths.items()] + _norm_hooks(model, norm_hook)
    with hooked(model, hooks), _AtAdditions(carried, finish):
        yield


class _AtAdditions(TorchFunctionMode):
    """End the paths whose output is added to another tensor."""

    def __init__(self, carried: dict[int, PathEnd], finish: Finish) -> None:
        super().__init__()
        self.carried, self.finish = carried, finish

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_plain_sum(func, args, kwargs):
            args = list(args)
            for here, there in ((0, 1), (1, 0)):
                if id(args[here]) in self.carried:
                    args[here] = self.finish(replace(self.carried.pop(id(args[here])), other=args[there]))
        return func(*args, **(kwargs or {}))
