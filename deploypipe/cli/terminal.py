"""Print the end of a run: tables, the decision, the files."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploypipe.cli.exit_codes import EXIT_ERROR, EXIT_HOLD, EXIT_INTERRUPTED, say
from deploypipe.errors import RanksError
from deploypipe.records import Check, GateDecision, Status, Verdict
from deploypipe.report.next_steps import next_steps
from deploypipe.report.run_tables import PRECISION_HEADER, before_after, check_rows, precision_rows
from deploypipe.runs.result import RunResult
from deploypipe.text.printable_text import printable

if TYPE_CHECKING:
    from deploypipe.benchmark.bench_results import BenchResult
    from deploypipe.training.ranks import Ranks

MAX_PAGE_WIDTH = 100  # columns
_WIDE = 140  # columns of a terminal in which sentences fit into a table
_BETWEEN, _AT_EDGES = 3, 2  # columns between two cells of a table in a terminal, and around a row
_AS_ABOVE = "as above"
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


def show_result(result: RunResult, folder: Path) -> None:
    header = ("", "dense", "compressed", "change")
    show_table(f"{result.pipeline} on {result.target.name}", header, before_after(result))
    if result.precision:
        show_table("Precisions", PRECISION_HEADER, precision_rows(result.precision), has_remarks=True)
    reasons = "; ".join(check.reason for check in result.decision.checks)
    for note in result.benchmark.notes:
        if note not in reasons:  # which the next table shows
            say(f"note: {note}")
    show_decision(result.decision)
    if result.search and result.search.winner is not None:
        say(f"trial   {result.search.best}, as asked for; the search chose trial {result.search.winner}")
    weights = [entry.name for entry in result.benchmark.compressed.file.data]
    say(f"ONNX    {folder / 'model.onnx'}{f', with its weights in {weights[0]} next to it' if weights else ''}")
    if result.engine:
        say(f"engine  {folder / 'model.engine'} ({', '.join(result.engine.key.compute_capabilities)})")
    if (folder / "report.html").is_file():
        say(f"report  {folder / 'report.html'}")
    else:
        say("report  none; pip install 'deploypipe[report]', then `deploypipe report` with this folder")
    show_next_steps(result)


def show_next_steps(result: RunResult) -> None:
    """The command to run next after HOLD."""
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
    """A row for each check; one with the reason of the row above says so."""
    rows = [(*row.cells, row.reason if row.num_rows else _AS_ABOVE) for row in check_rows(checks)]
    show_table(title, ("check", "status", "measured", "limit", "reason"), rows, has_remarks=True)


def show_decision(decision: GateDecision) -> None:
    """The checks with their reasons, and the verdict. HOLD names its checks only: their reasons are in the table."""
    show_checks(decision.checks, "Gate")
    is_ship = decision.verdict is Verdict.SHIP
    text = decision.reason if is_ship else _held(decision)
    shown = Text.assemble((decision.verdict.value, "bold green" if is_ship else "bold red"), f": {printable(text)}")
    Console(soft_wrap=True).print(shown, highlight=False)


def _held(decision: GateDecision) -> str:
    """List the failed and the unknown checks."""
    words = {Status.FAIL: "failed", Status.UNKNOWN: "unknown"}
    held = [check for check in decision.checks if not check.is_settled]
    names = {status: [check.name.replace("_", " ") for check in held if check.status is status] for status in words}
    return "; ".join(f"{', '.join(names[status])} {word}" for status, word in words.items() if names[status])


def show_paragraph(text: str) -> None:
    """Lines that fit the terminal, or a page; all but the first are indented."""
    width = min(Console().width, MAX_PAGE_WIDTH) if sys.stdout.isatty() else MAX_PAGE_WIDTH
    for line in wrap(printable(text), width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
        say(line)


def show_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    has_remarks: bool = False,
    may_drop: Sequence[str] = (),
) -> None:
    """A table: with colours in a terminal, plain columns elsewhere.

    has_remarks: the last column holds sentences. In a terminal that is too narrow for them they follow as paragraphs.
    may_drop: columns to leave out of a terminal that is too narrow, the first one first.
    """
    console = Console()
    header, rows = [*map(printable, header)], [[*map(printable, row)] for row in rows]
    if not console.is_terminal:
        _show_columns(title, header, rows)
        return
    is_narrow = has_remarks and console.width < _WIDE
    width = len(header) - is_narrow
    if may_drop:
        header, rows = _without_columns(header, rows, may_drop, console.width)
        width = len(header)
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in header[:width]:
        table.add_column(Text(name), overflow="fold", no_wrap=bool(may_drop) and name != header[0])
    for row in rows:
        table.add_row(*(Text(c, style=COLOURS.get(c, "")) for c in row[:width]))
    console.print()
    console.print(table)
    for name, remark in _remarks(rows) if is_narrow else ():
        show_paragraph(f"{name}: {remark}")


def _without_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], may_drop: Sequence[str], available: int
) -> tuple[list[str], list[list[str]]]:
    """The columns that fit, of a table that may lose some."""
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    for name in may_drop:
        widths = [max(map(len, (head, *cells))) for head, cells in columns.items()]
        if sum(widths) + _BETWEEN * (len(widths) - 1) + _AT_EDGES <= available:
            break
        del columns[name]
    return [*columns], [list(row) for row in zip(*columns.values(), strict=True)]


def _remarks(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The first cells of the rows that share a remark, and the remark. That of a check that passed is left out."""
    found: list[tuple[str, str]] = []
    for name, *cells, remark in rows:
        if remark == _AS_ABOVE and found:
            found[-1] = (f"{found[-1][0]}, {name}", found[-1][1])
        elif remark and "PASS" not in cells:
            found.append((name, remark))
    return found


def _show_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    say("")
    say(title)
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    say("")
