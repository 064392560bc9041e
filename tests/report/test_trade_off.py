"""The plot on top of the report, and the table that says the same."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from finished_runs import finished_run, trial

from deploypipe.records import Candidate, SearchResult, Trial
from deploypipe.report.html import render_report
from deploypipe.report.trade_off import removed_text, ship_another, summary, trade_off, trade_off_rows
from deploypipe.report.trade_off_plot import trade_off_plot
from deploypipe.target import Budget, Target

TARGET = Target(runtime="onnxruntime", budget=Budget(latency_p50="0.7x", accuracy_drop_pp=2.0))
DENSE = replace(trial(0, 0.2, True).candidate, accuracy=0.97)


def made(number: int, latency_ms: float, accuracy: float, **changes: Any) -> Trial:
    some = trial(number, latency_ms, latency_ms <= 0.14)
    return replace(some, candidate=replace(some.candidate, accuracy=accuracy), **changes)


TRIALS = (
    made(0, 0.12, 0.95),
    made(1, 0.18, 0.96),
    made(2, 0.10, 0.93),
    made(3, 0.11, 0.99, is_stopped=True, num_val_samples=625),
    made(4, 0.13, 0.94),
)
SEARCH = SearchResult(dense=DENSE, trials=TRIALS, best=0)


def drawn(search: SearchResult, target: Target = TARGET) -> tuple[dict[str, Any], str]:
    """The traces of the plot by name, and all of its HTML."""
    html = trade_off_plot(trade_off(search, target, "mean IoU"), target)
    start = html.index("[", html.index("Plotly.newPlot("))
    return {trace.get("name", ""): trace for trace in json.JSONDecoder().raw_decode(html[start:])[0]}, html


def test_every_trial_is_drawn_with_the_dense_network_and_the_budgets() -> None:
    traces, html = drawn(SEARCH)
    names = ("over budget", "within budget", "stopped early", "chosen", "dense")
    assert {name: traces[name]["x"] for name in names} == {
        "over budget": [0.18],
        "within budget": [0.1, 0.13],
        "stopped early": [0.11],
        "chosen": [0.12],
        "dense": [0.2],
    }
    assert len({traces[name]["marker"]["symbol"] for name in names}) == 5
    lines = [float(x) for x in re.findall(r'"type":"line","x0":([\d.]+)', html)]
    assert pytest.approx(0.14) in lines and "budget 0.7x" in html
    assert "mean IoU on val, %" in html and "latency p50, ms" in html  # the axes


def test_the_frontier_leaves_out_what_is_beaten_and_what_was_stopped() -> None:
    traces, _ = drawn(SEARCH)
    assert traces["frontier"]["x"] == [0.1, 0.12, 0.18, 0.2, 0.2]  # the last: to the edge
    assert traces["frontier"]["y"] == pytest.approx([93, 95, 96, 97, 97])
    rows = trade_off_rows(trade_off(SEARCH, TARGET, "mean IoU"))
    assert [row[:4] for row in rows] == [
        ("0.1000 ms", "93.00 %", "-4.00 pp", "2"),
        ("0.1200 ms", "95.00 %", "-2.00 pp", "0, chosen"),
        ("0.1800 ms", "96.00 %", "-1.00 pp", "1, over budget"),
        ("0.2000 ms", "97.00 %", "", "dense"),
    ]
    said = summary(trade_off(SEARCH, TARGET, "mean IoU"))
    assert (
        "5 trials" in said and "trial 0 (0.1200 ms, -2.00 pp before fine-tuning)" in said and "4 networks are" in said
    )


def test_the_chosen_trial_and_the_dense_network_are_in_the_table_of_a_long_frontier() -> None:
    many = tuple(made(n, 0.1 + 0.001 * n, 0.9 + 0.001 * n) for n in range(40))
    beaten = made(40, 0.139, 0.9)
    rows = trade_off_rows(trade_off(replace(SEARCH, trials=(*many, beaten), best=40), TARGET, "mean IoU"))
    assert 12 <= len(rows) <= 14
    assert sum("chosen" in row[3] for row in rows) == sum(row[3] == "dense" for row in rows) == 1


def test_hovering_tells_the_trial_and_what_was_removed() -> None:
    about = drawn(SEARCH)[0]["stopped early"]["text"][0]
    for words in ("trial 3", "--ship-trial 3", "mean IoU 99.00 %", "n = 625", "0.1100 ms", "3 M", "block layer1.1"):
        assert words in about, words
    assert removed_text(TRIALS[0].plan) == "16 of 32 units in 1 group (layer1.0.conv1 32 to 16); block layer1.1"
    names = tuple(f"b{n}" for n in range(7))
    assert removed_text(replace(TRIALS[0].plan, cuts=(), blocks=names)) == "blocks b0, b1, b2, b3, 3 more"
    assert removed_text(replace(TRIALS[0].plan, cuts=(), blocks=())) == "nothing"


def untimed(candidate: Candidate) -> Candidate:
    return replace(candidate, latency_p50_ms=None)


def test_another_figure_is_on_the_axis_where_no_latency_was_measured() -> None:
    bare = tuple(replace(t, candidate=untimed(t.candidate), violations={"macs": -0.25}) for t in TRIALS)
    search = replace(SEARCH, trials=bare, dense=replace(untimed(DENSE), num_macs=8_000_000))
    traces, html = drawn(search)
    assert traces["chosen"]["x"] == [3_000_000]
    lines = [float(x) for x in re.findall(r'"type":"line","x0":([\d.]+)', html)]
    assert pytest.approx(4_000_000) in lines  # its trials were held to 0.75 of that
    sized = replace(TARGET, budget=Budget(latency_p50="0.7x", file_size="2 MiB"))
    assert trade_off(search, sized, "mean IoU").cost.name == "file_size"
    assert trade_off(SEARCH, replace(TARGET, budget=Budget()), "mean IoU").cost.name == "latency_p50"


def test_the_report_says_how_to_ship_another_trial() -> None:
    run = replace(finished_run(), command="deploypipe run digits x86_cpu")
    page = render_report(run)
    assert "deploypipe run digits x86_cpu --ship-trial N" in page
    assert page.index("costs in accuracy") < page.index("Before and after")
    assert ship_another(finished_run()) == "deploypipe run PIPELINE TARGET --ship-trial N"
