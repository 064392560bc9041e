"""The command `runs`: list run folders, and clean them."""

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploypipe.cli.app import LOOK, app
from deploypipe.cli.exit_codes import exit_codes, say
from deploypipe.errors import ConfigError

if TYPE_CHECKING:
    from deploypipe.runs.run_list import Run

_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_HEADER = ("run", "state", "verdict", "latency", "on disk", "age", "pipeline", "target")
_LESS_NEEDED = ("pipeline", "target", "on disk", "latency", "age")  # the usual name of a run has the first two


@app.command(rich_help_panel=LOOK, epilog="Example: deploypipe runs --clean --older-than 30d --keep-results")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder with run folders.")] = Path("runs"),
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove runs: all that meet the next options. At least one must be given.")
    ] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="With --clean: unchanged for that long: 12h, 30d or 8w.")
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="With --clean: runs that were interrupted, with their progress.")
    ] = False,
    keep_results: Annotated[
        bool,
        typer.Option(
            "--keep-results",
            help="With --clean: keep the model, the report and all that `gate` and `release` need; remove what the "
            "same command can compute again.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")] = False,
) -> None:
    """List the run folders in FOLDER: state, verdict, latency (dense = 1), size on disk and age; or remove some.

    "fast run" is a fast development run, which never ships. A narrow terminal shows fewer columns.
    A run that is at work is never removed, nor is any file that no run wrote.
    """
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.runs.run_list import list_runs, select_runs

        age = _parse_age(older_than) if older_than else None
        if not clean and (age or unfinished or keep_results):
            raise ConfigError("runs", "", "an option of --clean is given without it", "add --clean")
        if clean:
            _require_choice(age, unfinished=unfinished, keep_results=keep_results)
        found = list_runs(folder)
        if clean:
            found = select_runs(found, older_than=age, unfinished=unfinished, keep_results=keep_results)
        if not found:
            say(f"{folder}: {'nothing to clean' if clean else 'no runs'}")
            return
        now = datetime.now(UTC)
        show_table(f"Runs in {folder}", _HEADER, [_cells(run, folder, now) for run in found], may_drop=_LESS_NEEDED)
        if clean and (yes or _is_confirmed(len(found), keep_results=keep_results)):
            _clean(found, keep_results=keep_results)


def _parse_age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,4})([hdw])", text)
    if not match:
        raise ConfigError("--older-than", text, "is not an age", "write it like 12h, 30d or 8w")
    return int(match[1]) * _UNITS[match[2]]


def _require_choice(age: timedelta | None, *, unfinished: bool, keep_results: bool) -> None:
    if unfinished and keep_results:
        raise ConfigError(
            "--keep-results", "", "is given with --unfinished, and these runs have no results", "give one"
        )
    if age is None and not (unfinished or keep_results):
        raise ConfigError(
            "--clean", "", "does not say which runs", "add --older-than 30d, --unfinished or --keep-results"
        )


def _cells(run: "Run", folder: Path, now: datetime) -> tuple[str, ...]:
    from deploypipe.text.amounts import amount

    return (
        str(run.folder.relative_to(folder)),
        run.state,
        "fast run" if run.is_fast_dev_run else run.verdict,
        "" if run.latency_ratio is None else amount(run.latency_ratio, "x"),
        f"{run.size_bytes / 2**20:,.1f} MiB",
        _age_text(now - run.changed),
        run.pipeline,
        run.target,
    )


def _age_text(age: timedelta) -> str:
    hours = max(age.total_seconds(), 0.0) / 3600
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"


def _is_confirmed(num_runs: int, *, keep_results: bool) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("--clean", "", "asks before it removes anything, and nobody can answer here", "add --yes")
    what = "the intermediate files of" if keep_results else "all files of"
    if typer.confirm(f"Remove {what} {num_runs} run{'s' * (num_runs != 1)}?"):
        return True
    say("nothing was removed")
    return False


def _clean(found: "tuple[Run, ...]", *, keep_results: bool) -> None:
    from deploypipe.errors import RunFolderError
    from deploypipe.runs.run_list import clean_run

    freed, skipped = 0, 0
    for run in found:
        try:
            freed += clean_run(run, keep_results=keep_results)
        except RunFolderError as error:  # begun since it was listed
            say(f"warning: {error}", file=sys.stderr)
            skipped += 1
        else:
            if run.folder.exists() and not keep_results:
                say(f"note: {run.folder} holds files that no run wrote, and was kept with them")
    say(f"{len(found) - skipped} cleaned, {freed / 2**20:,.1f} MiB freed")
