"""The report in a real browser: every figure is drawn, nothing is complained of, nothing is fetched."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from finished_runs import finished_run, score_summary

from deploypipe.report.html import write_report, write_scores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def shown(page: Path, profile: Path, width: int) -> tuple[str, str]:
    """(the document after its scripts ran, what the browser's console said) on a screen of so many pixels."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=20000", "--enable-logging=stderr", "--v=0"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_figures_are_drawn_and_the_console_is_silent(width: int, tmp_path: Path) -> None:
    write_report(finished_run(), tmp_path / "report.html")
    write_scores("net", score_summary(), tmp_path / "scores.html")
    for page in ("report.html", "scores.html"):
        document, console = shown(tmp_path / page, tmp_path / "profile", width)
        num_figures = len(re.findall(r'class="plotly-graph-div', document))
        assert num_figures > 1
        assert len(re.findall(r'<svg class="main-svg"[^>]*style="background', document)) == num_figures
        assert "CONSOLE" not in console, console
        assert "ERR_NAME_NOT_RESOLVED" not in console, console
