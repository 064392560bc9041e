"""Names and reasons that would act where they are shown: in a terminal, Markdown, XML, HTML, a figure, JSON."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from finished_runs import finished_run
from hypothesis import given, settings
from hypothesis import strategies as st

from deploypipe.cli import terminal
from deploypipe.files.json_records import from_json, from_plain, to_json, to_plain
from deploypipe.records import Check, Status, Waiver
from deploypipe.release.ci_reports import junit, markdown
from deploypipe.release.model_card import model_card
from deploypipe.report.html import render_report, write_overview
from deploypipe.report.safe_markdown import plain
from deploypipe.runs.result import RunResult
from deploypipe.text import strict_json
from deploypipe.text.printable_text import HIDDEN, printable

HOSTILE = (
    "\n\n# Heading\n| a | b |\n<script>alert(1)</script><img src=x onerror=alert(1)> @octocat #1 **bold** _it_ `code` "
    "[link](javascript:alert(1)) ![i](https://evil.example/x.png) https://evil.example _www.evil.example GH-1 "
    "a@b.example\n::error::x\x1b[2J\x1b]8;;https://evil.example\x07\x9b31m\r\x00\u202eevil\u2066\u200b\u2028\ufeff\ufffe"
    " [bold red]rich[/] [link=https://evil.example]x[/link] %{x} ]]> &lt; ~~s~~ $x$ \\"
)


def poisoned(value: Any) -> Any:
    """All free texts of a run's records, hostile. What is checked when it is read (kinds, names) stays."""
    waiver = Waiver(check="macs", reason=HOSTILE, by=HOSTILE, granted="2026-01-01", expires="2030-01-01")
    checks = tuple(
        Check(name=HOSTILE, status=s, measured=1.0, interval=None, limit=2.0, unit="x", reason=HOSTILE, waiver=w)
        for s, w in ((Status.FAIL, None), (Status.UNKNOWN, None), (Status.FAIL, waiver), (Status.PASS, None))
    )
    environment = replace(value.benchmark.environment, cpu=HOSTILE, gpu=HOSTILE)
    benchmark = replace(value.benchmark, environment=environment, notes=(HOSTILE,))
    benchmark = replace(benchmark, slices={HOSTILE: tuple(range(250)), "b": tuple(range(250, 500))})
    decision = replace(value.decision, reason=HOSTILE, checks=checks)
    target = value.target
    for name in ("name", "description"):
        object.__setattr__(target, name, HOSTILE)  # past its own checks, as an older report may be
    return replace(value, pipeline=HOSTILE, metric=HOSTILE, benchmark=benchmark, decision=decision, target=target)


@pytest.fixture(scope="module")
def run() -> RunResult:
    made: RunResult = poisoned(from_json(RunResult, to_json(finished_run()), "run"))
    groups = tuple(replace(group, name=f"{HOSTILE}{n}") for n, group in enumerate(made.scores.groups))  # type: ignore[union-attr]
    return replace(made, scores=replace(made.scores, groups=groups))  # type: ignore[type-var]


def test_a_text_is_one_line_without_hidden_characters() -> None:
    shown = printable(HOSTILE)
    assert not HIDDEN.search(shown) and len(shown.splitlines()) == 1
    assert r"\x1b[2J" in shown and r"\u202e" in shown and r"\n" in shown
    assert (
        printable("x86_cpu: 95 % größer ✅ 日本 a::b # ## [x] #[x]")
        == "x86_cpu: 95 % größer ✅ 日本 a::b # ## [x] #[x]"
    )


@pytest.mark.parametrize(
    "order",
    ["::error::x", "  ::set-output name=x::y", "a ##[error]x", "##vso[task.setvariable variable=x]y", "##teamcity[x]"],
)
def test_a_ci_server_is_given_no_orders(order: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_table("Slowest operators", (order, "time"), [(order, "1 ms")])
    terminal.say(order)
    terminal.say(strict_json.dumps({"reason": order}))
    *lines, _ = shown = capsys.readouterr().out.splitlines()
    assert not [line for line in shown if re.search(r"^\s*::|##\w*\[", line)] and "\\u00" in lines[-1]
    assert json.loads(shown[-1]) == {"reason": order}


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_is_markup_in_markdown(text: str) -> None:
    shown = plain(text)
    assert not HIDDEN.search(shown)
    bare = re.sub(r"\\.", "", shown.replace("<!-- -->", ""))
    assert not re.search(r"[`*\[\]|~<>]", bare)
    assert not re.search(r"@\w|https?://|(?<![\\\w])_", shown)


@pytest.mark.parametrize("render", [markdown, model_card])
def test_markdown(render: Any, run: RunResult) -> None:
    text = render(run)
    assert "octocat" in text and "evil.example" in text  # it is shown
    body = text.split("---\n", 2)[2] if text.startswith("---") else text
    assert not HIDDEN.search(text.replace("\n", ""))
    assert not re.search(
        r"@octocat|https?://|www\.evil|GH-1|<script|<img|(?<!\\)\[link|(?<!\\)!\[|(?<!\\)\*\*|#1\b", body
    )
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == len([line for line in render(finished_run()).splitlines() if line.startswith("#")])
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6)
    if text.startswith("---"):
        index = next(line for line in text.splitlines() if line.startswith("model-index: "))
        assert json.loads(index.removeprefix("model-index: "))


def test_junit_is_xml_that_any_parser_reads(run: RunResult) -> None:
    suite = ElementTree.fromstring(junit(run).partition("\n")[2])
    assert len(suite) == 4 and suite[0].get("name") == printable(HOSTILE)
    assert not any(HIDDEN.search(value) for case in suite.iter() for value in case.attrib.values())


def test_html_shows_text(run: RunResult) -> None:
    page = re.sub(r"<script>.*?</script>", "", render_report(run), count=1, flags=re.S)  # plotly's own
    assert "<script>alert" not in page and "<img src=x" not in page and "octocat" in page
    assert not HIDDEN.search(re.sub(r"[\n\t]", "", page))
    for figure in re.findall(r"Plotly\.newPlot\((.*?)\)\s*\}", page, re.S):
        assert "<img" not in figure and r"\u003cimg" not in figure and r"\u003cscript" not in figure


def test_the_overviews_links_stay_in_its_folder(run: RunResult, tmp_path: Path) -> None:
    names = ["javascript:alert(1)//", "https://evil.example/", "//evil.example", '"><script>', "../../up", "x86_cpu"]
    write_overview("net", dict.fromkeys(names, finished_run()), tmp_path / "report.html")
    page = re.sub(r"<script>.*?</script>", "", (tmp_path / "report.html").read_text(), flags=re.S)  # plotly's own
    links = re.findall(r'href="([^"#][^"]*)"', page)  # but those to places on the page
    assert len(links) == len(names) and links[-1] == "./x86_cpu/report.html"
    assert all(re.fullmatch(r"\./[\w%.-]+/report\.html", link) for link in links), links


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_terminal_is_not_steered(
    is_terminal: bool, run: RunResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    terminal.show_decision(run.decision)
    terminal.show_table(HOSTILE, ("", HOSTILE), [(HOSTILE, "PASS")])
    terminal.say(HOSTILE)
    shown = capsys.readouterr().out
    ours = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # colours
    assert not HIDDEN.search(ours.replace("\n", "")) and "\x1b[2J" not in shown and "\x1b]8" not in shown
    assert not any(line.startswith(("::", "#")) for line in ours.splitlines())
    assert "rich" in ours and "[bold" in ours


def test_json_has_no_bare_nan_and_gives_it_back() -> None:
    made = finished_run()
    trial = made.search.trials[0]  # type: ignore[union-attr]
    odd = replace(trial, knobs={"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    text = to_json(odd)
    assert not re.search(r"NaN|Infinity", text)
    json.loads(text, parse_constant=pytest.fail)
    knobs = from_json(type(odd), text, "trial").knobs
    assert math.isnan(knobs["a"]) and (knobs["b"], knobs["c"], knobs["d"]) == (math.inf, -math.inf, 1.0)
    assert from_plain(type(odd), to_plain(trial), "trial") == trial


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "1e999",
        '{"a": 1, "a": 2}',
        '"\\ud800"',
        "[" * 70 + "]" * 70,
        "[" * 10**5,
        "9" * 5000,
        "\ufeff1",
        "",
        "{",
        "01",
        "'a'",
        "[1,]",
        "\x00",
    ],
)
def test_json_is_read_strictly(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        strict_json.loads(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(ValueError):
        strict_json.loads(b"\xff" + text.encode("utf-8", "replace"))
