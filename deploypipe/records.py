"""Every value that crosses a stage boundary. Data only: no torch, no behaviour beyond arithmetic on own fields."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from math import isfinite
from typing import Literal, TypeAlias

# "in" or "out" of a layer; "pos_embed.2", an axis of one of a module's tensors; "@num_heads", an attribute that counts.
Side: TypeAlias = str
GroupKind: TypeAlias = Literal["channels", "heads", "head_dims"]
Names: TypeAlias = tuple[str, ...]  # of blocks, in execution order


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One step of a long piece of work, for whoever shows progress."""

    stage: str
    done: int = 0
    total: int = 0  # 0: length unknown
    message: str = ""


Progress: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default listener: shows nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval around a measured value, in the value's own unit."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


# --- what can be removed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One side of one module that a channel group shares.

    `units[i]` are the module's own indices that belong to the group's unit i (several after a flatten).
    """

    module: str
    side: Side
    units: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelGroup:
    """Channels that can only be removed together: producers, normalisations between, and all consumers."""

    name: str  # the module that produces the channels, as in `named_modules()`; "MODULE:heads" for attention heads
    num_units: int
    members: tuple[Member, ...]
    params_per_unit: float  # saved by removing one unit from the dense network
    macs_per_unit: float  # multiply-accumulates of one sample, likewise
    kind: GroupKind = "channels"

    def step(self, channel_multiple: int) -> int:
        """Units that widths come in multiples of: a target asks for multiples of channels, not of heads."""
        return channel_multiple if self.kind == "channels" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A module whose input and output agree, so that it can be replaced by the identity."""

    name: str
    params: int
    macs: int
    # What it gives after its output, where that is a tuple: the parameter whose argument it hands on, or "".
    returns: Names | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """A structure that cannot be removed, and why."""

    name: str
    kind: GroupKind | Literal["block", "weights"]  # "weights": those of a module with no outputs of its own (a norm)
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConstraints:
    """What every choice of widths and blocks must hold to: the recipe's constraints with patterns made names."""

    least: dict[str, int] = field(default_factory=dict)  # by group: units that stay
    uniform: tuple[tuple[str, ...], ...] = ()  # groups with one width; disjoint, of one dense width, kind and least
    least_blocks: int = 0  # of `Structures.blocks`, how many stay


@dataclass(frozen=True, kw_only=True, slots=True)
class Structures:
    """What can be removed from one network, and what cannot."""

    model_fingerprint: str
    groups: tuple[ChannelGroup, ...]  # in execution order
    blocks: tuple[Block, ...]  # in execution order, not nested in each other
    frozen: tuple[Frozen, ...]
    num_params: int
    num_macs: int  # one sample
    constraints: ResolvedConstraints = field(default_factory=ResolvedConstraints)

    def least_width(self, group: ChannelGroup, channel_multiple: int) -> int:
        """The narrowest width that `group` may be brought to, in whole steps; its dense width at most."""
        step = group.step(channel_multiple)
        return min(-(-self.constraints.least.get(group.name, 1) // step) * step, group.num_units)


# --- scores and plans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """One finite score for every unit of every group; higher = keep. Comparable within a group only."""

    scorer: str
    channels: dict[str, tuple[float, ...]]
    suggested: dict[str, int] = field(default_factory=dict)  # widths that the method itself would leave, if it has any
    reasons: dict[str, str] = field(default_factory=dict)  # groups that another method had to score, and why
    is_cumulative: bool = False  # a score is all that was lost when its unit went, not the unit's own share
    stability: dict[str, float] = field(default_factory=dict)  # rank correlation between halves of the samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Indices removed from one side of one module, in the dense module's numbering."""

    module: str
    side: Side
    removed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCut:
    """Units removed from one channel group."""

    group: str
    asked: int  # units asked for, before widths were brought to the target's steps
    removed: tuple[int, ...]
    num_units: int
    reason: str = ""  # why `asked` and `removed` differ


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningPlan:
    """All that is needed to turn the dense network into the pruned one again: pure data, no tracing, no weights."""

    model_fingerprint: str
    cuts: tuple[GroupCut, ...]
    edits: tuple[Edit, ...]
    blocks: tuple[str, ...]  # replaced by the identity
    returns: dict[str, Names] = field(default_factory=dict)  # of blocks that give a tuple, as in `Block`


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRow:
    """Asked against realised for one structure."""

    name: str
    kind: GroupKind | Literal["block"]
    width_before: int
    asked: int  # width asked for
    realised: int  # width in the new network
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    rows: tuple[PruneRow, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    notes: Names = ()  # what became of the network's own config, where it has one


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairRow:
    """One layer's relative squared error against the dense network, before and after its weights were solved."""

    module: str
    error_before: float | None = None  # None where it was not measured
    error_after: float | None = None
    reason: str = ""  # why it was left as it was, when it was


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    rows: tuple[RepairRow, ...]
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOutcome:
    """Surgery and repair of the chosen plan."""

    prune: PruneReport
    repair: RepairReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What `observe` saw, beside the moments it keeps as tensors."""

    num_samples: int
    skipped: dict[str, str]  # consumers without moments, and why


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRanking:
    """One finite importance for every removable block; higher = keep. Comparable within one ranking only."""

    scorer: str
    importance: dict[str, float]
    clusters: tuple[Names, ...] = ()  # blocks that do much the same, where the method says so


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRow:
    """One decision of the loop."""

    iteration: int
    stride: int
    clusters: tuple[Names, ...]
    removed: Names  # what was tried, from the best network so far
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
class GroupSummary:
    """One group as its scores see it."""

    name: str
    num_units: int
    kept_information: tuple[float, ...]  # share that the best 0, 1, ..., num_units units keep
    redundant: tuple[int, ...]  # units that can go while each of the summary's `shares` stays
    suggested: int | None
    stability: float | None
    null: float | None  # information found in shuffled data, as a share of that in the data
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """How much of a network is redundant, by one scorer, and which of its blocks do alike."""

    scorer: str
    num_samples: int
    shares: tuple[float, ...]  # of the information
    groups: tuple[GroupSummary, ...]
    shaky: tuple[str, ...]  # groups whose ranking changes between halves of the samples
    samples_wanted: int | None  # that would settle them; None where nothing is shaky
    block_names: tuple[str, ...]
    block_cka: tuple[tuple[float, ...], ...]
    clusters: tuple[tuple[str, ...], ...]  # blocks whose outputs are alike, in order (arXiv:2408.13482)


# --- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """Measured harm of cutting one structure alone: `losses[i]` when `kept[i]` units stay, after repair."""

    name: str
    kind: Literal["channels", "block"]
    kept: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    curves: tuple[LossCurve, ...]
    num_samples: int
    block_importance: dict[str, float] = field(default_factory=dict)  # by another measure than the loss; higher = keep


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How many units of which groups, and which blocks, a network lacks: all that decides its latency."""

    removed: dict[str, int]  # by group
    blocks: Names


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedCut:
    """A network and its measured latency, as a share of the dense fp32 file's."""

    cut: Cut
    ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedNetworks:
    """What the latency model learns from: networks timed on the target before the search."""

    rows: tuple[TimedCut, ...]
    precision: str  # of their files
    seconds: float
    exported: dict[str, int] = field(
        default_factory=dict
    )  # why files could not be cut out of the dense one -> of how many


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyFit:
    """What the latency model said of the networks that were timed, each before it knew that one's time."""

    predicted: tuple[float, ...]  # shares of the dense fp32 file's latency
    measured: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What a search can come to, found before its first trial."""

    least: dict[str, float]  # by budget: the smallest share of the dense network's figure
    log10_choices: float  # of widths and blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What one plan turned out to be, judged after repair and before fine-tuning."""

    accuracy: float
    latency_p50_ms: float | None  # None: the target cannot be measured on the machine that searched
    peak_memory_mib: float | None  # None: no budget asks for it
    file_size_mib: float
    num_params: int
    num_macs: int
    measured_by: str = ""  # of many workers: who took the latency, when and in what state of the machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    number: int
    knobs: dict[str, float]
    candidate: Candidate
    violations: dict[str, float]  # budget name -> relative excess; <= 0 meets the budget
    feasible: bool
    plan: PruningPlan
    num_val_samples: int = 0  # that its accuracy is the mean of; 0: judged when searches did not note it
    is_stopped: bool = False  # before all of val: over budget, or certainly worse than a trial before it
    judged_by: str = ""  # of many workers: host and process
    narrowed_from: int | None = None  # number of the trial that this one is a faster version of


FEWEST_FOR_IMPORTANCES = 20  # trials within the budget: the best quarter, which knobs are told from, is five


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    dense: Candidate  # what the trials are compared with, judged on the same split
    trials: tuple[Trial, ...]
    best: int  # index into `trials`
    front: tuple[int, ...] = ()  # numbers of the feasible trials that none beats in accuracy and in cost at once
    importances: dict[str, float] = field(default_factory=dict)  # knob -> share; empty where trials are too few
    timed_again: dict[str, float] = field(default_factory=dict)  # number of a trial -> share of the dense latency
    finalists: tuple[int, ...] = ()  # numbers of trials, the most accurate first
    tuned: dict[str, float] = field(default_factory=dict)  # number of a finalist -> on val after a short training
    reach: Reach | None = None
    latency_fit: LatencyFit | None = None  # None where nothing was timed


# --- training, files, measurements ------------------------------------------------------------------------------------


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
    chosen_epoch: int  # the last that is not worse on val than the best; 0 means the training was rolled back
    reason: str = ""
    precision: str = ""  # of the arithmetic: "bf16" or "fp32"
    notes: tuple[str, ...] = ()  # what a reader should know of it, such as batches that were left out


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file, by what it must hold."""

    name: str  # without a folder
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far outputs are from those expected, over all samples; each figure that of the worst output."""

    max_abs_error: float  # relative to the largest magnitude of the same output
    mean_abs_error: float  # likewise
    cosine: float  # of each output as one long vector; 1: same direction
    top1_agreement: float | None  # share of samples, for a first output (n, classes); else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    path: str  # relative to the run folder
    sha256: str
    size_bytes: int  # with the files in `data`
    precision: str
    opset: int
    max_abs_error: float  # against eager, on real batches
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    data: tuple[FileEntry, ...] = ()  # weights too large for one file, beside it; to be moved with it
    parity: Parity | None = None  # against eager, on real batches
    from_dense: Parity | None = None  # the network itself against the dense one, both in eager torch
    tested_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # dynamic axis -> least, largest in `parity`


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateFile:
    """The fp32 file of a pruned network, made from the template of the dense one."""

    path: str  # relative to the folder it is in
    size_bytes: int
    reason: str = ""  # why it had to be exported instead


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatLayer:
    """A node that a conversion left in fp32."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What one way to choose ranges came to, with every layer in 8 bits, on samples that were not calibrated with."""

    method: str
    mean_abs_error: float  # against the fp32 file, as in `Parity`
    accuracy: float | None  # None where there was nobody to judge


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A file in another precision than fp32, and how it came about."""

    file: ModelFile  # its errors are against the fp32 file, on real samples
    num_layers: int  # nodes that could be asked to change: all that compute (fp16); convolutions and products (int8)
    num_converted: int
    kept_float: tuple[FloatLayer, ...]
    runtime: str = ""  # whose recipe int8 followed
    # What an int8 file is approved for. "exact": kernels that add 8-bit products in 32 bits (x86 with VNNI, ARM, GPUs).
    # "any": its weights have 7 bits, so that kernels that add pairs in 16 bits (x86 without VNNI) do not saturate.
    int8_arithmetic: Literal["", "exact", "any"] = ""
    num_calib_samples: int = 0
    method: str = ""  # of `calibrations`, the one chosen
    calibrations: tuple[Calibration, ...] = ()
    is_bias_corrected: bool = False
    accuracy_fp32: float | None = None  # by the same judge as `accuracy`
    accuracy: float | None = None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionRow:
    """One precision of the target: the file, or why there is none."""

    precision: str
    file: ModelFile | None
    conversion: Converted | None = None  # None for fp32
    latency_ratio: Interval | None = None  # to fp32, interleaved; None where it was not timed
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionChoice:
    """All precisions of the target for one network, and the one that ships."""

    rows: tuple[PrecisionRow, ...]  # fp32 first
    chosen: str
    reason: str

    @property
    def row(self) -> PrecisionRow:
        """The one that ships."""
        return next(row for row in self.rows if row.precision == self.chosen)

    @property
    def file(self) -> ModelFile:
        """Its file, which it has."""
        return next(row.file for row in self.rows if row.precision == self.chosen and row.file)


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """Real samples, and what the model files of a folder answer to them: for `deploypipe verify`."""

    files: tuple[FileEntry, ...]  # all that the folder has to hold, golden.json last
    models: tuple[str, ...]
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKey:
    """What an engine was built with and for; it runs where all of it fits."""

    library: str  # tensorrt, tensorrt-rtx
    version: str
    compute_capabilities: Names  # "8.9"; one, unless it was built ahead of time for several
    driver: str  # of the GPU it was built on, or the Jetson's L4T; "" where it was built ahead of time
    platform: str  # "Linux x86_64"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One step of an engine, and the ONNX nodes that went into it."""

    name: str
    kind: str
    output_types: Names
    nodes: Names


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """A TensorRT engine. Executable code: only what has this hash is loaded, and only where `key` fits."""

    path: str  # beside this record
    sha256: str
    size_bytes: int
    onnx_sha256: str  # of the file to rebuild it from
    key: EngineKey
    precision: str  # of the ONNX file
    flags: Names  # BuilderFlags in force, the library's own defaults among them
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # dynamic inputs: min, opt, max
    build_seconds: float
    layers: tuple[EngineLayer, ...]
    layers_source: str  # where the table comes from, or why it is empty
    log: str  # name of the builder's log, beside this record


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine and the software that a figure was taken on."""

    cpu: str
    cpu_features: tuple[str, ...]
    num_cpus: int
    governor: str  # "" where the platform does not tell
    load_before: float  # one-minute load average
    memory_gib: float
    gpu: str
    system: str
    versions: dict[str, str]
    device_fingerprint: str  # equal on machines whose latencies may be compared


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineState:
    """What the machine did at one moment. None where the platform does not tell."""

    load: float  # one-minute load average
    clock_mhz: float | None  # of the fastest processor: those that idle are slow by themselves
    temperature_c: float | None  # of the hottest zone
    num_throttled: int | None  # times that heat slowed a core or the package down, since boot
    num_quota_throttled: int | None  # times that the control group's processor quota stopped this process
    busy_s: float | None  # processor seconds that were not idle, of all processors, since boot
    stolen_s: float | None  # processor seconds that the hypervisor gave to others
    own_s: float  # processor seconds of this process and its children
    at_s: float  # clock, in seconds from anywhere
    gpu_clock_mhz: float | None = None
    gpu_temperature_c: float | None = None
    gpu_slowdowns: Names = ()  # reasons in force that slow the GPU down


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What the machine was like while something was measured."""

    before: MachineState
    after: MachineState
    other_cpus: float | None  # processors that other processes kept busy, on average
    stolen_share: float | None  # of the time of all processors
    verdict: Literal["steady", "throttled", "noisy"]
    reasons: Names


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Timed runs of one file."""

    batch_size: int
    num_threads: int
    samples_ms: tuple[float, ...]
    p50_ms: Interval
    p90_ms: float | None  # None below 64 samples
    p99_ms: float | None  # None below 662 samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One model file on one target. None is 'not measured', which no gate lets pass."""

    file: ModelFile
    num_params: int
    num_macs: int
    latency: Latency | None
    peak_memory_mib: float | None
    per_sample_metric: tuple[float, ...]  # of the exported file, in test order; its mean is the accuracy
    accuracy: Interval | None

    @property
    def figures(self) -> dict[str, float | None]:
        """What budgets limit, by the names they have there: ms, MiB, counts."""
        return {
            "latency_p50": self.latency.p50_ms.value if self.latency else None,
            "peak_memory": self.peak_memory_mib,
            "file_size": self.file.size_bytes / 2**20,
            "params": self.num_params,
            "macs": self.num_macs,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkReport:
    """Dense and compressed, timed interleaved in one process."""

    dense: Measurement
    compressed: Measurement
    latency_ratio: Interval | None  # compressed / dense
    accuracy_drop_pp: Interval | None  # paired: same samples, both files
    environment: Environment
    is_steady: bool  # nothing speaks against the timings; see `conditions` too
    notes: tuple[str, ...] = ()
    conditions: Conditions | None = None  # None: nothing was measured
    slices: dict[str, tuple[int, ...]] = field(default_factory=dict)  # numbers of test samples, by `Task.slices`
    test_data: str = ""  # hash of the test split: results on another one are not compared
    measured_at: str = ""  # ISO 8601, UTC

    def __post_init__(self) -> None:
        """ValueError for what does not fit together: a result that was edited, since no run writes that."""
        counts = {len(m.per_sample_metric) for m in (self.dense, self.compressed) if m.per_sample_metric}
        if len(counts) > 1:
            raise ValueError(f"per_sample_metric has {min(counts)} and {max(counts)} values; measure both again")
        for name, samples in self.slices.items() if counts else ():
            if samples and not 0 <= min(samples) <= max(samples) < min(counts):
                raise ValueError(f"slices: {name!a} holds a number that no test sample has; measure again")
        try:
            _ = self.measured_at and datetime.fromisoformat(self.measured_at)
        except ValueError:
            raise ValueError(f"measured_at = {self.measured_at[:40]!a} is no time; measure again") from None

    @property
    def doubts(self) -> str:
        """Why no timing of this report decides anything; "" where nothing speaks against them."""
        if self.conditions and self.conditions.verdict != "steady":
            told = "; ".join(self.conditions.reasons) or "no reason was recorded"
            return f"the timings were not steady: the machine was {self.conditions.verdict}: {told}"
        if not self.is_steady:
            return f"the timings were not steady: {'; '.join(self.notes) or 'no reason was recorded'}"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineComparison:
    """A run's file against that of a bundle released before. None is 'not compared', which no gate lets pass."""

    name: str
    latency_ratio: Interval | None  # this run's file / the bundle's, timed interleaved
    accuracy_drop_pp: Interval | None  # paired: same test samples, both files
    notes: tuple[str, ...] = ()
    latency_doubts: str = ""  # why the ratio decides nothing, though it was measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a run began with, by hashes of values."""

    model: str = ""
    data: str = ""  # see `data.fingerprint`
    source: str = ""  # of the pipeline's file
    packages: dict[str, str] = field(default_factory=dict)  # name -> version


class Status(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"


class Verdict(StrEnum):
    SHIP = "SHIP"
    HOLD = "HOLD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """Somebody's word that one check need not pass, for a time."""

    check: str  # name of a check
    reason: str
    by: str
    granted: str  # ISO dates; counts from the first to the last, both included
    expires: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    status: Status
    measured: float | None
    interval: Interval | None
    limit: float | None  # in `unit`, relative budgets already turned absolute
    unit: str
    reason: str
    waiver: Waiver | None = None  # in force: the check does not hold the release

    @property
    def is_settled(self) -> bool:
        """Passed, or waived."""
        return self.status is Status.PASS or self.waiver is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class GateDecision:
    verdict: Verdict
    checks: tuple[Check, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    stage: str
    seconds: float
    was_cached: bool

    def __post_init__(self) -> None:
        if not isfinite(self.seconds):
            raise ValueError(f"seconds = {self.seconds} of {self.stage!a} is not finite; run it again")
