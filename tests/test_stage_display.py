"""What is seen while a run is at work: the live view of a terminal, and the lines of a log."""

import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from deploypipe.cli import live_stages, stage_display
from deploypipe.cli.live_stages import LiveStages
from deploypipe.cli.stage_display import PlainStages, shown_stages
from deploypipe.records import Cached, Finished, Note, Planned, Progress, Started, Warned, reported


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (live_stages, stage_display):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Terminal:
    """A live view of that width; `moving` is what would be drawn now, `lines` what stays."""

    def __init__(self, width: int) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width, color_system=None)
        self.view = LiveStages(self.console, 15)

    @property
    def moving(self) -> list[str]:
        text = "".join(segment.text for segment in self.console.render(self.view))
        return [line.rstrip() for line in text.splitlines()]

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.file.getvalue().splitlines()]


@pytest.fixture(params=[80, 120])
def terminal(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Terminal]:
    return Terminal(request.param)


def test_finished_stages_are_lines_and_only_the_running_one_moves(terminal: Terminal, clock: Clock) -> None:
    see = terminal.view
    see(Planned(stages=("score", "curves", "search", "gate")))
    see(Started(stage="score"))
    clock.now += 4.2
    see(Finished(stage="score"))
    see(Started(stage="curves"))
    see(Cached(stage="curves"))
    assert [line.split() for line in terminal.lines] == [["✓", "score", "4.2", "s"], ["✓", "loss", "curves", "cached"]]
    assert terminal.moving == ["  then search, gate"]
    see(Started(stage="search"))
    assert terminal.moving[0].endswith("search") and terminal.moving[1:] == ["  then gate"]  # no time, no bar yet
    clock.now += 30
    see(Progress(stage="search", done=1, total=4, message="trial 0: 97.00 % on val, fits"))
    clock.now += 30
    see(Progress(stage="search", done=2, total=4, message="trial 1: 98.00 % on val, fits"))
    clock.now += 5
    running, detail, coming = terminal.moving
    assert "2/4 · 30 s each · 1 min 5 s · 55 s left" in running and len(running) <= terminal.console.width
    assert (detail, coming) == ("  trial 1: 98.00 % on val, fits", "  then gate")
    see(Progress(stage="repair", done=3, total=9))
    assert terminal.moving[1] == "  repairing layers 3/9"
    see(Progress(stage="benchmark", message="memory"))
    assert terminal.moving[1] == "  memory"
    assert len(terminal.lines) == 2


def test_nothing_is_wider_than_the_terminal(terminal: Terminal, clock: Clock) -> None:
    see, long = terminal.view, "a network that someone named at length, " * 6
    see(Planned(stages=("search", *(stage.name for stage in live_stages.PREPARATION), "benchmark", "gate", "golden")))
    see(Note(stage="search", text=long))
    see(Warned(stage="search", text=long))
    see(Started(stage="search"))
    clock.now += 100_000
    see(Progress(stage="search", done=12_345, total=99_999, message=long))
    drawn, last = [*terminal.lines, *terminal.moving], "".join(s.text for s in terminal.console.render(see))
    assert len(last.rstrip("\n").splitlines()[-1]) <= terminal.console.width - len("^C")  # as drawn, with all spaces
    assert max(map(len, drawn)) <= terminal.console.width and "27 h 46 min" in "".join(drawn)


def test_the_rate_of_a_resumed_stage_is_that_of_this_run(terminal: Terminal, clock: Clock) -> None:
    terminal.view(Started(stage="finetune"))
    clock.now += 1
    terminal.view(Progress(stage="finetune", done=500, total=600))
    assert "left" not in terminal.moving[0] and "each" not in terminal.moving[0]
    clock.now += 20
    terminal.view(Progress(stage="finetune", done=510, total=600))
    assert "510/600 · 2 s each · 21 s · 3 min 0 s left" in terminal.moving[0]


def test_short_preparation_leaves_no_line(terminal: Terminal, clock: Clock) -> None:
    with reported(terminal.view, "build_model"):
        assert terminal.moving[0].endswith("building the network")
    with reported(terminal.view, "load_data"):
        clock.now += 3
    assert [line.split() for line in terminal.lines] == [["✓", "data", "3.0", "s"]]


def test_what_a_pipeline_prints_goes_above_and_its_progress_bar_below(clock: Clock) -> None:
    terminal, streams = Terminal(80), (sys.stdout, sys.stderr)
    with pytest.raises(ValueError), terminal.view:
        terminal.view(Started(stage="load_data"))
        for part in range(1000):
            sys.stderr.write(f"\r{part} of 1000")
        assert terminal.moving[1] == "  999 of 1000"
        sys.stderr.write("\n")
        sys.stdout.write("2,000 samples\n")
        raise ValueError
    assert (sys.stdout, sys.stderr) == streams
    said = terminal.file.getvalue()
    assert "2,000 samples" in said and "500 of 1000" not in said and "✗ data" in said


def test_a_log_of_ten_hours_has_few_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    see = PlainStages()
    with reported(see, "load_data"):
        pass
    see(Planned(stages=("search",)))
    see(Started(stage="search"))
    for second in range(36_000):
        clock.now += 1
        see(Progress(stage="search", done=second + 1, total=36_000))
    see(Finished(stage="search"))
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "reading data" and last == "search          done in 600 min 0 s"
    assert 20 < len(lines) < 60 and lines[0] == "search          11 of 36000, about 599 min 49 s left"


def test_all_finalists_share_one_line_of_a_log(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them is stored as a stage of its own."""
    see = PlainStages()
    for seconds in (2.0, 3.0):
        with reported(see, "finalist"):
            clock.now += seconds
    see(Cached(stage="finalist"))
    see(Cached(stage="prune"))
    see(Cached(stage="finalist"))
    see(Started(stage="golden"))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said == ["finalists done in 5.0 s", "prune cached", "finalists cached"]


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true"), ("", "")])
def test_lines_are_drawn_again_in_a_real_terminal_only(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log that asks for colours is none: FORCE_COLOR is set in many CI jobs."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    if name:
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with shown_stages() as see:
        see(Started(stage="score"))
        see(Finished(stage="score"))
    assert capsys.readouterr().out == "score           done in 0.0 s\n"


def test_without_colour_the_view_still_moves(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    view = LiveStages(console, 15)
    view(Started(stage="score"))
    assert "score" in "".join(segment.text for segment in console.render(view))
    view(Finished(stage="score"))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "✓ score" in said and "[32m" not in said
