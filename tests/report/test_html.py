import builtins
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_runs import finished_run, score_summary, untouched_run

from deploypipe.errors import DeploypipeError
from deploypipe.report import html
from deploypipe.report.html import render_report, write_report, write_scores
from deploypipe.report.run_tables import before_after, seconds

FETCHING = {"src", "href", "action", "data", "poster", "srcset"}


class _Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.style = ""
        self.num_large_scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in FETCHING and value and value[0] != "#"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.style += data
        elif self.tags and self.tags[-1] == "script" and len(data) > 1_000_000:
            self.num_large_scripts += 1
        elif len(data) < 10_000:
            self.text.append(data)


def read(html: str) -> _Collector:
    collector = _Collector()
    collector.feed(html)
    return collector


def test_report_leads_with_the_decision_and_fetches_nothing(tmp_path: Path) -> None:
    write_report(finished_run(), tmp_path / "sub" / "report.html")
    page = read((tmp_path / "sub" / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert page.fetched == []
    assert "link" not in page.tags and "url(" not in page.style and "@import" not in page.style
    assert page.num_large_scripts == 1  # plotly.js, once
    assert text.index("SHIP") < text.index("Before and after")
    assert "all checks passed" in text
    assert "the interval covers this machine's median under drifts as slow as the measurement" in text


def test_report_shows_every_part_of_a_run() -> None:
    html = render_report(finished_run())
    for part in (
        "What each latency p50 costs in accuracy",
        "Latency",
        "What limited the result",
        "Widths",
        "Which knobs mattered",
        "What was removed",
        "How much is redundant",
        "Which blocks do alike",
        "Repair",
        "Fine-tuning",
        "What was not repaired",
        "is called more than once",
        "Environment",
        "steps of 8",
    ):
        assert part in html, part
    assert len(re.findall(r'class="plotly-graph-div"', html)) == 9
    assert "&lt;outputs&gt;" in html  # a reason is text, never markup


def test_classes_stand_by_what_they_lost() -> None:
    made = finished_run()
    metric = (1.0,) * 50 + (0.0,) * 50
    measured = [replace(m, per_sample_metric=metric) for m in (made.benchmark.dense, made.benchmark.compressed)]
    worse = replace(measured[1], per_sample_metric=(1.0,) * 40 + (0.0,) * 60)
    slices = {"empty": (), "kept": tuple(range(20)), "lost": tuple(range(30, 50))}
    page = render_report(
        replace(made, benchmark=replace(made.benchmark, dense=measured[0], compressed=worse, slices=slices))
    )
    figure = page[page.index("By class") :]
    assert '"y":["lost","kept"]' in figure and '"x":[50.0,100.0]' in figure and '"x":[100.0,100.0]' in figure
    assert ">By class<" not in render_report(replace(made, benchmark=replace(made.benchmark, slices={})))


def test_report_of_an_untouched_unmeasured_model() -> None:
    html = render_report(untouched_run())
    assert "HOLD" in html and "not measured" in html and "Nothing was removed" in html


def test_scores_have_a_page_of_their_own(tmp_path: Path) -> None:
    write_scores("digits", score_summary(), tmp_path / "scores.html")
    html = (tmp_path / "scores.html").read_text(encoding="utf-8")
    page = read(html)
    assert page.fetched == []
    assert len(re.findall(r'class="plotly-graph-div"', html)) == 2
    assert "1 of 2 rankings change" in " ".join(page.text)
    assert "3000 samples" in html
    assert "&lt;could&gt;" in html
    alone = replace(score_summary(), block_names=("one",), block_cka=((1.0,),), clusters=(("one",),))
    write_scores("digits", alone, tmp_path / "scores.html")
    assert "Which blocks do alike" not in (tmp_path / "scores.html").read_text(encoding="utf-8")


def test_report_survives_a_search_without_measured_latency() -> None:
    assert "What each latency p50 costs" in render_report(replace(untouched_run(), search=finished_run().search))


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_missing_library_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}", name=missing)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    html._environment.cache_clear()  # other tests have imported it
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DeploypipeError, match=rf"{missing}.*deploypipe\[report\]"):
        render_report(finished_run())


def test_rows_give_signs_and_units() -> None:
    accuracy, latency, memory, size, params, _ = before_after(finished_run())
    assert accuracy.dense == "98.00 % (n = 500)"
    assert accuracy.change == "-0.20 pp (-0.60 to +0.20)"  # a drop of 0.2 is a change of -0.2
    assert latency.change == "0.500x (0.490 to 0.510)"
    assert memory.compressed == "30.00 MiB" and size.change == "0.500x" and params.dense == "800 k"


def test_rows_of_what_was_not_measured_say_so() -> None:
    assert before_after(untouched_run())[1].dense == "not measured"


def test_seconds_shorten() -> None:
    assert [seconds(v) for v in (3.14, 75)] == ["3.1 s", "1 min 15 s"]
