"""How one network is compressed: frozen dataclasses, composed in a pipeline's `recipe()` and varied with `replace`."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


def _require_least(record: object, **least: float) -> None:
    """ValueError for the first field that lies below its least value."""
    for name, bound in least.items():
        if getattr(record, name) < bound:
            raise ValueError(f"{name} = {getattr(record, name)} is too small; write {bound} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observe:
    """The streaming pass over the calibration split."""

    num_samples: int = 1024  # at most; samples of the calibration split
    positions_per_sample: int = 4  # spatial positions (or tokens) drawn from each sample

    def __post_init__(self) -> None:
        _require_least(self, num_samples=2, positions_per_sample=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnitude:
    """L2 norm of the weights that produce and read a channel."""

    kind: Literal["magnitude"] = "magnitude"


@dataclass(frozen=True, kw_only=True, slots=True)
class Random:
    """The control every comparison needs."""

    kind: Literal["random"] = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mipp:
    """Mutual-information-preserving pruning, closed Gaussian form (arXiv:2411.00147; sequential downdates)."""

    kind: Literal["mipp"] = "mipp"
    noise: float = 1.0  # noise floor, as a share of the outputs' mean variance; small floors rank worse (LOG.md)


Scorer: TypeAlias = Magnitude | Random | Mipp


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Which widths and blocks go."""

    num_trials: int = 12
    num_curve_samples: int = 512  # images the loss curves are measured on
    num_levels: int = 8  # widths tried per channel group
    num_repair_samples: int = 512  # for judging a trial; the winner is repaired with all of `repair.num_samples`
    prune_blocks: bool = True

    def __post_init__(self) -> None:
        _require_least(self, num_trials=1, num_curve_samples=1, num_levels=2, num_repair_samples=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """Sequential least squares after surgery."""

    num_samples: int = 2048  # at most; held in memory as one batch
    positions_per_sample: int = 16
    ridge: float = 1e-3  # added to the normal matrix, as a share of its mean diagonal

    def __post_init__(self) -> None:
        _require_least(self, num_samples=1, positions_per_sample=1, ridge=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """A short training of the repaired network, taught by the dense one."""

    num_epochs: int = 5
    learning_rate: float = 0.003  # peak; low, because a large step destroys the repair (pipelines/LOG.md)
    warmup_share: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distil_weight: float = 0.7  # the rest weighs the labels
    distil_temperature: float = 4.0
    average_decay: float = 0.99  # exponential moving average of the weights, per step; 0: off
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        _require_least(self, num_epochs=0, learning_rate=0, warmup_share=0, weight_decay=0, distil_weight=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    opset: int = 20
    max_abs_error: float = 1e-3  # of the outputs, relative to their largest magnitude; refused above


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All choices that shape the compressed network. Same recipe, seed and machine: same plan, bit for bit."""

    seed: int = 0
    observe: Observe = field(default_factory=Observe)
    score: Scorer = field(default_factory=Mipp)
    search: Search = field(default_factory=Search)
    repair: Repair = field(default_factory=Repair)
    finetune: Finetune = field(default_factory=Finetune)
    export: Export = field(default_factory=Export)
    keep: tuple[str, ...] = ()  # glob patterns of modules that must stay as they are
