"""How one network is compressed: frozen dataclasses, composed in a pipeline's `recipe()` and varied with `replace`."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


def _require_least(record: object, **least: float) -> None:
    """ValueError for the first field that lies below its least value."""
    for name, bound in least.items():
        if getattr(record, name) < bound:
            raise ValueError(f"{name} = {getattr(record, name)} is too small; write {bound} or more")


def _require_share(record: object, name: str) -> None:
    value = getattr(record, name)
    if not 0 < value <= 1:
        raise ValueError(f"{name} = {value} is no share; write a number above 0 and up to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observe:
    """The streaming pass over the calibration split."""

    num_samples: int = 1024  # at most; samples of the calibration split
    positions_per_sample: int = 4  # spatial positions (or tokens) drawn from each sample

    def __post_init__(self) -> None:
        _require_least(self, num_samples=2, positions_per_sample=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnitude:
    """Sum of the absolute or squared weights that produce and read a unit."""

    kind: Literal["magnitude"] = "magnitude"
    power: Literal[1, 2] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Random:
    """The control every comparison needs."""

    kind: Literal["random"] = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchNormScale:
    """Size of the batch norm's gain on a unit (Liu et al., arXiv:1708.06519)."""

    kind: Literal["batch_norm_scale"] = "batch_norm_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fpgm:
    """Distance of a unit's weights from all others of its group (He et al., arXiv:1811.00250)."""

    kind: Literal["fpgm"] = "fpgm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Taylor:
    """Mean squared derivative of the loss by a gate on the unit (Molchanov et al., arXiv:1906.10771). Needs labels."""

    kind: Literal["taylor"] = "taylor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mipp:
    """Mutual-information-preserving pruning, closed Gaussian form (arXiv:2411.00147; sequential downdates)."""

    kind: Literal["mipp"] = "mipp"
    noise: float = 1.0  # noise floor, as a share of the outputs' mean variance; small floors rank worse (LOG.md)
    keep: float = 1.0  # share of each layer above that counts as kept, and so as a target, when the one below is scored
    confidence: float | None = None  # as in the paper: suggest the width at which no loss of information is this sure

    def __post_init__(self) -> None:
        _require_least(self, noise=0)
        _require_share(self, "keep")
        if self.confidence is not None:
            _require_share(self, "confidence")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerwiseMi:
    """Information about the kept units of the layer above (Fan et al., arXiv:2108.12594)."""

    kind: Literal["layerwise_mi"] = "layerwise_mi"
    joint: bool = True  # units chosen one by one, given those chosen before; False: each unit by itself
    noise: float = 1e-3  # noise floor, as a share of the outputs' mean variance
    keep: float = 0.5  # share of each layer above that counts as kept, and so as a target

    def __post_init__(self) -> None:
        _require_least(self, noise=0)
        _require_share(self, "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputError:
    """Squared error of the readers' outputs after the best repair, units removed one by one."""

    kind: Literal["output_error"] = "output_error"
    fisher: bool = False  # weigh each output by the loss's squared derivative by it; needs labels


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMi:
    """Information of one unit about the label: quantile bins, Miller-Madow correction. Needs labels."""

    kind: Literal["label_mi"] = "label_mi"
    num_bins: int = 8

    def __post_init__(self) -> None:
        _require_least(self, num_bins=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionalMi:
    """Information of a unit about the label given the units chosen before (Vu-Van et al., arXiv:2411.18578, in Gaussian
    form), and the width at which the Scree test sees no more of it. Needs labels."""

    kind: Literal["conditional_mi"] = "conditional_mi"


Scorer: TypeAlias = (
    Magnitude | Random | BatchNormScale | Fpgm | Taylor | Mipp | LayerwiseMi | OutputError | LabelMi | ConditionalMi
)


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
class Mpruner:
    """Similarity (CKA) to the block before; removal in clusters, guarded by accuracy (Hu et al., arXiv:2408.13482)."""

    kind: Literal["mpruner"] = "mpruner"
    threshold: float = 0.98  # least CKA with a cluster's first block
    stride: int = 1  # of every cluster, all members but the first go; 2: every other one; 3: every third
    max_stride: int = 3  # where the guard gives up
    max_drop_pp: float = 4.0  # of accuracy, against the dense network

    def __post_init__(self) -> None:
        _require_share(self, "threshold")
        _require_least(self, stride=1, max_stride=self.stride, max_drop_pp=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMi:
    """Information that a block's input holds about its output (MI-PRUN, arXiv:2601.07212, in Gaussian form)."""

    kind: Literal["block_mi"] = "block_mi"
    noise: float = 1e-3  # noise floor, as a share of the outputs' mean variance
    num_exact: int = 8  # runs of each length whose own information is computed, when several blocks are chosen

    def __post_init__(self) -> None:
        _require_share(self, "noise")
        _require_least(self, num_exact=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitDivergence:
    """KL divergence of the network's answers without the block from those of the dense network."""

    kind: Literal["logit_divergence"] = "logit_divergence"
    num_samples: int = 512  # of the calibration split
    temperature: float = 4.0  # answers to memorised samples are saturated at 1, and a few samples decide
    repair: Repair | None = None  # repair the network without the block before it answers

    def __post_init__(self) -> None:
        _require_least(self, num_samples=1)
        if self.temperature <= 0:
            raise ValueError(f"temperature = {self.temperature} is no temperature; write a number above 0")


BlockScorer: TypeAlias = Mpruner | BlockMi | LogitDivergence


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """A short training of the repaired network, taught by the dense one."""

    num_epochs: int = 5
    learning_rate: float = 0.006  # peak; low, because a large step destroys the repair (pipelines/LOG.md)
    warmup_share: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distil_weight: float = 0.7  # the rest weighs the labels
    distil_temperature: float = 4.0
    mix_share: float = 0.5  # mixup: at most this share of another sample is mixed into each; 0: off. Not for token ids
    average_decay: float = 0.99  # exponential moving average of the weights, per step; 0: off
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        _require_least(
            self, num_epochs=0, learning_rate=0, warmup_share=0, weight_decay=0, distil_weight=0, mix_share=0
        )


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
