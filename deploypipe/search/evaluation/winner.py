"""Pick the winner: time the best trials again, then fine-tune those still within budget for a short time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from deploypipe.records import PruningPlan, SearchResult, Trial
from deploypipe.search.allocation.limits import timed_ms
from deploypipe.search.evaluation.run_trial import is_same_network, rank

MAX_TIMED_AGAIN = 5
_MAX_NARROWED = 5
_LEEWAY = 0.99  # a narrower network aims at this part of its limit: its latency is a measurement too


class Narrow(Protocol):
    """Return a faster version of `trial`, numbered `number`.

    share: the limit of its latency, as a share of the dense network's.
    """

    def __call__(self, trial: Trial, number: int, share: float) -> Trial: ...


def confirm_finalists(
    found: SearchResult, limit: float, measure: Callable[[PruningPlan], float], narrow: Narrow, wanted: int = 1
) -> SearchResult:
    """Return `found` with the `wanted` most accurate trials that meet the latency limit when timed again as finalists.

    Of many trials near a limit, those whose time was measured a little too short meet it. So the winner by one
    measurement is likely one of them. limit, and what `measure` returns: shares of the dense network's latency.

    At most `MAX_TIMED_AGAIN` trials are timed. If none meets the limit, the most accurate one is narrowed until it
    does. If that fails too, the network nearest to the limit is taken.
    """
    again: dict[int, float] = {}
    for trial in _distinct(found)[:MAX_TIMED_AGAIN]:
        again[trial.number] = measure(trial.plan)
        if sum(ratio <= limit for ratio in again.values()) == wanted:
            break
    if min(again.values()) > limit:
        found, again = _narrowed(found, again, limit, measure, narrow)
    nearest = min(again, key=lambda number: (max(again[number], limit), list(again).index(number)))
    held = tuple(number for number, ratio in again.items() if ratio <= limit) or (nearest,)
    timed_again = {str(number): ratio for number, ratio in again.items()}
    return replace(found, best=held[0], finalists=held, timed_again=timed_again)


def with_finalists(found: SearchResult, wanted: int) -> SearchResult:
    """Return `found` with the `wanted` most accurate trials as finalists, for searches without a latency limit."""
    return replace(found, finalists=tuple(trial.number for trial in _distinct(found)[:wanted]))


def with_tuned(found: SearchResult, accuracies: Mapping[str, float]) -> SearchResult:
    """Return `found` with the finalist that was best after a short training as the winner.

    accuracies: on val, by trial number.
    """
    best = max(found.finalists, key=lambda number: (accuracies[str(number)], rank(found.trials[number])))
    return replace(found, best=best, tuned=dict(accuracies))


def _narrowed(
    found: SearchResult,
    again: Mapping[int, float],
    limit: float,
    measure: Callable[[PruningPlan], float],
    narrow: Narrow,
) -> tuple[SearchResult, dict[int, float]]:
    """Add narrower and narrower versions of the most accurate trial that was timed again, until one meets the limit."""
    again = dict(again)
    trial, first = found.trials[next(iter(again))], len(found.trials)
    for number in range(first, first + _MAX_NARROWED):
        # The next network is sought by the latency that the search measured, scaled by how much the limit was missed.
        share = timed_ms(trial.candidate) / timed_ms(found.dense) * min(1.0, limit / again[trial.number]) * _LEEWAY
        narrower = narrow(trial, number, share)
        if not narrower.feasible or any(is_same_network(narrower.plan, known.plan) for known in found.trials[first:]):
            break  # there is no narrower one
        trial = replace(narrower, narrowed_from=trial.number)
        found = replace(found, trials=(*found.trials, trial))
        known = [ratio for other, ratio in again.items() if is_same_network(found.trials[other].plan, trial.plan)]
        again[number] = max(known) if known else measure(trial.plan)  # repeated often enough, any network would pass
        if again[number] <= limit:
            break
    return found, again


def _distinct(found: SearchResult) -> list[Trial]:
    """The feasible trials, most accurate first, each network once."""
    ordered = sorted((t for t in found.trials if t.feasible and not t.is_stopped), key=rank, reverse=True)
    distinct: list[Trial] = []
    for trial in ordered:
        if not any(is_same_network(trial.plan, other.plan) for other in distinct):
            distinct.append(trial)
    return distinct
