"""The pages in a real browser: drawn, silent, offline, readable on a phone and in the dark, and for screen readers."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_runs import conditions, finished_run, score_summary, untouched_run

from deploypipe.release.gate import decide
from deploypipe.report.html import write_overview, write_report, write_scores
from deploypipe.target import Budget

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install '.[test]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed; pip install '.[test]'")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser is installed: none of {', '.join(BROWSERS)}"),
]
WIDE, PHONE = [(1280, "light"), (1280, "dark")], [(400, "light"), (400, "dark")]
SHOWN = [
    *(("ship", screen) for screen in (*WIDE, *PHONE)),
    *((name, screen) for name in ("failed", "unsteady", "elsewhere") for screen in (WIDE[0], PHONE[1])),
    *((name, screen) for name in ("scores", "overview") for screen in (WIDE[1], PHONE[0])),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    run = finished_run()
    noisy = replace(run.benchmark, conditions=conditions("noisy", "others kept 1.9 of 2 processors busy"))
    for name, made in {
        "ship": run,
        "failed": replace(run, decision=decide(run.benchmark, Budget(latency_p50="0.1x", peak_memory="0.1x"))),
        "unsteady": replace(run, benchmark=noisy, decision=decide(noisy, Budget(latency_p50="0.9x"))),
        "elsewhere": replace(untouched_run(), search=run.search),
    }.items():
        write_report(made, folder / f"{name}.html")
    write_scores("net", score_summary(), folder / "scores.html")
    write_overview("net", {"first": run, "second": untouched_run(), "third": "it broke"}, folder / "overview.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def screen(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A page on a screen of some width, with everything that it complained of or asked the network for."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: opened.complaints.append(f"error: {error}"))
    opened.on("request", lambda request: request.url.startswith("file:") or opened.complaints.append(request.url))
    yield opened
    opened.close()


@pytest.mark.parametrize(("name", "screen"), SHOWN, ids=str, indirect=["screen"])
def test_a_page_is_drawn_silent_and_accessible(name: str, screen: Any, pages: Path) -> None:
    screen.goto((pages / f"{name}.html").as_uri())
    plots = screen.locator(".plotly-graph-div")
    assert screen.locator(".plotly-graph-div .main-svg").count() >= plots.count() > 0
    assert screen.complaints == []
    num_wider = screen.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert num_wider <= 0, "the page scrolls sideways"
    found = axe.Axe().run(screen).response
    assert found["passes"]
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in serious]


@pytest.mark.parametrize("screen", [(1280, "dark")], ids=str, indirect=True)
def test_plots_follow_the_dark_page(screen: Any, pages: Path) -> None:
    screen.goto((pages / "ship.html").as_uri())
    colours = "element => [getComputedStyle(element).fill, getComputedStyle(document.body).color]"
    text, ink = screen.locator(".xtick text").first.evaluate(colours)
    assert text == ink == "rgb(230, 233, 239)"


def test_all_but_the_plots_is_there_without_scripts(browser: Any, pages: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto((pages / "ship.html").as_uri())
    assert page.locator("figcaption").first.is_visible() and not page.locator(".drawn").first.is_visible()
    assert page.locator("noscript .hint").is_visible()
    assert page.get_by_role("table", name="Checks of the gate").is_visible()
    for link in page.get_by_role("navigation").get_by_role("link").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    page.close()
