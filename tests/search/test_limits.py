"""The limits that a search holds its candidates to."""

import pytest

from deploypipe.errors import BudgetError
from deploypipe.records import Candidate
from deploypipe.runtimes.ability_for_target import Ability
from deploypipe.search.allocation.limits import bounded_shares, search_limits, with_margin
from deploypipe.target import Budget, Limit


def test_limits_that_cannot_be_measured_become_macs() -> None:
    elsewhere = Ability(verdict="export only", reason="it is another machine", is_the_device=False)

    def judged(**texts: str) -> tuple[dict[str, Limit], str]:
        return search_limits(Budget(**texts).limits(), elsewhere)  # type: ignore[arg-type]

    half, told = judged(latency_p50="4 ms", file_size="0.8x")
    assert half["macs"] == Limit(value=0.5, is_relative=True) and set(half) == {"macs", "file_size"}
    assert "at 0.5x those of the dense network" in told
    assert judged(latency_p50="0.7x")[0] == {"macs": Limit(value=0.7, is_relative=True)}
    own, told = judged(latency_p50="0.7x", macs="3 M")
    assert own == {"macs": Limit(value=3e6, is_relative=False)} and "those of budget.macs" in told
    assert judged(params="0.5x") == (Budget(params="0.5x").limits(), "")
    here = search_limits(Budget(latency_p50="0.7x").limits(), Ability(verdict="run"))
    assert here == (Budget(latency_p50="0.7x").limits(), "")


def test_a_file_that_is_too_large_without_its_weights_is_refused_by_name() -> None:
    dense = Candidate(
        accuracy=1.0, latency_p50_ms=None, peak_memory_mib=None, file_size_mib=1.0, num_params=10_000, num_macs=1
    )  # 0.04 MiB of weights
    with pytest.raises(BudgetError, match=r"budget\.file_size: 0\.5 MiB is out of reach: the file takes 0\.962 MiB"):
        bounded_shares(Budget(file_size="0.5x").limits(), dense, 1.0, is_timed=False)


def test_finalists_keep_a_part_of_the_margin() -> None:
    limits = Budget(latency_p50="0.5x", macs="0.5x").limits()
    none, half, whole = (with_margin(limits, part) for part in (0.0, 0.5, 1.0))
    assert none == limits and whole == with_margin(limits)
    bounds = [side["latency_p50"].value for side in (none, half, whole)]
    assert bounds == pytest.approx([0.5, 0.4925, 0.485])
    assert {side["macs"].value for side in (none, half, whole)} == {0.5}  # counted, not measured
