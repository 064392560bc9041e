"""Loss curves, timed networks, trials and the winner of a search."""

from dataclasses import dataclass, field
from typing import Literal

from deploypipe.records.plan import PruningPlan
from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """The loss of cutting one structure alone: `losses[i]` if `kept[i]` units stay, after repair."""

    name: str
    kind: Literal["channels", "block"]
    kept: tuple[int, ...]
    losses: tuple[float, ...]
    predicted: tuple[int, ...] = ()  # those of `kept` whose loss is predicted from the measured ones


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoints:
    """How many losses of the loss curves are measured, on how many samples, and how many are predicted from them."""

    num_measured: int
    num_predicted: int
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """The loss curves of all groups and blocks."""

    curves: tuple[LossCurve, ...]
    num_samples: int
    block_importance: dict[str, float] = field(default_factory=dict)  # by another measure than the loss; higher = keep

    @property
    def points(self) -> CurvePoints:
        """The numbers of losses; the dense width, whose loss is zero, is left out."""
        total = sum(len(curve.kept) - (curve.kind == "channels") for curve in self.curves)
        predicted = sum(len(curve.predicted) for curve in self.curves)
        return CurvePoints(num_measured=total - predicted, num_predicted=predicted, num_samples=self.num_samples)

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
    """The parts cut from a network: the number of units by group, and blocks. They alone decide its latency."""

    removed: dict[str, int]  # by group
    blocks: Names


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedCut:
    """A network and its measured latency, as a share of the dense fp32 file's."""

    cut: Cut
    ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedNetworks:
    """Networks timed on the target before the search, for the latency model to learn from."""

    rows: tuple[TimedCut, ...]
    precision: str  # of their files
    seconds: float
    # Why files were exported, and not cut from the template -> the number of files.
    exported: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyFit:
    """The latency model's prediction of each timed network, fitted without that network's time."""

    predicted: tuple[float, ...]  # shares of the dense fp32 file's latency
    measured: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Feasibility:
    """The lowest reachable value of every budget, found before the search's first trial."""

    least: dict[str, float]  # by budget: the smallest share of the dense network's figure
    log10_choices: float  # of widths and blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """The figures of one plan's network, after repair and before fine-tuning."""

    accuracy: float
    latency_p50_ms: float | None  # None: the target cannot be measured on the machine that searched
    peak_memory_mib: float | None  # None: neither a budget nor an objective asks for it
    file_size_mib: float
    num_params: int
    num_macs: int
    measured_by: str = ""  # with several workers: who measured the latency, when and in what state of the machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate of a search: its knobs, plan and figures."""

    number: int
    knobs: dict[str, float]
    candidate: Candidate
    violations: dict[str, float]  # budget name -> relative excess; <= 0 meets the budget
    feasible: bool
    plan: PruningPlan
    num_val_samples: int = 0  # whose mean is its accuracy
    is_stopped: bool = False  # before all of val: over budget, or certainly worse than an earlier trial
    evaluated_by: str = ""  # with several workers: host and process
    narrowed_from: int | None = None  # number of the trial that this one is a faster version of


MIN_TRIALS_FOR_IMPORTANCES = 20  # trials within the budget: importances compare the best quarter, five, with the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """All trials of a search, and its winner."""

    dense: Candidate  # the dense network, evaluated on the same split
    trials: tuple[Trial, ...]
    best: int  # index into `trials`
    winner: int | None = None  # the search's own choice, where another trial was asked for: `best`
    pareto_front: tuple[int, ...] = ()  # numbers of the feasible trials that no other beats in accuracy and costs
    importances: dict[str, float] = field(default_factory=dict)  # knob -> share; empty if trials are too few
    timed_again: dict[str, float] = field(default_factory=dict)  # number of a trial -> share of the dense latency
    finalists: tuple[int, ...] = ()  # numbers of trials, the most accurate first
    tuned: dict[str, float] = field(default_factory=dict)  # number of a finalist -> accuracy on val after a training
    feasibility: Feasibility | None = None
    latency_fit: LatencyFit | None = None  # None if nothing was timed
    curve_points: CurvePoints | None = None  # of the loss curves that it chose by

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
