"""The networks of several targets are compared as one set; the page shows their common frontier."""

from dataclasses import replace
from pathlib import Path

from finished_runs import finished_run, untouched_run
from hypothesis import given
from hypothesis import strategies as st
from made_up_searches import DENSE

from deploypipe.report.html import write_overview
from deploypipe.report.joint_pareto import EvaluatedNetwork, evaluated_networks, front_sentence, joint_front


def evaluated(target: str, number: int, macs: int, accuracy: float) -> EvaluatedNetwork:
    return EvaluatedNetwork(
        target=target,
        trial=number,
        candidate=replace(DENSE, num_macs=macs, accuracy=accuracy),
        is_winner=number == 0,
    )


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_none_beats(drawn: list[tuple[int, int]]) -> None:
    networks = [evaluated("ab"[n % 2], n, macs, accuracy / 10) for n, (macs, accuracy) in enumerate(drawn)]
    points = {(macs, accuracy / 10) for macs, accuracy in drawn}
    unbeaten = {
        (macs, accuracy)
        for macs, accuracy in points
        if not any(m <= macs and a >= accuracy and (m, a) != (macs, accuracy) for m, a in points)
    }
    front = joint_front(networks)
    assert [(n.candidate.num_macs, n.candidate.accuracy) for n in front] == sorted(unbeaten)


def test_the_page_of_several_targets_shows_it(tmp_path: Path) -> None:
    run = finished_run()
    assert run.search
    results = {"first": run, "second": run, "dense": untouched_run(), "broken": "it failed"}
    networks = evaluated_networks(results)
    whole = [trial for trial in run.search.trials if not trial.is_stopped]
    assert [n.target for n in networks] == ["first"] * len(whole) + ["second"] * len(whole)
    assert sum(n.is_winner for n in networks) == 2
    write_overview("digits", results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert front_sentence(networks) in page and "Plotly.newPlot" in page and "first, trial" in page
    assert " for second" not in front_sentence(networks)  # of equals, the first
    write_overview("digits", {"dense": untouched_run()}, tmp_path / "page.html")
    assert "All networks" not in (tmp_path / "page.html").read_text(encoding="utf-8")
