"""The winner meets its latency limit when timed again, and trains best."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from made_up_searches import DENSE, HALF

from deploypipe.records import Check, Interval, PruningPlan, SearchResult, Status, Trial
from deploypipe.search.allocation.limits import share_to_confirm, tightened_limit_fraction
from deploypipe.search.evaluation.winner import confirm_finalists, with_finalists, with_tuned


def plan(name: str) -> PruningPlan:
    return PruningPlan(model_fingerprint=name, cuts=(), edits=(), blocks=(name,))


def trial(number: int, *, accuracy: float = 0.9, share: float = 0.5, name: str = "", is_stopped: bool = False) -> Trial:
    candidate = replace(DENSE, accuracy=accuracy - 0.01 * number, latency_p50_ms=4.0 * share)
    return Trial(
        number=number,
        knobs={"fill": 1.0},
        candidate=candidate,
        violations={},
        feasible=True,
        plan=plan(name or str(number)),
        is_stopped=is_stopped,
    )


def found_of(trials: Sequence[Trial]) -> SearchResult:
    return SearchResult(dense=DENSE, trials=tuple(trials), best=0)


def nothing_narrower(trial: Trial, number: int, share: float) -> Trial:
    return replace(trial, number=number, feasible=False)


@pytest.mark.parametrize(
    ("ratios", "held", "asked"),
    [
        ({0: 0.49, 1: 0.4, 2: 0.4}, [0], [0]),  # the most accurate holds
        ({0: 0.52, 1: 0.51, 2: 0.5}, [2], [0, 1, 2]),
        ({0: 0.53, 1: 0.51, 2: 0.52}, [1], [0, 1, 2]),  # none, and there is no narrower one: the nearest
        ({0: 0.49, 1: 0.51, 2: 0.5}, [0, 2], [0, 1, 2]),
    ],
)
def test_the_best_are_timed_again(ratios: Mapping[int, float], held: list[int], asked: list[int]) -> None:
    found = found_of([trial(n, is_stopped=n == 3) for n in range(4)])
    confirmed = confirm_finalists(
        found, 0.5, lambda plan: ratios[int(plan.model_fingerprint)], nothing_narrower, wanted=len(held)
    )
    assert confirmed.finalists == tuple(held) and confirmed.best == held[0]
    assert list(confirmed.timed_again) == [str(n) for n in asked]
    assert confirmed.trials == found.trials


class Machine:
    """Takes networks for `by[name]` slower than the search did; a network's name is what the search took it for."""

    def __init__(self, by: Mapping[str, float], slowest: float = 0.04) -> None:
        self.by, self.slowest = by, slowest
        self.timed: list[str] = []

    def measure(self, plan: PruningPlan) -> float:
        (name,) = plan.blocks
        self.timed.append(name)
        return float(name) * (1 + self.by.get(name, self.slowest))


def named(number: int, share: float) -> Trial:
    return trial(number, share=share, name=f"{share:.4f}")


def narrowed(trial: Trial, number: int, share: float) -> Trial:
    return named(number, share)


def test_if_no_trial_meets_the_limit_the_most_accurate_is_narrowed() -> None:
    found, machine = found_of([named(0, 0.5), named(1, 0.49)]), Machine({})
    confirmed = confirm_finalists(found, 0.495, machine.measure, narrowed)
    assert [t.narrowed_from for t in confirmed.trials] == [None, None, 0]
    assert confirmed.best == 2 and confirmed.finalists == (2,)
    assert machine.timed == ["0.5000", "0.4900", f"{0.99 * 0.495 / 1.04:.4f}"]
    assert 0.98 * 0.495 < confirmed.timed_again["2"] <= 0.495  # no faster than it has to be


def test_a_narrower_network_over_the_limit_is_narrowed_further() -> None:
    found, machine = found_of([named(0, 0.5)]), Machine({"0.5000": 0.02}, slowest=0.06)
    confirmed = confirm_finalists(found, 0.495, machine.measure, narrowed)
    assert [t.narrowed_from for t in confirmed.trials] == [None, 0, 1]
    assert confirmed.best == 2 and max(confirmed.timed_again["0"], confirmed.timed_again["1"]) > 0.495


def test_narrowing_ends_at_the_narrowest_and_takes_the_nearest() -> None:
    found, machine = found_of([named(0, 0.5), named(1, 0.49)]), Machine({})
    confirmed = confirm_finalists(found, 0.3, machine.measure, lambda trial, number, share: named(number, 0.45))
    assert confirmed.best == 2 and len(confirmed.trials) == 3  # the second narrower network is the first
    assert machine.timed == ["0.5000", "0.4900", "0.4500"]


def test_a_network_over_the_limit_is_not_timed_until_it_passes() -> None:
    found, machine = found_of([named(0, 0.5), named(1, 0.49)]), Machine({})
    answers = iter([0.49, 0.45])  # the first is trial 1 again
    confirmed = confirm_finalists(
        found, 0.495, machine.measure, lambda trial, number, share: named(number, next(answers))
    )
    assert confirmed.best == 3
    assert machine.timed == ["0.5000", "0.4900", "0.4500"]


def test_narrowing_stops_after_a_few_networks() -> None:
    found, machine = found_of([named(0, 0.5)]), Machine({})
    confirmed = confirm_finalists(
        found, 0.1, machine.measure, lambda trial, number, share: named(number, 0.5 - 0.01 * number)
    )
    assert len(confirmed.trials) == 6 and confirmed.best == 5


def test_after_a_failed_benchmark_finalists_get_a_tighter_limit() -> None:
    """Held at 0.49, measured at 0.52 of what may be 0.5: the next has to hold 0.5 x 0.49 / 0.52, less the margin."""
    found = replace(found_of([trial(0)]), timed_again={"0": 0.49})
    failed = Check(
        name="latency_p50",
        status=Status.FAIL,
        measured=2.1,
        interval=Interval(low=2.0, value=2.1, high=2.08 * 1.1),
        limit=2.0 * 1.1,  # ms of a machine that is slower by now
        unit="ms",
        reason="",
    )
    part = tightened_limit_fraction(HALF, found, failed)
    assert part == pytest.approx(0.49 / 0.52)
    assert part * share_to_confirm(HALF, DENSE) == pytest.approx(0.5 * 0.985 * 0.49 / 0.52)


def test_the_finalist_that_trains_best_wins() -> None:
    found = with_finalists(found_of([trial(n, name=name) for n, name in enumerate("aabc")]), 3)
    assert found.finalists == (0, 2, 3)  # trial 1 is the same network as trial 0
    assert with_tuned(found, {"0": 0.91, "2": 0.93, "3": 0.92}).best == 2
    assert with_tuned(found, {"0": 0.93, "2": 0.93, "3": 0.92}).best == 0
