"""The state of a training: weights, their average, the best epoch, the log; and how a checkpoint holds it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deploypipe.records import EpochLog, TrainLog
from deploypipe.training.checkpoint import Checkpoint, store_checkpoint
from deploypipe.training.plain_state import from_text, to_text
from deploypipe.training.ranks import Ranks

_TEXT, _STATE = "optimizer and schedule", "state/"


@dataclass(slots=True)
class TrainingState:
    """The state of a training, apart from the model and the optimizer, that a resumed one needs."""

    best: dict[str, Tensor]
    average: dict[str, Tensor]
    top: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # (samples,) on val, of the best mean so far
    best_epoch: int = 0
    log: list[EpochLog] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def average_(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the average towards the model's weights; what is not a floating-point number is copied."""
    weights = model.state_dict()
    real = [name for name, tensor in weights.items() if tensor.is_floating_point()]
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # all tensors in one go
    update([average[name] for name in real], [weights[name] for name in real], len(real))
    for name in weights.keys() - set(real):
        average[name].copy_(weights[name])


def agree_(average: dict[str, Tensor], ranks: Ranks) -> None:
    """Copy rank 0's average to all ranks: on CPUs, batch norms of other ranks saw other samples."""
    if ranks.count > 1:
        for name, tensor in ranks.tell({n: t.cpu() for n, t in average.items()}).items():
            average[name].copy_(tensor)


@contextmanager
def holding(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give the model other weights inside the block."""
    own = weights_of(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


def store_state(state: TrainingState, model: nn.Module, optimizer: Any, schedule: Any, folder: Path) -> None:
    """Write a checkpoint after the last epoch of the log."""
    flat = {f"model/{n}": t for n, t in weights_of(model).items()}
    flat |= {"top": torch.from_numpy(state.top), **packed(optimizer, schedule)}
    flat |= {f"best/{n}": t for n, t in state.best.items()} | {f"average/{n}": t for n, t in state.average.items()}
    log = TrainLog(epochs=tuple(state.log), chosen_epoch=state.best_epoch, notes=tuple(state.notes))
    store_checkpoint(folder, log, flat)


def restore_(state: TrainingState, model: nn.Module, optimizer: Any, schedule: Any, stored: Checkpoint) -> None:
    """Restore the state of a checkpoint."""
    log, flat = stored
    state.log, state.best_epoch, state.top = list(log.epochs), log.chosen_epoch, flat["top"].numpy()
    state.notes = list(log.notes)
    for name in state.average:
        state.best[name].copy_(flat[f"best/{name}"])
        state.average[name].copy_(flat[f"average/{name}"])
    model.load_state_dict({k.removeprefix("model/"): t for k, t in flat.items() if k.startswith("model/")})
    unpack_(flat, optimizer, schedule)


def packed(*parts: Any) -> dict[str, Tensor]:
    """The `state_dict()` of each part, as tensors with names: an optimizer may keep numbers next to tensors.

    TypeError if one holds anything but tensors and plain values.
    """
    text, tensors = to_text([part.state_dict() for part in parts])
    as_bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return {_TEXT: as_bytes, **{f"{_STATE}{name}": tensor for name, tensor in tensors.items()}}


def unpack_(stored: Mapping[str, Tensor], *parts: Any) -> None:
    """Load what `packed` made."""
    tensors = {name.removeprefix(_STATE): each for name, each in stored.items() if name.startswith(_STATE)}
    for part, state in zip(parts, from_text(stored[_TEXT].numpy().tobytes().decode(), tensors), strict=True):
        part.load_state_dict(state)
