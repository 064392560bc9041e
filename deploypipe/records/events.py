"""Events that a run reports while it works, for displays and trackers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from deploypipe.records.measurement import BenchmarkReport
from deploypipe.records.release import GateDecision
from deploypipe.records.search import Trial
from deploypipe.records.training import EpochLog


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The stages that this run still expects, in order. A later plan replaces an earlier one."""

    stages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A stage begins."""

    stage: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One step is done, of a stage or of work inside one."""

    stage: str
    done: int = 0
    total: int = 0  # 0: length unknown
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A stage was computed."""

    stage: str
    seconds: float | None = field(default=None, compare=False)  # that it took; None: not a stage of the run folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached:
    """A stage was read from the run folder: it had been computed before."""

    stage: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something worth knowing that is as it should be."""

    stage: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Warned:
    """Something that the user may have to act on."""

    stage: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochEnded:
    """One epoch of a fine-tuning is done; epoch 0 is the state before the first step."""

    stage: str
    epoch: EpochLog
    trial: int | None = None  # of a finalist


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A trial of the search is done, in this process or in another one, now or before this run was resumed."""

    stage: str
    trial: Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    """The run is over, with these final figures and this decision."""

    stage: str
    report: BenchmarkReport
    decision: GateDecision


Event: TypeAlias = Planned | Started | Progress | Finished | Cached | Note | Warned | EpochEnded | TrialEnded | RunEnded
Notify: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default listener: shows nothing."""


@contextmanager
def reported(notify: Notify, stage: str) -> Iterator[None]:
    """Report that `stage` starts with the block and is finished with it; an error leaves it unfinished."""
    notify(Started(stage=stage))
    yield
    notify(Finished(stage=stage))


def as_part_of(stage: str, notify: Notify) -> Notify:
    """A listener for work inside `stage`, whose events count as those of the stage."""
    return lambda event: notify(event if isinstance(event, Planned) else replace(event, stage=stage))
