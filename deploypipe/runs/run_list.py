"""List the run folders below a folder, and remove them, or what can be computed again.

from deploypipe.runs.run_list import clean_run, list_runs, select_runs
for run in select_runs(list_runs("runs"), older_than=timedelta(days=30)):
    clean_run(run, keep_results=True)
"""

import fcntl
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TextIO

from deploypipe.errors import DeploypipeError, RunFolderError
from deploypipe.runs.result import RESULT, RunResult, load_result
from deploypipe.runs.run_about import ABOUT, read_about
from deploypipe.runs.store import DATA_HASHES, LOCK, MLFLOW_RUN
from deploypipe.scheduling.exclusive_measurement import try_lock

_MAX_DEPTH = 2  # runs/PIPELINE/TARGET
_HASH = "[0-9a-f]{16}"
_STAGE_RECORD = re.compile(rf"\d\d-[a-z_]+-{_HASH}\.json")
_INTERMEDIATE = re.compile(
    rf"\d\d-[a-z_]+-{_HASH}(\.json|\.part)?|[a-z_]+-{_HASH}\.lock|(accuracies|teacher-outputs)-{_HASH}"
    rf"|study-{_HASH}\.db(-journal|-wal|-shm)?|\..*\.part\d*"
)
_RESULTS = re.compile(
    r"result\.json|report\.html|model\.onnx.*|model\.engine.*|golden\.(json|safetensors)|weights\.safetensors"
)

State = Literal["finished", "interrupted", "running", "shared", "unreadable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder. `verdict` and `latency_ratio` of a run that is not finished are empty and None."""

    folder: Path
    state: State  # shared: stages for several targets; unreadable: its result was changed, or is of another version
    size_bytes: int
    changed: datetime
    pipeline: str = ""
    target: str = ""
    verdict: str = ""
    latency_ratio: float | None = None  # compressed / dense
    is_fast_dev_run: bool = False


def list_runs(folder: Path | str = "runs") -> tuple[Run, ...]:
    """The runs in a folder and two levels below it, the latest first. Other folders are left out.

    RunFolderError if the folder is absent.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: is not a folder; give the one that run folders are in (default: runs)")
    found = [_describe(path) for path in _folders(folder, _MAX_DEPTH) if _is_run(path)]
    return tuple(sorted(found, key=lambda run: run.changed, reverse=True))


def select_runs(
    runs: Sequence[Run],
    *,
    older_than: timedelta | None = None,
    unfinished: bool = False,
    keep_results: bool = False,
    now: datetime | None = None,
) -> tuple[Run, ...]:
    """The runs to clean: those that are not running and meet every condition given.

    unfinished: interrupted runs only. keep_results: only runs that have results, and shared stages.
    """
    states: set[State] = {"interrupted", "finished", "shared", "unreadable"}
    if unfinished:
        states &= {"interrupted"}
    if keep_results:
        states &= {"finished", "shared"}
    until = (now or datetime.now(UTC)) - (older_than or timedelta(0))
    return tuple(run for run in runs if run.state in states and run.changed <= until)


def clean_run(run: Run, *, keep_results: bool = False) -> int:
    """Remove a run, or with `keep_results` only what the same command can compute again. Return the bytes freed.

    Kept results are all that `report`, `gate`, `release` and `verify` need. Only files that a run writes are removed:
    the folder stays if it holds others. RunFolderError if a run is at work in it.
    """
    with _opened_lock(run.folder) as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise RunFolderError(f"{run.folder}: a run is at work here; wait for it, or stop it")
        if not _is_run(run.folder):
            raise RunFolderError(f"{run.folder}: is not a run folder; nothing was removed")
        before = _size(run.folder)
        for path in sorted(run.folder.iterdir()):
            if _INTERMEDIATE.fullmatch(path.name) or (not keep_results and _RESULTS.fullmatch(path.name)):
                _remove(path)
        after = _size(run.folder)
        if not keep_results:
            for name in (DATA_HASHES, MLFLOW_RUN, ABOUT, LOCK):
                (run.folder / name).unlink(missing_ok=True)
            if not any(run.folder.iterdir()):
                run.folder.rmdir()
    return before - after


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder and those below it, without links and hidden ones."""
    yield folder
    if depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _folders(path, depth - 1)


def _is_run(folder: Path) -> bool:
    """Whether a run wrote its lock and at least one of its own files there."""
    if not (folder / LOCK).is_file():
        return False
    names = [path.name for path in folder.iterdir()]
    return RESULT in names or DATA_HASHES in names or any(_STAGE_RECORD.fullmatch(name) for name in names)


def _describe(folder: Path) -> Run:
    state, result = _state(folder)
    newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    changed = datetime.fromtimestamp(newest, UTC)
    about = read_about(folder)
    run = Run(
        folder=folder,
        state=state,
        size_bytes=_size(folder),
        changed=changed,
        pipeline=about.pipeline,
        target=about.target,
        is_fast_dev_run=about.is_fast_dev_run,
    )
    if result is None:
        return run
    ratio = result.benchmark.latency_ratio
    return replace(
        run,
        pipeline=result.pipeline,
        target=result.target.name or result.target.runtime,
        verdict=result.decision.verdict.value,
        latency_ratio=ratio.value if ratio else None,
        is_fast_dev_run=result.recipe.fast_dev_run,
    )


def _state(folder: Path) -> tuple[State, RunResult | None]:
    with _opened_lock(folder) as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            return "running", None
    if not (folder / RESULT).is_file():
        return ("interrupted" if (folder / DATA_HASHES).is_file() else "shared"), None
    try:
        return "finished", load_result(folder)
    except DeploypipeError:
        return "unreadable", None


@contextmanager
def _opened_lock(folder: Path) -> Iterator[TextIO]:
    try:
        lock = (folder / LOCK).open()
    except OSError as error:
        raise RunFolderError(f"{folder / LOCK}: {error.strerror}; the folder holds no run") from None
    with lock:
        yield lock


def _size(folder: Path) -> int:
    """Bytes of all files below; of a file with several names once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_size for path in folder.rglob("*") if (stat := path.lstat())}
    return sum(files.values())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
