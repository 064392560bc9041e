"""Logs of trainings."""

from dataclasses import dataclass

from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRow:
    """One decision of MPruner's loop."""

    iteration: int
    stride: int
    clusters: tuple[Names, ...]
    removed: Names  # tried to remove, from the best network so far
    accuracy: float | None  # None: not tried
    accepted: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthLog:
    rows: tuple[DepthRow, ...]
    dense_accuracy: float
    accuracy: float  # of the network that is returned
    removed: Names  # from the dense network, in the order of removal
    reason: str  # why the loop ended


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochLog:
    epoch: int  # 0: before the first step
    learning_rate: float
    train_loss: float
    val_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainLog:
    epochs: tuple[EpochLog, ...]
    chosen_epoch: int  # the last one that is not worse on val than the best; 0: the training was rolled back
    reason: str = ""
    precision: str = ""  # of the arithmetic: "bf16" or "fp32"
    notes: tuple[str, ...] = ()  # for readers, such as batches that were left out
    optimizer: str = ""  # and the schedule: "AdamW, cosine"
