"""Loss curves, timed networks, trials and the winner of a search."""

from dataclasses import dataclass, field
from typing import Literal

from deploypipe.records.plan import PruningPlan
from deploypipe.records.structures import Names


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

    def __repr__(self) -> str:
        kinds = [curve.kind for curve in self.curves]
        head = (
            f"Curves: {kinds.count('channels')} groups and {kinds.count('block')} blocks, {self.num_samples:,} samples"
        )
        ranked = sorted(self.curves, key=lambda curve: max(curve.losses))
        ends = [f"  {word}: {curve.name}, loss {max(curve.losses):.3g}" for word, curve in _ends_of(ranked)]
        return "\n".join([head, *ends])


def _ends_of(ranked: list[LossCurve]) -> list[tuple[str, LossCurve]]:
    return [("least harm at its narrowest", ranked[0]), ("most harm", ranked[-1])] if ranked else []


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
class Feasibility:
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


MIN_TRIALS_FOR_IMPORTANCES = 20  # trials within the budget: the best quarter, which knobs are told from, is five


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
    feasibility: Feasibility | None = None
    latency_fit: LatencyFit | None = None  # None where nothing was timed

    def __repr__(self) -> str:
        within = sum(trial.feasible for trial in self.trials)
        lines = [
            f"SearchResult: {len(self.trials)} trials, {within} within the budget",
            f"  dense: {_shown(self.dense)}",
        ]
        if self.trials:
            best = self.trials[self.best]
            lines.append(f"  best, trial {best.number}: {_shown(best.candidate)}")
        return "\n".join(lines)


def _shown(candidate: Candidate) -> str:
    latency = f", {candidate.latency_p50_ms:.4g} ms" if candidate.latency_p50_ms is not None else ""
    counts = f"{candidate.num_params:,} parameters, {candidate.num_macs:,} multiply-accumulates"
    return f"accuracy {candidate.accuracy:.4f}{latency}, {counts}"
