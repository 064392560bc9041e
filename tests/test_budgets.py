"""One table of budgets: `Budget` has its fields, and a row that nobody knew before is taken everywhere."""

from dataclasses import dataclass, fields, replace

import pytest
from finished_runs import finished_run
from pytest import MonkeyPatch

from deploypipe.budgets import BUDGETS, LATENCY_P50, MACS, PEAK_MEMORY, BudgetRow, figures
from deploypipe.errors import ConfigError
from deploypipe.files.json_records import from_plain
from deploypipe.records import Candidate, SearchResult, Status
from deploypipe.release.gate import decide
from deploypipe.report.next_steps import next_steps
from deploypipe.report.run_tables import before_after, comparison_rows, overview_header, overview_rows
from deploypipe.report.search_text import held_budgets, reach_rows
from deploypipe.runtimes.ability_for_target import Ability
from deploypipe.search.allocation.limits import bounded_shares, is_over_budget, search_limits, violations, with_margin
from deploypipe.target import Budget

DENSE = Candidate(
    accuracy=0.9,
    latency_p50_ms=2.0,
    peak_memory_mib=50.0,
    file_size_mib=8.0,
    num_params=2**20,
    num_macs=1000,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WiderBudget(Budget):
    """`Budget` as it would be with one more field."""

    weight_memory: str | None = None


WEIGHT_MEMORY = BudgetRow(
    name="weight_memory",
    label="memory of weights",
    unit="MiB",
    units={"MiB": 1.0, "KiB": 1 / 1024},
    source="measured",
    of_measurement=lambda m: 4 * m.num_params / 2**20,
    of_candidate=lambda c: 4 * c.num_params / 2**20,
    predictor="param_count",
    margin=0.1,
)


def test_the_fields_of_budget_are_the_rows_of_the_table() -> None:
    assert [field.name for field in fields(Budget) if field.type == (str | None)] == list(BUDGETS)
    assert all(name == row.name for name, row in BUDGETS.items())
    assert {LATENCY_P50, PEAK_MEMORY, MACS} <= set(BUDGETS)


@pytest.mark.parametrize("row", [*BUDGETS.values(), WEIGHT_MEMORY], ids=lambda row: row.name)
def test_each_row_is_consistent(row: BudgetRow) -> None:
    report = finished_run().benchmark
    assert row.units[row.unit] == 1.0 if row.unit else set(row.units) == {"k", "M", "G"}
    dense, compressed = row.value(report.dense), row.value(report.compressed)
    assert dense is not None and compressed is not None and 0 < compressed < dense
    assert row.of_candidate(DENSE)
    assert 0 <= row.margin < 1 and (row.margin == 0 or row.source != "counted")  # what is counted has no noise
    assert len({other.label for other in BUDGETS.values()}) == len(BUDGETS)


def test_what_was_not_measured_is_none() -> None:
    bare = replace(finished_run().benchmark.dense, latency=None, peak_memory_mib=None)
    assert {name for name, figure in figures(bare).items() if figure is None} == {LATENCY_P50, PEAK_MEMORY}


def test_a_new_row_is_taken_everywhere(monkeypatch: MonkeyPatch) -> None:
    """Weights of the run's networks: 3.05 MiB dense, half of that compressed."""
    monkeypatch.setitem(BUDGETS, "weight_memory", WEIGHT_MEMORY)
    with pytest.raises(ConfigError, match=r"weight_memory = '4 parsecs' .* \(units: x, MiB, KiB\)"):
        from_plain(WiderBudget, {"weight_memory": "4 parsecs"}, "cpu.toml")
    budget = from_plain(WiderBudget, {"weight_memory": "0.4x", "accuracy_drop_pp": 50.0}, "cpu.toml")
    limits = budget.limits()
    assert set(limits) == {"weight_memory"}

    _the_gate_decides_by_it(budget)
    _the_search_is_held_to_it(budget)
    _the_tables_show_it(budget)


def _the_gate_decides_by_it(budget: WiderBudget) -> None:
    report = finished_run().benchmark
    failed = decide(report, budget)
    check = failed.checks[0]
    assert (check.name, check.unit, check.status) == ("weight_memory", "MiB", Status.FAIL)
    assert check.limit == pytest.approx(0.4 * 4 * report.dense.num_params / 2**20)
    assert decide(report, replace(budget, weight_memory="0.9x")).checks[0].status is Status.PASS
    run = replace(finished_run(), decision=failed, target=replace(finished_run().target, budget=budget))
    assert "weight memory: search longer, or relax budget.weight_memory" in next_steps(run)[0]


def _the_search_is_held_to_it(budget: WiderBudget) -> None:
    limits = budget.limits()
    assert with_margin(limits)["weight_memory"].value == pytest.approx(0.36)
    assert bounded_shares(limits, DENSE, 8.0, is_timed=False) == {"weight_memory": pytest.approx(0.4)}
    assert is_over_budget(DENSE, DENSE, limits)
    half = replace(DENSE, num_params=DENSE.num_params // 2)
    assert violations(half, DENSE, limits) == {"weight_memory": pytest.approx(0.25)}
    elsewhere = Ability(verdict="export only", reason="it is another machine", is_the_device=False)
    assert set(search_limits(limits, elsewhere)[0]) == {MACS}


def _the_tables_show_it(budget: WiderBudget) -> None:
    run = finished_run()
    row = next(row for row in before_after(run) if row.name == "memory of weights")
    assert (row.dense, row.change) == ("3.052 MiB", "0.500x")
    assert "memory of weights" in overview_header()
    (cells,) = overview_rows({"x86_cpu": run})
    assert cells[overview_header().index("memory of weights")] == "0.500x"
    assert ("memory of weights", "1.526 MiB", "1.526 MiB", "1.000x") in comparison_rows(run, run)
    assert run.search
    trial = replace(run.search.trials[0], violations={"weight_memory": -0.5})
    found = SearchResult(dense=DENSE, trials=(trial,), best=0)
    assert [held.name for held in held_budgets(found)] == ["weight_memory"]
    rows = {row[0]: row for row in reach_rows(found, replace(run.target, budget=budget))}
    assert rows["memory of weights"][2] == "0.4x"
