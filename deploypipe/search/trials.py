"""One trial after the other: what each is compared with, when it is stopped, and who wins. Without optuna."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from deploypipe.recipe import ObjectiveName
from deploypipe.records import Candidate, PruningPlan, SearchResult, Trial
from deploypipe.search.front import cost, costs
from deploypipe.search.looks import Results, is_certainly_worse
from deploypipe.target import Limit

NUM_FINALISTS = 5  # timed again at most
IsSettled = Callable[[Candidate, Results], bool]


class Evaluate(Protocol):
    """Judge one plan: surgery, repair, the exported file on the target's runtime, accuracy on val.

    The costs come first. `is_settled` is asked, with the candidate and all results so far, after each part of val but
    the last; once it says yes, the rest of val is left out. Returns the candidate, and the results its accuracy is the
    mean of.
    """

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]: ...


Propose = Callable[[Mapping[str, float], Sequence[Trial]], PruningPlan]  # knobs, the trials so far -> a plan


@dataclass(kw_only=True, slots=True)
class History:
    """The finished trials, and sample by sample the results of those within the budget that saw all of val."""

    trials: list[Trial]
    results: dict[int, Results]  # trial number ->

    def add(self, trial: Trial, results: Results | None) -> None:
        self.trials.append(trial)
        if results is not None:
            self.results[trial.number] = results

    def same_plan(self, plan: PruningPlan) -> Trial | None:
        return next((t for t in self.trials if t.plan.edits == plan.edits and t.plan.blocks == plan.blocks), None)

    def rival(self, candidate: Candidate, objectives: Sequence[ObjectiveName]) -> Results | None:
        """Of the most accurate trial so far that costs no more. With accuracy as the only objective costs are none."""
        own = costs(candidate, objectives)
        cheap = [
            t
            for t in self.trials
            if t.number in self.results
            and all(a <= b for a, b in zip(costs(t.candidate, objectives), own, strict=True))
        ]
        return self.results[most_accurate(cheap).number] if cheap else None


def judge_plan(
    chosen: dict[str, float],
    propose: Propose,
    evaluate: Evaluate,
    excess_of: Callable[[Candidate], dict[str, float]],
    objectives: Sequence[ObjectiveName],
    history: History,
) -> tuple[Trial, Results | None]:
    """Propose and judge the next trial: it, and its results where later trials may be compared with them."""
    number, plan = len(history.trials), propose(chosen, history.trials)
    known = history.same_plan(plan)
    if known is not None:  # other knobs, the same network: nothing new to measure
        return replace(known, number=number, knobs=chosen), None
    is_stopped = False

    def is_settled(candidate: Candidate, seen: Results) -> bool:
        nonlocal is_stopped
        rival = history.rival(candidate, objectives)
        is_over = not _is_feasible(excess_of(candidate))
        is_stopped = is_over or (rival is not None and is_certainly_worse(seen, rival))
        return is_stopped

    candidate, results = evaluate(plan, is_settled)
    excess = excess_of(candidate)
    trial = Trial(
        number=number,
        knobs=chosen,
        candidate=candidate,
        violations=excess,
        feasible=_is_feasible(excess),
        plan=plan,
        num_val_samples=len(results),
        is_stopped=is_stopped,
    )
    return trial, results if trial.feasible and not is_stopped else None


def _is_feasible(excess: Mapping[str, float]) -> bool:
    return all(value <= 0 for value in excess.values())


def violations(candidate: Candidate, dense: Candidate, limits: Mapping[str, Limit]) -> dict[str, float]:
    """Relative excess over each limit a search can judge; zero or less meets it."""
    figures = {
        "latency_p50": (candidate.latency_p50_ms, dense.latency_p50_ms),
        "peak_memory": (candidate.peak_memory_mib, dense.peak_memory_mib),
        "file_size": (candidate.file_size_mib, dense.file_size_mib),
        "params": (float(candidate.num_params), float(dense.num_params)),
        "macs": (float(candidate.num_macs), float(dense.num_macs)),
    }
    excess = {}
    for name, limit in limits.items():
        measured, reference = figures[name]
        if measured is not None and reference is not None:  # what cannot be measured here, the gate says
            excess[name] = measured / limit.absolute(reference) - 1
    return excess


def confirm(
    found: SearchResult, limit: float, measure: Callable[[PruningPlan], float], most: int = NUM_FINALISTS
) -> SearchResult:
    """The most accurate trial that is within its latency when it is timed once more.

    Of many trials near a limit, those that were timed a little too fast are within it: a winner by one measurement is
    likely one of them. limit, and what `measure` gives afresh: shares of the dense network's latency. Where none of the
    `most` most accurate holds, the one nearest to the limit is taken.
    """
    finalists = sorted((t for t in found.trials if t.feasible and not t.is_stopped), key=rank, reverse=True)
    again: dict[int, float] = {}
    for trial in finalists[:most]:
        again[trial.number] = measure(trial.plan)
        if again[trial.number] <= limit:
            break
    best = min(again, key=lambda number: (max(again[number], limit), list(again).index(number)))
    return replace(found, best=best, timed_again={str(number): ratio for number, ratio in again.items()})


def most_accurate(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=rank)


def rank(trial: Trial) -> tuple[float, float, int]:
    """Of equals on val the one that uses more of the budget is first: it has more left to lose on other data."""
    return trial.candidate.accuracy, cost(trial.candidate), -trial.number
