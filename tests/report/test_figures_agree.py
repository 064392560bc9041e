"""One figure reads the same in the table, in the gate and in the comment on a pull request."""

from dataclasses import replace

import pytest
from finished_runs import finished_run, interval

from deploypipe.budgets import BUDGETS
from deploypipe.release.ci_reports import markdown
from deploypipe.release.gate import decide
from deploypipe.report.run_tables import before_after, check_cells
from deploypipe.target import Budget
from deploypipe.text.amounts import amount, bounded, count, limit_text, mebibytes

LIMITS = ("latency_p50", "peak_memory", "file_size", "params", "macs")
ABSOLUTE = dict(zip(LIMITS, ("0.1 ms", "29.5 MiB", "900 KiB", "1 M", "2 G"), strict=True))


@pytest.mark.parametrize("limits", [ABSOLUTE, dict.fromkeys(LIMITS, "0.4x"), dict.fromkeys(LIMITS, "0.9x")])
def test_table_gate_and_comment_agree(limits: dict[str, str]) -> None:
    run = finished_run()
    small = replace(run.benchmark.compressed, num_params=400_123, num_macs=1_234_567, peak_memory_mib=30.0449)
    report = replace(run.benchmark, compressed=small, latency_ratio=interval(0.49951, 0.01004))
    run = replace(run, benchmark=report, decision=decide(report, Budget(**limits)))
    rows = {row.name: row for row in before_after(run)}
    for check in run.decision.checks[:-1]:
        _, _, measured, limit, _ = check_cells(check)
        row = rows[BUDGETS[check.name].label]
        assert measured == (row.change if check.unit == "x" else row.compressed)
        assert check.reason.split(";")[0].endswith(f"the limit of {limit}")
        decisive = amount(check.interval.high if check.interval else check.measured or 0.0, check.unit)
        assert decisive in check.reason and decisive.split()[0].rstrip("x") in measured
        assert measured in markdown(run)
    drop = check_cells(run.decision.checks[-1])[2]
    assert drop == "0.20 pp (-0.20 to 0.60)" and rows[run.metric].change == "-0.20 pp (-0.60 to +0.20)"


def test_digits_follow_the_figure_and_its_unit() -> None:
    assert [amount(v, "ms") for v in (0.13444, 4.8, 12345.6)] == ["0.1344 ms", "4.800 ms", "12,346 ms"]
    assert bounded(0.1, 0.0991, 0.10142, "ms") == "0.1000 ms (0.0991 to 0.1014)"
    assert [limit_text(5, "ms"), limit_text(0.7, "x"), limit_text(2, "pp"), limit_text(100, "MiB")] == [
        "5 ms",
        "0.7x",
        "2 pp",
        "100 MiB",
    ]
    assert mebibytes(60 * 1024) == "0.05859 MiB"
    assert [count(v) for v in (12, 1500, 2.5e6, 1e9)] == ["12", "1.5 k", "2.5 M", "1 G"]
    assert amount(float("nan"), "ms") == "nan ms" and amount(0, "MiB") == "0.000 MiB"
