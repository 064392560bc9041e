import json
import re
from dataclasses import replace
from typing import Any

import pytest
from finished_runs import finished_run, group, trial, untouched_run

from deploypipe import records as r
from deploypipe.report import search_plots
from deploypipe.report.html import render_report
from deploypipe.report.search_text import fit_sentence, importance_note, limit_sentences, reach_rows, stage_rows
from deploypipe.report.width_tables import stages_of
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget

FIT = r.LatencyFit(predicted=(0.2, 0.6, 0.5, 0.9), measured=(0.3, 0.5, 0.6, 0.9))


def searched(**changes: Any) -> RunResult:
    result = finished_run()
    assert result.search
    return replace(result, search=replace(result.search, **changes))


def sentences(result: RunResult) -> str:
    assert result.search
    stages = stages_of(result.structures, result.search.trials[result.search.best].plan)
    return " ".join(limit_sentences(result, result.search, stages))


def traces(html: str) -> dict[str, Any]:
    """What a figure draws, by name."""
    start = html.index("[", html.index("Plotly.newPlot("))
    return {trace.get("name", ""): trace for trace in json.JSONDecoder().raw_decode(html[start:])[0]}


def structures(*names: str, blocks: tuple[str, ...] = ()) -> r.Structures:
    return r.Structures(
        model_fingerprint="m",
        groups=tuple(group(name, 8) for name in names),
        blocks=tuple(r.Block(name=name, params=1, macs=1) for name in blocks),
        frozen=(),
        num_params=1,
        num_macs=1,
    )


def plan(*blocks: str) -> r.PruningPlan:
    return r.PruningPlan(model_fingerprint="m", cuts=(), edits=(), blocks=blocks)


def test_it_says_who_did_the_trials_where_there_were_several() -> None:
    assert "Trials were run by" not in sentences(searched())
    one = replace(trial(0, 0.12, True), evaluated_by="board 17")
    one = replace(one, candidate=replace(one.candidate, measured_by="board, 2026-11-20T12:00:00+00:00, load 0.2"))
    others = tuple(replace(trial(n, 0.2, False), evaluated_by="desk 4") for n in (1, 2))
    told = sentences(searched(trials=(one, *others), best=0))
    assert "Trials were run by desk 4 (2), board 17 (1)" in told
    assert "the latency of trial 0 was measured by board, 2026-11-20T12:00:00+00:00, load 0.2" in told


def test_a_search_without_latencies_says_what_replaced_them() -> None:
    bare = replace(trial(0, 0.1, True), violations={"macs": -0.25})
    bare = replace(bare, candidate=replace(bare.candidate, latency_p50_ms=None))
    dense = replace(bare.candidate, num_macs=8_000_000)
    result = searched(trials=(bare,), dense=dense)
    assert result.search
    rows = {row[0]: row for row in reach_rows(result.search, result.target)}
    assert rows["MACs"][1:] == (
        "not predicted",
        "nothing; replaces a budget that cannot be measured here",
        "0.5x",
        "0.375x",
    )
    assert rows["latency p50"][1:] == ("not predicted", "0.7x", "-", "-")
    assert "MACs: the chosen network uses 75.0 %" in sentences(result)
    assert "Latency" not in sentences(result)


@pytest.mark.parametrize(("latency", "verdict"), [(0.139, "was binding"), (0.135, "left room")])
def test_a_budget_binds_from_97_percent_of_what_the_search_allowed(latency: float, verdict: str) -> None:
    told = sentences(searched(trials=(replace(trial(0, latency, True), knobs={"fill": 0.95}),), latency_fit=FIT))
    assert f"uses {100 * latency / 0.14:.1f} % of the limit in the search (0.7x the dense network's)" in told
    assert "its plan aimed at 95.0 %" in told and f"this budget {verdict}" in told


def test_the_report_says_which_losses_were_measured() -> None:
    points = r.CurvePoints(num_measured=1200, num_predicted=30, num_samples=512)
    told = "1,200 losses were measured on 512 samples, and 30 others predicted from them."
    assert told in sentences(searched(curve_points=points))
    assert "measured on 512 samples." in sentences(searched(curve_points=replace(points, num_predicted=0)))


def test_sentences_count_what_the_records_hold() -> None:
    result = finished_run()
    told = sentences(result)
    assert "2 of 3 trials lie within the budget." in told
    assert "equal to the dense network on val; the budget allows a drop of 2 pp" in told
    assert "0 of the 2 remaining layers have the narrowest width" in told
    assert "Every removable block was removed." in told
    assert "layer1 shrank most: 25 % of its units left, 1 of 1 blocks removed." in told
    assert "layer2 shrank least: 100 % of its units left." in told
    tight = replace(result, target=replace(result.target, channel_multiple=16))
    assert "1 of the 2 remaining layers have the narrowest width allowed (widths are multiples of 16)" in sentences(
        tight
    )


def test_widths_of_a_stage_are_those_of_the_plan() -> None:
    result = finished_run()
    assert result.search
    first, second = stages_of(result.structures, result.search.trials[0].plan)
    assert stage_rows((first, second)) == [
        ("layer1", "25 % of 64", "1 of 1", "1 of 1"),
        ("layer2", "100 % of 64", "0 of 1", "-"),
    ]
    html = search_plots.widths(first)
    assert traces(html)["kept"]["x"] == [50, 0]
    assert traces(html)["dense"]["marker"]["pattern"]["shape"] == ["", "/"]
    assert "0.conv1  16 of 32" in html and "1.conv1  gone" in html


def test_long_networks_fall_into_few_stages_in_network_order() -> None:
    names = [f"net.blocks.{number}.{part}" for number in range(12) for part in ("attn:heads", "fc")]
    stages = stages_of(structures(*names, "net.head"), plan())
    assert [stage.name for stage in stages] == [
        "net.blocks.0 to 2",
        "net.blocks.3 to 5",
        "net.blocks.6 to 8",
        "net.blocks.9 to 11",
        "net.head",
    ]
    assert [layer.name for stage in stages for layer in stage.layers] == [*names, "net.head"]
    assert [stages[1].short(layer) for layer in stages[1].layers][:2] == ["3.attn:heads", "3.fc"]


def test_a_removed_block_without_groups_stands_after_the_block_before() -> None:
    found = structures("a.0.conv", "a.2.conv", blocks=("a.0", "a.1", "a.2"))
    layers = [layer for s in stages_of(found, plan("a.1", "a.2")) for layer in s.layers]
    assert [(layer.name, layer.kept, layer.is_gone) for layer in layers] == [
        ("a.0.conv", 8, False),
        ("a.1", 0, True),
        ("a.2.conv", 0, True),
    ]


def test_reach_stands_beside_the_budget() -> None:
    result = searched(feasibility=r.Feasibility(least={"latency_p50": 0.0312, "file_size": 0.1}, log10_choices=29.7))
    result = replace(result, target=replace(result.target, budget=Budget(latency_p50="0.7x", file_size="1 MiB")))
    assert result.search
    assert reach_rows(result.search, result.target) == [
        ("latency p50", "0.0312x, measured", "0.7x", "0.7x", "0.6x"),
        ("file size", "0.1x of its weights", "1 MiB", "-", "-"),
    ]
    assert "10<sup>30</sup> choices" in render_report(result)


def test_the_latency_model_is_told_by_its_error_and_its_ranks() -> None:
    assert "4 networks" in fit_sentence(FIT)
    assert "mean absolute error 7.5 %" in fit_sentence(FIT) and "Spearman correlation 0.80" in fit_sentence(FIT)
    drawn = traces(search_plots.latency_fit(FIT))
    assert drawn["networks"]["x"] == [30, 50, 60, 90] and drawn["networks"]["y"] == [20, 60, 50, 90]
    assert drawn["predicted = measured"]["x"] == drawn["predicted = measured"]["y"] == [20, 90]
    assert "Spearman" not in fit_sentence(r.LatencyFit(predicted=(0.5,), measured=(0.4,)))


def test_importances_are_drawn_or_their_absence_is_told() -> None:
    result = searched(importances={"fill": 0.25, "late": 0.75})
    assert result.search
    bars = traces(search_plots.importances(result.search.importances))[""]
    assert bars["y"] == ["fill", "late"] and bars["x"] == [25, 75]
    assert "above 0, losses near the output count more" in importance_note(result.search)
    few = searched().search
    assert few and "2 trials lie within the budget, and at least 20" in importance_note(few)
    old = searched(trials=tuple(trial(number, 0.12, True) for number in range(20))).search
    assert old and "did not record it" in importance_note(old)


def test_a_full_search_and_a_bare_one_both_give_a_page() -> None:
    full = render_report(searched(importances={"mix": 1.0}, latency_fit=FIT, pareto_front=(0,)))
    assert len(re.findall(r'class="plotly-graph-div"', full)) == 11
    nothing = structures()
    bare = render_report(
        replace(searched(pareto_front=(), importances={}), structures=nothing, prune=None, repair=None)
    )
    assert "Latency model" not in bare and "<h2>Widths" not in bare
    untouched = render_report(untouched_run())
    assert "What limited the result" not in untouched and "Which knobs mattered" not in untouched
