"""Choose the device that a run computes on, and move networks and batches there: the one place that does.

Results of a GPU differ from the CPU's by rounding of float32 only: `exact_float32` turns TensorFloat-32 off, sums over
samples and least squares are in float64, and random positions are drawn on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deploypipe.errors import ConfigError, ModelError
from deploypipe.networks.batch_trees import map_tensors, tensors
from deploypipe.networks.model_copies import copied
from deploypipe.task import evaluating, forward

CPU = torch.device("cpu")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeDevice:
    """What a recipe's `device` stands for on this machine."""

    device: torch.device  # observes, scores, repairs, and judges networks; it has float64
    accelerator: str  # fine-tunes, as Lightning Fabric calls it: "cpu", "cuda", "mps", or "auto", the first found
    text: str  # the device and the reason for it, for people


def find_device(wanted: str) -> ComputeDevice:
    """The device that a recipe's `device` stands for. ConfigError if this machine lacks it.

    "auto" is the GPU of CUDA if there is one, else the CPU. Apple's MPS has no float64, in which moments are summed and
    layers are solved, and a solution in float32 loses what it gained on correlated inputs. So "mps" only fine-tunes
    there, as "auto" does on a Mac, and all else runs on the CPU.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        found = _describe(wanted)
        return found if wanted == "cuda" else ComputeDevice(device=CPU, accelerator="auto", text=found.text)
    if wanted == "cuda" and not torch.cuda.is_available():
        built = "for the CPU" if torch.version.cuda is None else "for CUDA, but sees no GPU that it can use"
        raise _absent(wanted, f"torch {torch.__version__} is built {built}")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise _absent(wanted, f"torch {torch.__version__} finds no Apple GPU")
    return _describe(wanted)


def _describe(wanted: str) -> ComputeDevice:
    if wanted == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        return ComputeDevice(device=device, accelerator="cuda", text=f"{device} ({torch.cuda.get_device_name(device)})")
    text = "cpu; fine-tuning on mps, which has no float64 for the rest" if wanted == "mps" else "cpu"
    return ComputeDevice(device=CPU, accelerator=wanted, text=text)


def _absent(wanted: str, problem: str) -> ConfigError:
    return ConfigError(
        "recipe", "device", f"{wanted!r} is not there: {problem}", "write device='auto', or start it where it is"
    )


def device_for(model: nn.Module, inputs: Any, wanted: str) -> tuple[ComputeDevice, str]:
    """The device for a network, and why it is not the GPU that "auto" found; "" if it is.

    inputs: a few samples, which the network is tried on. Code that makes tensors on the CPU fails elsewhere. Then
    "auto" is the CPU, and a device that was asked for by name is a ModelError.
    """
    found = find_device(wanted)
    if found.device == CPU:
        return found, ""
    try:
        there = network_on(model, found.device)
        with evaluating(there), torch.no_grad():
            forward(there, to_device(inputs, found.device))
    except RuntimeError as error:
        problem = f"the network does not run on {found.device}: {(str(error).strip().splitlines() or [''])[0]}"
        if wanted != "auto":
            raise ModelError(f"{problem}; make its tensors on the device of its inputs, or set device='cpu'") from error
        return find_device("cpu"), f"{problem}; it computes on the CPU"
    return found, ""


def to_device(tree: T, device: torch.device | None) -> T:
    """A batch, its inputs or its target with all tensors on the device; the same object if they are there already.

    device: None leaves everything where it is.
    """
    if device is None or all(tensor.device == device for tensor in tensors(tree)):
        return tree
    moved: Any = map_tensors(lambda tensor: tensor.to(device), tree)
    return moved  # type: ignore[no-any-return]


def network_on(model: nn.Module, device: torch.device | None) -> nn.Module:
    """The network itself if it is on the device (or that is None), else a copy there."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    if device is None or all(tensor.device == device for tensor in held):
        return model
    return copied(model).to(device)


@contextmanager
def exact_float32(device: torch.device | None) -> Iterator[None]:
    """Around forward passes: a GPU computes float32 in float32, not in TensorFloat-32 with its 10 bits.

    PyTorch takes TensorFloat-32 for convolutions unless it is told otherwise: errors of 1e-3, which the least squares
    of a repair would fit. The settings before are restored.
    """
    if device is None or device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    places: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
