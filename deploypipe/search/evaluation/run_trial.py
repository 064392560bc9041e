"""Run one trial: evaluate its plan, compare it with earlier trials, and stop it early. Independent of Optuna."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deploypipe.files.hashing import digest
from deploypipe.recipe import ObjectiveName
from deploypipe.records import Candidate, PruningPlan, Trial
from deploypipe.search.evaluation.early_stopping import is_certainly_worse
from deploypipe.search.pareto import cost, costs
from deploypipe.search.sample_results import Results

IsSettled = Callable[[Candidate, Results], bool]


class Evaluate(Protocol):
    """Evaluate one plan: surgery, repair, the exported file on the target's runtime, accuracy on val.

    The costs come first. `is_settled` is called with the candidate and all results so far, after each part of val but
    the last. If it returns True, the rest of val is left out. Returns the candidate, and the results whose mean is its
    accuracy.
    """

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]: ...


Propose = Callable[[Mapping[str, float], Sequence[Trial]], PruningPlan]  # knobs, the trials so far -> a plan


@dataclass(kw_only=True, slots=True)
class History:
    """The trials that a new trial depends on, with the results of those within the budget that saw all of val."""

    trials: list[Trial]
    results: dict[int, Results]  # trial number ->

    def rival(self, candidate: Candidate, objectives: Sequence[ObjectiveName]) -> Results | None:
        """Return the results of the most accurate trial so far that costs no more; None if there is none.

        If accuracy is the only objective, costs do not count.
        """
        own = costs(candidate, objectives)
        cheap = [
            t
            for t in self.trials
            if t.number in self.results
            and all(a <= b for a, b in zip(costs(t.candidate, objectives), own, strict=True))
        ]
        return self.results[most_accurate(cheap).number] if cheap else None


def evaluate_plan(
    number: int,
    chosen: dict[str, float],
    plan: PruningPlan,
    evaluate: Evaluate,
    excess_of: Callable[[Candidate], dict[str, float]],
    objectives: Sequence[ObjectiveName],
    history: History,
) -> tuple[Trial, Results | None]:
    """Evaluate the plan that the knobs produced. Return the trial, and its results if later trials may be compared."""
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


def is_same_network(plan: PruningPlan, other: PruningPlan) -> bool:
    """Whether both make the same network."""
    return plan.edits == other.edits and plan.blocks == other.blocks


def network_key(plan: PruningPlan) -> str:
    """A digest that is equal for all plans that make the same network."""
    return digest([plan.edits, plan.blocks])


def _is_feasible(excess: Mapping[str, float]) -> bool:
    return all(value <= 0 for value in excess.values())


def most_accurate(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=rank)


def rank(trial: Trial) -> tuple[float, float, int]:
    """Sort key. If two trials are equal on val, the one that uses more of the budget wins: it has more capacity left
    for other data."""
    return trial.candidate.accuracy, cost(trial.candidate), -trial.number
