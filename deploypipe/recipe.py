"""Settings to compress one network: frozen dataclasses, composed in a pipeline's `recipe()`, varied by `replace`."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from deploypipe.text.field_bounds import (
    FRACTION,
    MAX_SAMPLES,
    SHARE,
    above,
    real,
    require,
    require_one_of,
    require_text,
    require_texts,
    shown,
    whole,
)
from deploypipe.text.memory_sizes import parse_gib

_MAX_AXIS = 63
_SAMPLES = whole(1, MAX_SAMPLES)
_POSITIONS = whole(1, 1_000_000)
_NOISE = real(0, 1e6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observe:
    """The pass over the calibration split that collects activation statistics."""

    num_samples: int = 1024  # of the calibration split, at most
    positions_per_sample: int = 4  # spatial positions (or tokens) drawn from each sample

    def __post_init__(self) -> None:
        require(self, num_samples=whole(2, MAX_SAMPLES), positions_per_sample=_POSITIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Magnitude:
    """Score a unit by the sum of the absolute or squared weights that produce and read it."""

    kind: Literal["magnitude"] = "magnitude"
    power: Literal[1, 2] = 2  # 1: absolute weights, 2: squared


@dataclass(frozen=True, kw_only=True, slots=True)
class Random:
    """Random scores: the control for comparisons."""

    kind: Literal["random"] = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchNormScale:
    """Score a unit by the size of its batch norm scale (Liu et al., arXiv:1708.06519)."""

    kind: Literal["batch_norm_scale"] = "batch_norm_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fpgm:
    """Score a unit by the distance of its weights from all others of its group (He et al., arXiv:1811.00250)."""

    kind: Literal["fpgm"] = "fpgm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Taylor:
    """Mean squared gradient of the loss by a gate on the unit (Molchanov et al., arXiv:1906.10771). Needs labels."""

    kind: Literal["taylor"] = "taylor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mipp:
    """Mutual-information-preserving pruning, closed Gaussian form (arXiv:2411.00147; sequential downdates)."""

    kind: Literal["mipp"] = "mipp"
    noise: float = 1.0  # noise floor, as a share of the outputs' mean variance; small floors rank worse (LOG.md)
    keep: float = 1.0  # share of the next layer that counts as kept, and so as a target, when a layer is scored
    confidence: float | None = None  # as in the paper: suggest the width without loss of information at this confidence

    def __post_init__(self) -> None:
        require(self, noise=_NOISE, keep=SHARE, confidence=SHARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerwiseMi:
    """Information about the kept units of the next layer (Fan et al., arXiv:2108.12594)."""

    kind: Literal["layerwise_mi"] = "layerwise_mi"
    joint: bool = True  # choose units one by one, given those chosen before; False: score each unit alone
    noise: float = 1e-3  # noise floor, as a share of the outputs' mean variance
    keep: float = 0.5  # share of the next layer that counts as kept, and so as a target

    def __post_init__(self) -> None:
        require(self, noise=_NOISE, keep=SHARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputError:
    """Squared error of the consumers' outputs after the best repair, as units are removed one by one."""

    kind: Literal["output_error"] = "output_error"
    fisher: bool = False  # weigh each output by its squared gradient of the loss; needs labels


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMi:
    """Information of one unit about the label, with quantile bins and Miller-Madow correction. Needs labels."""

    kind: Literal["label_mi"] = "label_mi"
    num_bins: int = 8  # quantile bins of a unit's activations

    def __post_init__(self) -> None:
        require(self, num_bins=whole(2, 1_000_000))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionalMi:
    """Information of a unit about the label, given the units chosen before (Vu-Van et al., arXiv:2411.18578, in
    Gaussian form). Suggests the width at which the Scree test sees no more information. Needs labels."""

    kind: Literal["conditional_mi"] = "conditional_mi"


Scorer: TypeAlias = (
    Magnitude | Random | BatchNormScale | Fpgm | Taylor | Mipp | LayerwiseMi | OutputError | LabelMi | ConditionalMi
)


ObjectiveName: TypeAlias = Literal["accuracy", "latency", "peak_memory"]
_OBJECTIVES: tuple[tuple[ObjectiveName, ...], ...] = (
    ("accuracy",),
    ("accuracy", "latency"),
    ("accuracy", "peak_memory"),
    ("accuracy", "latency", "peak_memory"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The search for the widths and blocks to remove."""

    num_trials: int = 12  # candidates that are cut, repaired, timed and evaluated
    max_minutes: float | None = None  # no trial begins later; the best one so far wins. Interruptions do not count
    num_parallel: int = 1  # trials that workers run at once; a trial learns from those at least this many before it
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"  # proposes the knobs, after a few fixed first trials
    # Accuracy is maximised, the others minimised. The most accurate trial within the budget wins in any case.
    objectives: tuple[ObjectiveName, ...] = ("accuracy",)
    num_curve_samples: int = 512  # samples on which the loss curves are measured
    num_levels: int = 8  # widths tried per channel group
    # "predicted": two widths of a group are measured; the others follow from them and from the error after the repair.
    curves: Literal["predicted", "measured"] = "measured"
    num_timed: int = 40  # networks timed before the search, to predict the latency of all others
    num_repair_samples: int = 512  # to evaluate a trial; the winner is repaired with all of `repair.num_samples`
    num_finalists: int = 3  # best trials, fine-tuned briefly before one of them wins; 1: the best trial wins untrained
    finalist_epochs: int = 1  # of their brief fine-tuning
    num_attempts: int = 3  # networks trained to the end, each faster, until the benchmark is within the latency budget
    prune_blocks: bool = True  # whether whole blocks may be removed

    def __post_init__(self) -> None:
        require(
            self,
            num_trials=whole(1, 100_000),
            max_minutes=above(0, 1e6),
            num_parallel=whole(1, 10_000),
            num_curve_samples=_SAMPLES,
            num_levels=whole(2, 1_000),
            num_timed=whole(8, 10_000),
            num_repair_samples=_SAMPLES,
            num_finalists=whole(1, 1_000),
            finalist_epochs=whole(1, 100_000),
            num_attempts=whole(1, 100),
        )
        require_one_of("sampler", self.sampler, ("tpe", "gp", "nsga2", "random"))
        require_one_of("curves", self.curves, ("predicted", "measured"))
        if self.objectives not in _OBJECTIVES:
            known = " or ".join(map(repr, _OBJECTIVES))
            raise ValueError(f"objectives = {shown(self.objectives)} does not exist; write {known}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """The repair after surgery: sequential least squares."""

    num_samples: int = 2048  # of the calibration split, at most; layers that exceed `memory` read fewer
    positions_per_sample: int = 16  # spatial positions (or tokens) of each sample
    ridge: float = 1e-3  # added to the normal matrix, as a share of its mean diagonal

    def __post_init__(self) -> None:
        require(self, num_samples=_SAMPLES, positions_per_sample=_POSITIONS, ridge=_NOISE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mpruner:
    """Similarity (CKA) to the block before; removal in clusters, limited by accuracy (Hu et al., arXiv:2408.13482)."""

    kind: Literal["mpruner"] = "mpruner"
    threshold: float = 0.98  # lowest CKA with a cluster's first block
    stride: int = 1  # 1: remove all members of a cluster but the first; 2: every other one; 3: every third
    max_stride: int = 3  # the loop stops beyond it
    max_drop_pp: float = 4.0  # of accuracy, against the dense network

    def __post_init__(self) -> None:
        require(self, threshold=SHARE, stride=whole(1, 10_000), max_drop_pp=real(0, 100))
        require(self, max_stride=whole(self.stride, 10_000))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMi:
    """Information that a block's input holds about its output (MI-PRUN, arXiv:2601.07212, in Gaussian form)."""

    kind: Literal["block_mi"] = "block_mi"
    noise: float = 1e-3  # noise floor, as a share of the outputs' mean variance
    num_exact: int = 8  # sequences of blocks of each length whose information is computed exactly

    def __post_init__(self) -> None:
        require(self, noise=SHARE, num_exact=whole(1, 10_000))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitDivergence:
    """KL divergence of the network's outputs without the block from those of the dense network."""

    kind: Literal["logit_divergence"] = "logit_divergence"
    num_samples: int = 512  # of the calibration split
    temperature: float = 4.0  # at 1, the outputs for memorised samples are saturated, and a few samples decide
    repair: Repair | None = None  # repair the network without the block before comparing its outputs

    def __post_init__(self) -> None:
        require(self, num_samples=_SAMPLES, temperature=above(0, 1e6))


BlockScorer: TypeAlias = Mpruner | BlockMi | LogitDivergence


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune:
    """Fine-tuning of the repaired network, with the dense network as its teacher."""

    num_epochs: int = 5  # 0: no fine-tuning
    # auto: AdamW for transformers, SGD for all other networks. `Task(optimizer=..., schedule=...)` replaces optimizer,
    # learning rate, momentum, weight decay and schedule.
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    learning_rate: float | None = None  # peak; None: 0.006 for SGD, 0.0001 for AdamW. A large step destroys the repair
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # to zero, or constant, after the warm-up
    warmup_share: float = 0.1  # of all steps
    momentum: float = 0.9  # of SGD
    weight_decay: float | None = None  # None: 0.0005 for SGD; 0.01 for AdamW, which leaves out norms and biases
    distil_weight: float = 0.7  # of the distillation loss; the task's loss has the rest
    distil_temperature: float = 4.0  # of a classifier's outputs
    mix_share: float = 0.5  # mixup: at most this share of another sample is mixed into each; 0: off. Off for token ids
    max_gradient_norm: float = 10.0  # of all weights together; larger gradients are clipped to it
    average_decay: float = 0.99  # exponential moving average of the weights, per step; 0: off
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 if the processor or GPU computes in it
    accumulate: int = 1  # parts in which a batch is passed, for a batch that does not fit into memory
    compile: bool = False  # use torch.compile: costs a minute or two once, then faster for some networks

    def __post_init__(self) -> None:
        require(
            self,
            num_epochs=whole(0, 100_000),
            learning_rate=real(0, 1e30),
            warmup_share=FRACTION,
            momentum=FRACTION,
            weight_decay=real(0, 1e3),
            distil_weight=FRACTION,
            distil_temperature=above(0, 1e6),
            mix_share=FRACTION,
            max_gradient_norm=above(0, 1e12),
            average_decay=FRACTION,
            accumulate=whole(1, 1_000_000),
        )
        require_one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        require_one_of("optimizer", self.optimizer, ("auto", "sgd", "adamw"))
        require_one_of("schedule", self.schedule, ("cosine", "linear", "constant"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8:
    """INT8 quantisation: how ranges are chosen, and the largest allowed drop."""

    num_calib_samples: int = 512  # at most
    # Ways to choose ranges; each is tried, the best is taken.
    methods: tuple[Literal["minmax", "percentile", "entropy", "mse"], ...] = ("minmax", "percentile", "entropy", "mse")
    max_drop_pp: float = 0.5  # of the metric, against the fp32 file; above it, layers go back to float
    correct_biases: bool = True  # if that measures better

    def __post_init__(self) -> None:
        require(self, num_calib_samples=_SAMPLES, max_drop_pp=real(0, 100))
        if not self.methods:
            raise ValueError("methods must not be empty, got (); name at least one, such as 'minmax'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The ONNX export, and how far the file's outputs may be from the network's.

    Errors are relative to an output's largest magnitude.
    """

    opset: int = 20  # of the ONNX file
    # Dynamic axes other than the batch: input (or a glob pattern) -> axis -> name, {"ids": {1: "sequence"}}. Axes whose
    # size differs between calibration batches are found without it.
    dynamic_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    single_file_mib: int = 1800  # larger weights go to a file of their own; an ONNX file holds at most 2 GiB
    max_abs_error: float = 1e-3  # of an fp32 file; a file above its limit is rejected
    max_abs_error_fp16: float = 1e-2  # the same of an fp16 file
    max_abs_error_int8: float = 0.3  # the same of an int8 file
    min_agreement: float = 0.9  # fp16 and int8: lowest share of samples with the same top-1 class
    int8: Int8 = field(default_factory=Int8)

    def __post_init__(self) -> None:
        error = real(0, 1e6)
        require(
            self,
            opset=whole(18, 40),  # the installed exporter may support fewer; the export reports it
            single_file_mib=whole(0, 1_900),
            max_abs_error=error,
            max_abs_error_fp16=error,
            max_abs_error_int8=error,
            min_agreement=FRACTION,
        )
        for pattern, axes in self.dynamic_axes.items():
            require_text("dynamic_axes", pattern)
            for axis, name in axes.items():
                require_text("dynamic_axes", name)
                if not 1 <= axis <= _MAX_AXIS or not name.isidentifier() or name == "batch":
                    raise ValueError(
                        f"dynamic_axes = {{{pattern!r}: {{{axis}: {name!r}}}}} is not valid; write an axis from 1 "
                        "(axis 0 is the batch, which is always dynamic) and a name like 'sequence'"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraints:
    """Rules for every choice of widths and blocks, by names of channel groups or glob patterns of them.

    `deploypipe score` lists the names: "layer1.0.conv1", "encoder.layers.0.self_attn:heads". A "*" also matches dots.
    """

    least: dict[str, int | float] = field(default_factory=dict)  # units (from 1) or share (0.0 to 1.0) to keep at least
    least_blocks: int = 0  # removable blocks to keep at least
    uniform: tuple[str, ...] = ()  # all groups that match one pattern keep the same number of units
    tied: tuple[tuple[str, ...], ...] = ()  # all groups that match one tuple lose the same units

    def __post_init__(self) -> None:
        require(self, least_blocks=whole(0, 1_000_000))
        require_texts("uniform", self.uniform)
        for patterns in self.tied:
            require_texts("tied", patterns)
        for name, value in self.least.items():
            require_text("least", name)
            if not (1 <= value < 2**31 if isinstance(value, int) else 0 < value <= 1) or isinstance(value, bool):
                raise ValueError(
                    f"least[{name!r}] must be a number of units or a share, got {shown(value)}; write a whole number "
                    "from 1, or a share such as 0.25"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All settings that shape the compressed network. The same recipe, seed and machine give the same plan, bit for
    bit."""

    seed: int = 0  # of every random choice of a run
    # What observes, repairs, judges and trains networks. auto: a CUDA GPU if there is one, else the CPU. mps, an Apple
    # GPU, only trains: it has no float64. Timing runs where the target says.
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # What observing and repair may hold, in GiB: 6 or "6 GiB". auto: half of what is free, at most 4.5 GiB. Layers that
    # do not fit are repaired on fewer samples, at more positions each.
    memory: float | str = "auto"
    observe: Observe = field(default_factory=Observe)
    score: Scorer = field(default_factory=Mipp)
    search: Search = field(default_factory=Search)
    repair: Repair = field(default_factory=Repair)
    finetune: Finetune = field(default_factory=Finetune)
    export: Export = field(default_factory=Export)
    keep: tuple[str, ...] = ()  # glob patterns of modules that must not change
    constraints: Constraints = field(default_factory=Constraints)
    fast_dev_run: bool = False  # try every stage on a few samples, in about a minute; the result can never ship

    def __post_init__(self) -> None:
        require(self, seed=whole(0, 2**32 - 1))
        require_one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        parse_gib("memory", self.memory)
        require_texts("keep", self.keep)
