"""The last stages: when a benchmark has to be repeated."""

from dataclasses import replace

import pytest
from finished_runs import conditions, finished_run

from deploypipe.stages.deploy import _is_final
from deploypipe.target import Budget


@pytest.mark.parametrize(
    ("budget", "is_final"), [(Budget(latency_p50="0.7x"), False), (Budget(macs="0.5x", peak_memory="0.9x"), True)]
)
def test_an_unsteady_benchmark_is_repeated_only_if_a_timed_budget_hangs_on_it(budget: Budget, is_final: bool) -> None:
    steady = finished_run().benchmark
    noisy = replace(steady, conditions=conditions("noisy", "others kept 1.9 of 2 processors busy"), is_steady=False)
    assert _is_final(steady, budget)
    assert _is_final(noisy, budget) is is_final
