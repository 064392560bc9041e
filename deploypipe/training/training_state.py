"""The state of a training: weights, their average, the best epoch, the log; and how a checkpoint holds it."""

import io
from collections.abc import Iterator
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
from deploypipe.training.ranks import Ranks

_PACKED = "optimizer and schedule"


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
    flat = {f"model/{n}": t for n, t in weights_of(model).items()}
    flat |= {"top": torch.from_numpy(state.top), _PACKED: packed(optimizer, schedule)}
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
    unpack_(flat[_PACKED], optimizer, schedule)


def packed(*parts: Any) -> Tensor:
    """The `state_dict()` of each part, whatever it holds, as bytes: an optimizer may keep numbers next to tensors."""
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack_(stored: Tensor, *parts: Any) -> None:
    """Load what `packed` made. Raises pickle.UnpicklingError for anything but tensors and plain values."""
    states = torch.load(io.BytesIO(stored.numpy().tobytes()), map_location="cpu", weights_only=True)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
