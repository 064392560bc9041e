"""Records of what `deploypipe bench` measured. None is 'not measured', and `FileFigures.missing` says why."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from deploypipe.records import Conditions, Environment, Interval
from deploypipe.runtimes.bound_runs import RunParts

Comparison: TypeAlias = Literal["faster", "slower", "no difference", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputArray:
    """One input that the file was run on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str  # "random", or the file it was read from


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyFigures:
    """Runs of one batch, once warm."""

    p50_ms: Interval
    p90_ms: Interval | None  # None below 64 samples
    p99_ms: Interval | None  # None below 662 samples
    throughput: float  # samples a second at the median
    block: int  # runs between two openings of the file
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """Start of a new process, with the file in the page cache: medians over `repeats` processes."""

    import_ms: float  # of the runtime, the same for any file
    load_ms: float
    first_run_ms: float
    total_ms: tuple[float, float, float]  # of loading and the first run: least, median, most
    repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """One operator of the graph as the runtime optimised it."""

    name: str
    op_type: str
    provider: str
    time_us: float  # median over the profiled runs
    share: float  # of all operators


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One batch size or number of threads."""

    batch_size: int
    num_threads: int
    p50_ms: Interval | None  # None: not measured
    throughput: float | None  # samples a second
    reason: str = ""  # why it was not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Energy of the whole processor, GPU or board that `source` measures, other processes included."""

    energy_mj: float  # per run of one batch, the idle draw included
    power_w: float
    idle_power_w: float
    source: str
    num_runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFigures:
    """One file on the target."""

    path: str
    sha256: str
    size_bytes: int  # with weights in a second file
    latency: LatencyFigures | None = None
    gpu: RunParts | None = None  # medians of the parts of a run; None for a processor
    peak_memory_mib: float | None = None  # of a process; of the GPU's memory if it runs there
    cold_start: ColdStart | None = None
    layers: tuple[LayerTime, ...] = ()  # the slowest first
    batches: tuple[SweepPoint, ...] = ()
    threads: tuple[SweepPoint, ...] = ()
    energy: Energy | None = None
    missing: dict[str, str] = field(default_factory=dict)  # part -> why there is no figure


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One file, or two that were timed interleaved."""

    target: str
    runtime: str
    batch_size: int
    num_threads: int
    inputs: tuple[InputArray, ...]
    file: FileFigures
    against: FileFigures | None
    latency_ratio: Interval | None  # file / against
    comparison: Comparison | None
    conditions: Conditions
    environment: Environment
    notes: tuple[str, ...] = ()
