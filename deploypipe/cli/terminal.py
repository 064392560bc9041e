"""What the user sees: progress, tables, the end."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploypipe.cli.exit_codes import EXIT_ERROR, EXIT_HOLD, EXIT_INTERRUPTED, say
from deploypipe.errors import RanksError
from deploypipe.records import (
    Cached,
    Check,
    Event,
    Finished,
    GateDecision,
    Note,
    Notify,
    Progress,
    Started,
    Verdict,
    Warned,
)
from deploypipe.records.stages import STAGES, title_of
from deploypipe.report.next_steps import next_steps
from deploypipe.report.run_tables import PRECISION_HEADER, before_after, check_cells, precision_rows, seconds
from deploypipe.runs.result import RunResult
from deploypipe.text.printable_text import printable

if TYPE_CHECKING:
    from deploypipe.benchmark.bench_results import BenchResult
    from deploypipe.training.ranks import Ranks

_WIDTH = max(len(stage.title) for stage in STAGES)
_QUIET_SECONDS = 10.0  # between two lines about the same stage, where there is no live list
COLOURS = {"PASS": "green", "FAIL": "red", "UNKNOWN": "yellow", "ok": "green", "missing": "red", "limited": "yellow"}


@contextmanager
def joined_ranks() -> Iterator["Ranks"]:
    """The processes that torchrun started. Those but the first say nothing about what the first one says."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # DDP warns on every rank of what we chose; torch reads this when it loads
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from deploypipe.training.ranks import join  # late: brings torch

    ranks = join()
    try:
        yield ranks
    except (KeyboardInterrupt, RanksError) as error:
        if ranks.is_first:
            raise
        sys.exit(EXIT_ERROR if isinstance(error, RanksError) else EXIT_INTERRUPTED)


def exit_code(decision: GateDecision) -> int:
    return 0 if decision.verdict is Verdict.SHIP else EXIT_HOLD


@contextmanager
def shown_stages(names: Sequence[str] = tuple(stage.name for stage in STAGES)) -> Iterator[Notify]:
    """A listener for the events of stages with these names: a live list in a terminal, plain lines elsewhere."""
    console = Console()
    with _kept_interrupts() as raise_if_interrupted:

        def show(event: Event) -> None:
            raise_if_interrupted()
            stages(event)

        stages: _PlainStages | _LiveStages = _PlainStages()
        if not console.is_terminal:
            yield show
            return
        columns = (
            bars.SpinnerColumn(finished_text="[green]✓[/]"),
            bars.TextColumn(f"{{task.description:<{_WIDTH}}}"),
            bars.BarColumn(bar_width=30),
            bars.TextColumn("{task.fields[note]:>13}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=console) as progress:
            stages = _LiveStages(progress, names)
            yield show
            stages.end()


@contextmanager
def _kept_interrupts() -> Iterator[Callable[[], None]]:
    """Raises an interrupt again that came where Python drops exceptions: in a finaliser, or below native code. Of the
    drop itself, which Python would print with a traceback, nothing is said."""
    is_pressed = False

    def handle(*_: object) -> None:
        nonlocal is_pressed
        is_pressed = True
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if is_pressed:
            raise KeyboardInterrupt

    def tell_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            tell_others(dropped)

    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_interrupted
        return
    tell_others = sys.unraisablehook
    sys.unraisablehook = tell_dropped
    signal.signal(signal.SIGINT, handle)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = tell_others


class _PlainStages:
    """One line for each stage that ends, and a few while it lasts.

    Work inside a stage (one trial's repair, the timed runs) reports progress under its own name. It is shown on the
    stage's line, but it does not tell how long the stage still takes.
    """

    def __init__(self) -> None:
        self.stage, self.begun, self.shown = "", 0.0, 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Started():
                self.stage, self.begun, self.shown = event.stage, now, now
            case Cached():
                _say_of(event.stage, "cached")
            case Finished():
                _say_of(event.stage, f"done in {seconds(now - self.begun)}")
            case Note():
                _say_of(event.stage, event.text)
            case Warned():
                say(f"warning: {event.text}", file=sys.stderr, flush=True)
            case Progress():
                if event.total and event.done and now - self.shown > _QUIET_SECONDS:
                    self.shown = now
                    _say_of(self.stage, self._progress_text(event, now - self.begun))

    def _progress_text(self, event: Progress, passed_s: float) -> str:
        text = f"{event.done} of {event.total}"
        if event.stage != self.stage:
            return f"{title_of(event.stage)} {text}"
        return f"{text}, about {seconds(passed_s / event.done * (event.total - event.done))} left"


def _say_of(stage: str, text: str) -> None:
    say(f"{title_of(stage):<{_WIDTH}} {text}", flush=True)


class _LiveStages:
    """All stages, with a bar for the one at work."""

    def __init__(self, progress: bars.Progress, names: Sequence[str]) -> None:
        self.progress = progress
        self.tasks: dict[str, bars.TaskID] = {stage: self._add(stage) for stage in names}
        self.stage = ""

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._start(event.stage)
            case Cached():
                self._update(total=1, completed=1, note="cached")
            case Finished():
                self._update(total=1, completed=1, note="done")
            case Note():
                self._print(f"{title_of(event.stage)}: {event.text}")
            case Warned():
                self._print(f"warning: {event.text}", style="yellow")
            case Progress():
                self._advance(event)

    def _start(self, stage: str) -> None:
        self.stage = stage
        if stage not in self.tasks:
            self.tasks[stage] = self._add(stage)
        self.progress.start_task(self.tasks[stage])
        self._update(total=None, completed=0, note="")  # it may be done a second time

    def _advance(self, event: Progress) -> None:
        if event.total and event.stage == self.stage:
            self._update(total=event.total, completed=event.done, note=f"{event.done}/{event.total}")
        elif event.total:  # work inside the stage
            self._update(note=f"{title_of(event.stage)} {event.done}/{event.total}")

    def _update(self, **fields: Any) -> None:
        """Change the bar of the stage at work, if one is."""
        if self.stage:
            self.progress.update(self.tasks[self.stage], **fields)

    def _print(self, text: str, style: str = "") -> None:
        self.progress.console.print(Text(printable(text), style=style))

    def end(self) -> None:
        """Stages that were not needed leave the list."""
        for task in self.progress.tasks:
            if not task.started:
                self.progress.remove_task(task.id)

    def _add(self, stage: str) -> bars.TaskID:
        return self.progress.add_task(title_of(stage), total=None, start=False, note="")


def show_result(result: RunResult, folder: Path) -> None:
    header = ("", "dense", "compressed", "change")
    show_table(f"{result.pipeline} on {result.target.name}", header, before_after(result))
    if result.precision:
        show_table("Precisions", PRECISION_HEADER, precision_rows(result.precision))
    for note in result.benchmark.notes:
        say(f"note: {note}")
    show_decision(result.decision)
    say(f"ONNX    {folder / 'model.onnx'}")
    if result.engine:
        say(f"engine  {folder / 'model.engine'} ({', '.join(result.engine.key.compute_capabilities)})")
    if (folder / "report.html").is_file():
        say(f"report  {folder / 'report.html'}")
    else:
        say("report  none; pip install 'deploypipe[report]', then `deploypipe report` with this folder")
    show_next_steps(result)


def show_next_steps(result: RunResult) -> None:
    """After HOLD: what to run next."""
    for step in next_steps(result):
        say(f"next    {step}")


def show_bench(result: "BenchResult") -> None:
    from deploypipe.report.bench_tables import (
        condition_rows,
        figure_rows,
        layer_rows,
        missing_lines,
        sweep_rows,
        verdict_lines,
    )

    file, other = result.file, result.against
    threads = f"{result.num_threads} thread{'s' * (result.num_threads != 1)}"
    about = f"{result.target}, {result.runtime}, batch {result.batch_size}, {threads}"
    show_table(f"{file.path} on {about}", *figure_rows(result))
    for measured in (file, other):
        if measured and measured.layers:
            show_table(
                f"Slowest operators of {measured.path}",
                ("node", "operator", "time", "share"),
                layer_rows(measured.layers),
            )
    for name, by_threads in (("batch", False), ("threads", True)):
        points, others = ([*(m.threads if by_threads else m.batches)] if m else [] for m in (file, other))
        if points:
            heads = (name, "latency p50", "throughput", *(("against, p50", "throughput") if others else ()))
            show_table(f"By {name}", heads, sweep_rows(points, others, by_threads=by_threads))
    show_table("The machine meanwhile", ("", "before", "after"), condition_rows(result.conditions))
    for line in (*missing_lines(result), *result.notes, *verdict_lines(result)):
        say(line)


def show_checks(checks: Sequence[Check], title: str = "Checks") -> None:
    show_table(title, ("check", "status", "measured", "limit", "reason"), [check_cells(check) for check in checks])


def show_decision(decision: GateDecision) -> None:
    show_checks(decision.checks, "Gate")
    colour = "green" if decision.verdict is Verdict.SHIP else "red"
    shown = Text.assemble((decision.verdict.value, f"bold {colour}"), f": {printable(decision.reason)}")
    Console(soft_wrap=True).print(shown, highlight=False)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console()
    header, rows = [*map(printable, header)], [[*map(printable, row)] for row in rows]
    if not console.is_terminal:
        lines = [list(header), *map(list, rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        say("")
        say(title)
        for line in lines:
            say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        say("")
        return
    table = Table(title=Text(printable(title)), title_justify="left")
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(c, style=COLOURS.get(c, "")) for c in row))
    console.print(table)
