"""The decision on a release, and its basis."""

from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite

from deploypipe.records.interval import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The inputs of a run, as hashes of values."""

    model: str = ""
    data: str = ""  # see `split_fingerprints.fingerprint`
    source: str = ""  # of the pipeline's file
    packages: dict[str, str] = field(default_factory=dict)  # name -> version
    computed_on: str = ""  # the device that the recipe's `device` stood for


class Status(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"


class Verdict(StrEnum):
    SHIP = "SHIP"
    HOLD = "HOLD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiver:
    """A person's decision that one check need not pass, for a limited time."""

    check: str  # name of a check
    reason: str
    by: str
    granted: str  # ISO dates; in force from the first to the last day, both included
    expires: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    status: Status
    measured: float | None
    interval: Interval | None
    limit: float | None  # in `unit`; relative budgets are converted to absolute ones
    unit: str
    reason: str
    waiver: Waiver | None = None  # in force: the check does not hold the release

    @property
    def is_settled(self) -> bool:
        """Whether it passed or is waived."""
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
