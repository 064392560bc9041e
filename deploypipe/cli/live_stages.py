"""The live view of a run: finished stages are lines, the running one moves, those to come are dim."""

import io
import sys
import time
from collections import deque
from types import TracebackType
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deploypipe.records import Cached, Event, Finished, Note, Planned, Progress, Started, Warned
from deploypipe.records.stages import PREPARATION, doing_of, title_of, work_of
from deploypipe.report.run_tables import seconds
from deploypipe.text.printable_text import printable

_REFRESH_PER_S = 8
_WIDE = 100  # columns; below, the bar is shorter
_BAR_WIDTHS = 14, 28
_MAX_STEPS = 50  # the rate is that of the latest steps
_LEAST_SHOWN_S = 0.5  # steps that prepare a run and take less leave no line
_UNSTORED = {stage.name for stage in PREPARATION}


class LiveStages:
    """Shows events until the block ends, which leaves only the lines of finished stages, notes and warnings."""

    def __init__(self, console: Console, title_width: int) -> None:
        self.console, self.title_width = console, title_width
        self.is_utf8 = console.encoding.lower().startswith("utf")
        self.running: RunningStage | None = None
        self.planned: tuple[str, ...] = ()
        self.live = Live(
            self,
            console=console,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "LiveStages":
        self.streams = sys.stdout, sys.stderr
        self.live.start()
        sys.stdout, sys.stderr = (_LinesAbove(stream, self) for stream in self.streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self.streams
        if self.running and isinstance(error, Exception):
            self._line("✗" if self.is_utf8 else "x", "red", self.running.stage, "")
        self.running = None
        self.live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Planned():
                self.planned = event.stages
            case Started():
                self.running = RunningStage(event.stage, "dots" if self.is_utf8 else "line")
            case Cached():
                self._end("cached")
            case Finished():
                self._end("")
            case Note():
                self.above(_indented(event.text))
            case Warned():
                self.above(Text(f"warning: {printable(event.text)}", style="yellow"))
            case Progress():
                if self.running:
                    self.running.advance(event)

    def above(self, text: RenderableType) -> None:
        """Print lasting lines above the live part."""
        self.console.print(text, highlight=False)

    def _end(self, note: str) -> None:
        """The running stage becomes a line."""
        if ended := self.running:
            self.running = None
            passed_s = time.monotonic() - ended.begun
            if ended.stage not in _UNSTORED or passed_s >= _LEAST_SHOWN_S:
                self._line("✓" if self.is_utf8 else "+", "green", ended.stage, note or seconds(passed_s))
            if ended.stage in self.planned:
                self.planned = self.planned[self.planned.index(ended.stage) + 1 :]

    def _line(self, mark: str, style: str, stage: str, note: str) -> None:
        title = f" {printable(title_of(stage)):<{self.title_width}}  "
        self.above(Text.assemble((mark, style), title, (note, "dim")))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - len("^C")  # a terminal's echo of Ctrl-C must not begin another line
        if running := self.running:
            yield running.row(self.title_width, _BAR_WIDTHS[options.max_width >= _WIDE])
            if running.detail:
                detail = Text(f"  {printable(running.detail)}", style="dim")
                detail.truncate(width, overflow="ellipsis")
                yield detail
        coming = [title_of(stage) for stage in self.planned if not running or stage != running.stage]
        if coming:
            for line in Text(f"then {', '.join(coming)}", style="dim").wrap(console, width - 2):
                yield Text("  ").append_text(line)


class RunningStage:
    """The stage at work: how much is done, how quickly, and what it does now."""

    def __init__(self, stage: str, spinner: str) -> None:
        self.stage, self.begun = stage, time.monotonic()
        self.spinner = Spinner(spinner, style="cyan")
        self.done, self.total, self.detail = 0, 0, ""
        self.steps: deque[tuple[float, int]] = deque([(self.begun, 0)], maxlen=_MAX_STEPS)  # (time, done)

    def advance(self, event: Progress) -> None:
        if event.stage != self.stage:  # work inside the stage
            work = work_of(event.stage)
            self.detail = f"{work} {event.done}/{event.total}" if event.total else event.message or work
            return
        self.detail = event.message
        if event.total:
            if not self.done and event.done > 1:  # a stage that was interrupted resumes there
                self.steps.clear()
            self.done, self.total = event.done, event.total
            self.steps.append((time.monotonic(), self.done))

    def row(self, title_width: int, bar_width: int) -> Table:
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        title = Text(f"{printable(doing_of(self.stage)):<{title_width}} ")
        bar = ProgressBar(total=self.total, completed=self.done, width=bar_width) if self.total else Text("")
        grid.add_row(self.spinner, title, bar, Text(self.figures(time.monotonic()), style="cyan"))
        return grid

    def figures(self, now: float) -> str:
        """The steps done, their rate, the time since the start and the time left, as far as they are known."""
        passed_s = now - self.begun
        parts = [f"{self.done}/{self.total}"] if self.total else []
        per_step = self._seconds_per_step()
        if per_step:
            parts.append(f"{_short(1 / per_step)}/s" if per_step < 1 else f"{_short(per_step)} s each")
        if passed_s >= 1:
            parts.append(_whole(passed_s))
        if per_step and self.done < self.total:
            left_s = per_step * (self.total - self.done) - (now - self.steps[-1][0])
            parts.append(f"{_whole(max(left_s, 1))} left")
        return " · ".join(parts) if len(parts) > 1 else "".join(parts)

    def _seconds_per_step(self) -> float:
        """0 if it is not known yet."""
        (since, before), (until, after) = self.steps[0], self.steps[-1]
        return (until - since) / (after - before) if after > before and until > since else 0.0


def _indented(text: str) -> Padding:
    """A dim paragraph."""
    return Padding(Text(printable(text), style="dim"), (0, 0, 0, 2))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _whole(value: float) -> str:
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _LinesAbove(io.TextIOBase):
    """Show a pipeline's own output. Whole lines go above the live view. An unfinished line, such as a progress bar, is
    shown with the stage that runs."""

    def __init__(self, stream: TextIO, view: LiveStages) -> None:
        self._stream, self._view, self._begun = stream, view, ""

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._view.above(Text.from_ansi(line.rpartition("\r")[2]))
        self._begun = self._begun[-10_000:]
        if self._view.running and (shown := self._begun.rstrip("\r").rpartition("\r")[2].strip()):
            self._view.running.detail = shown
        return len(text)
