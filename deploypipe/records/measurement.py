"""Measurements of a file, and the machine and conditions they were taken in."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from deploypipe.records.interval import Interval
from deploypipe.records.model_files import ModelFile
from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine and software of a measurement."""

    cpu: str
    cpu_features: tuple[str, ...]
    num_cpus: int
    governor: str  # "" if the platform does not report it
    load_before: float  # one-minute load average
    memory_gib: float
    gpu: str
    system: str
    versions: dict[str, str]
    device_fingerprint: str  # equal on machines whose latencies may be compared


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineState:
    """The state of the machine at one moment. None: the platform does not report it."""

    load: float  # one-minute load average
    clock_mhz: float | None  # of the fastest processor, because idle ones are slow
    temperature_c: float | None  # of the hottest zone
    num_throttled: int | None  # times that heat slowed down a core or the package, since boot
    num_quota_throttled: int | None  # times that the control group's processor quota stopped this process
    busy_s: float | None  # processor seconds that were not idle, of all processors, since boot
    stolen_s: float | None  # processor seconds that the hypervisor gave to others
    own_s: float  # processor seconds of this process and its children
    at_s: float  # a monotonic clock, in seconds
    gpu_clock_mhz: float | None = None
    gpu_temperature_c: float | None = None
    gpu_slowdowns: Names = ()  # active reasons that slow down the GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """The conditions on the machine during a measurement."""

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
    """One model file on one target. None means 'not measured', which never passes the gate."""

    file: ModelFile
    num_params: int
    num_macs: int
    latency: Latency | None
    peak_memory_mib: float | None
    per_sample_metric: tuple[float, ...]  # of the exported file, in test order; its mean is the accuracy
    accuracy: Interval | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyHere:
    """The accuracy of both files on the machine of the run, which is not the device. No check depends on it."""

    dense: Interval
    compressed: Interval
    drop_pp: Interval  # paired: same samples, both files
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkReport:
    """The dense and the compressed file, timed interleaved in one process."""

    dense: Measurement
    compressed: Measurement
    latency_ratio: Interval | None  # compressed / dense
    accuracy_drop_pp: Interval | None  # paired: same samples, both files
    environment: Environment
    is_steady: bool  # nothing found against the timings; see `conditions` too
    notes: tuple[str, ...] = ()
    conditions: Conditions | None = None  # None: nothing was measured
    slices: dict[str, tuple[int, ...]] = field(default_factory=dict)  # numbers of test samples, by `Task.slices`
    test_data: str = ""  # hash of the test split: results on another one are not compared
    measured_at: str = ""  # ISO 8601, UTC
    accuracy_here: AccuracyHere | None = None  # where the device's own could not be measured

    def __post_init__(self) -> None:
        """Raise ValueError if the fields contradict each other, which happens only in an edited result."""
        counts = {len(m.per_sample_metric) for m in (self.dense, self.compressed) if m.per_sample_metric}
        if len(counts) > 1:
            raise ValueError(f"per_sample_metric has {min(counts)} and {max(counts)} values; measure both again")
        for name, samples in self.slices.items() if counts else ():
            if samples and not 0 <= min(samples) <= max(samples) < min(counts):
                raise ValueError(f"slices: {name!a} holds a number that no test sample has; measure again")
        try:
            _ = self.measured_at and datetime.fromisoformat(self.measured_at)
        except ValueError:
            raise ValueError(f"measured_at = {self.measured_at[:40]!a} is not a time; measure again") from None

    @property
    def doubts(self) -> str:
        """Why the timings of this report cannot decide anything; "" if they can."""
        if self.conditions and self.conditions.verdict != "steady":
            reasons = "; ".join(self.conditions.reasons) or "no reason was recorded"
            return f"the timings were not steady: the machine was {self.conditions.verdict}: {reasons}"
        if not self.is_steady:
            return f"the timings were not steady: {'; '.join(self.notes) or 'no reason was recorded'}"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineComparison:
    """A run's file compared with that of a released bundle. None means 'not compared', which never passes the gate."""

    name: str
    latency_ratio: Interval | None  # this run's file / the bundle's, timed interleaved
    accuracy_drop_pp: Interval | None  # paired: same test samples, both files
    notes: tuple[str, ...] = ()
    latency_doubts: str = ""  # why the measured ratio cannot decide anything
