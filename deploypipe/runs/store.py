"""The run folder: finished stages stay finished, even if the run is killed.

Each stage leaves `NN-stage-<key>.json` (the record, and the hashes of its files) next to a folder of the same name with
its files. The key is a hash of everything the stage depends on. A record is written last and by rename, so it either
exists whole or not at all. It is sealed, and names its key: a changed record, or one that lies under another stage's
name, is computed again, with a warning.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TextIO, TypeVar

from deploypipe.errors import ExhaustedError, RunFolderError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.exhausted_resources import find_exhaustion
from deploypipe.files.hashing import digest, file_sha256
from deploypipe.files.json_records import from_plain, to_plain
from deploypipe.records import Cached, Finished, Note, Notify, StageTime, Started, Warned, silent
from deploypipe.runs.stage_mirror import download_stage, upload_stage
from deploypipe.scheduling.exclusive_measurement import (
    shared_machine,
    sleep_without_blocking,
    try_lock,
    yield_to_measurements,
)
from deploypipe.text import strict_json
from deploypipe.text.masked_addresses import masked
from deploypipe.text.sealed_json import seal, unseal

T = TypeVar("T")
LOCK = "run.lock"
MLFLOW_RUN = "mlflow.json"  # the run of MLflow that the same command continues (`deploypipe.tracking`)
DATA_HASHES = "data.hashes"  # a hash of each split, to say at the next run what changed
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult(Generic[T]):
    """The result of a stage. It is passed to the stages that need it; no stage is looked up by name."""

    record: T
    key: str  # a hash of all that the stage depends on: equal keys, equal results
    files: Path  # the folder of the stage's files


@dataclass(slots=True)
class RunFolder:
    """An open, locked run folder. Use `open_run`."""

    path: Path
    notify: Notify = silent
    shared: Path | None = None  # holds the stages that do not depend on the target, for runs for other targets too
    source: str = ""  # of a worker, which computes no stage: the address where the run it helps left its stages
    finished: list[Path] = field(default_factory=list)  # folders of the stages finished in this run
    times: list[StageTime] = field(default_factory=list)
    remeasure: bool = False  # measure again in those stages that allow it

    def remember(
        self,
        stage: str,
        inputs: Mapping[str, object],
        compute: Callable[[Path], T],
        record_type: type[T],
        *,
        is_shared: bool = False,
        is_final: Callable[[T], bool] | None = None,
    ) -> StageResult[T]:
        """Read the result of `stage` for these inputs if it is there and whole; compute and store it otherwise.

        `compute` is given the folder for the stage's files. It outlives a kill, so checkpoints go there too; only its
        hidden files do not outlive one. Only a success is stored. A stage's number is its place in the run that came to
        it first.

        is_shared: runs for other targets find the result too. Of several runs at work at once, one computes it, and the
        others wait.
        is_final: the next run computes a record again if this returns False for it, or if `remeasure` is set; at most
        once a run.
        """
        hashes = {name: digest(value) for name, value in inputs.items()}
        key = f"{stage}-{digest([stage, hashes])}"
        yield_to_measurements()
        self.notify(Started(stage=stage))
        if not (is_shared and self.shared):
            return self._remember(stage, key, self.path, hashes, compute, record_type, is_final)
        with self._in_turn(stage, self.shared / f"{key}.lock"):
            return self._remember(stage, key, self.shared, hashes, compute, record_type, is_final)

    def _remember(
        self,
        stage: str,
        key: str,
        root: Path,
        hashes: dict[str, str],
        compute: Callable[[Path], T],
        record_type: type[T],
        is_final: Callable[[T], bool] | None,
    ) -> StageResult[T]:
        known = sorted(root.glob(f"[0-9][0-9]-{key}.*"))  # a record, or the folder of one that was interrupted
        at = root / (known[0].stem if known else f"{len(self.times) + 1:02d}-{key}")
        if self.source:
            at = download_stage(key, self.source, root) or at
        stored = self._read(stage, key, at)
        if stored and is_final and at not in self.finished:  # else this run computed it
            is_kept = not self.remeasure and is_final(from_plain(record_type, stored[0], at.name))
            stored = stored if is_kept else None
        if self.source and not stored:
            raise RunFolderError(
                f"{masked(self.source)}: has no sound stage {key}, so this process is not about the run that is there: "
                f"see that it has the same pipeline, target and settings"
            )
        record, seconds = stored if stored else _compute(at, key, hashes, compute)
        if at not in self.finished:
            self.finished.append(at)
            self.times.append(StageTime(stage=stage, seconds=seconds, was_cached=stored is not None))
        self.notify(Cached(stage=stage) if stored else Finished(stage=stage, seconds=seconds))
        return StageResult(record=from_plain(record_type, record, at.name), key=key.rsplit("-", 1)[-1], files=at)

    @contextmanager
    def _in_turn(self, stage: str, path: Path) -> Iterator[None]:
        """If several runs need the stage at once, one computes it; the others wait and read it."""
        with path.open("w") as lock:
            if not try_lock(lock, fcntl.LOCK_EX):
                self.notify(Note(stage=stage, text="waits for another run, which is at it"))
                while not try_lock(lock, fcntl.LOCK_EX):
                    sleep_without_blocking(_POLL_S)
            yield

    def publish(self, url: str) -> None:
        """Copy the stages finished so far to where workers find them, if that is not here."""
        for at in self.finished:
            upload_stage(at, url)

    def _read(self, stage: str, key: str, at: Path) -> tuple[object, float] | None:
        path = _record_of(at)
        if not path.is_file():
            return None
        if stored := read_record(at, key):
            return stored
        self.notify(Warned(stage=stage, text=f"{path} or one of its files is damaged; computing it again"))
        path.unlink()
        shutil.rmtree(at, ignore_errors=True)
        return None


def read_record(at: Path, key: str) -> tuple[object, float] | None:
    """The record of the stage with that key whose files are in `at`, and the seconds it took; None where the record or
    a file is absent, was changed, or is of another stage."""
    try:
        stored = strict_json.loads_any_float(unseal(_record_of(at).read_bytes()))
        is_sound = stored["key"] == key and all(
            file_sha256(at / file) == sha256 for file, sha256 in stored["files"].items()
        )
        return (stored["record"], float(stored["seconds"])) if is_sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_of(at: Path) -> Path:
    return at.with_name(f"{at.name}.json")


def _compute(at: Path, key: str, hashes: dict[str, str], compute: Callable[[Path], T]) -> tuple[object, float]:
    work = at.with_name(f"{at.name}.part")
    shutil.rmtree(at, ignore_errors=True)  # renamed by a run that was killed before it wrote the record
    work.mkdir(exist_ok=True)
    _remove_scratch(work)
    started = time.perf_counter()
    record = to_plain(compute(work))
    seconds = time.perf_counter() - started
    files = {str(p.relative_to(work)): file_sha256(p) for p in sorted(work.rglob("*")) if p.is_file()}
    work.replace(at)
    stored = {"key": key, "inputs": hashes, "seconds": seconds, "files": files, "record": record}
    write_atomically(_record_of(at), seal(strict_json.dumps(stored, sort_keys=False)))
    return record, seconds


def _remove_scratch(work: Path) -> None:
    """Hidden files and folders that a killed run left at work."""
    for path in work.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def open_run(
    path: Path, notify: Notify = silent, shared: Path | None = None, source: str = "", place: Path | None = None
) -> Iterator[RunFolder]:
    """Open (or make) a run folder, locked against a second run for as long as the block lasts.

    Runs with the same folder `shared` may be at work at once: what one computes the others find. While one run
    measures, all runs on its machine with the same `place` (which is `shared`, unless it is given) pause.
    """
    if shared and shared.resolve() == path.resolve():
        raise RunFolderError(f"{path}: a run's own folder is not that of all runs; choose another folder with --shared")
    with ExitStack() as stack:
        if shared:
            stack.enter_context(_joined(shared))
        stack.enter_context(_locked(path))
        if place := place or shared:
            stack.enter_context(shared_machine(place))
        stack.enter_context(_what_is_kept(path, shared))
        yield RunFolder(path=path, notify=notify, shared=shared, source=source)


@contextmanager
def _what_is_kept(path: Path, shared: Path | None) -> Iterator[None]:
    """If the machine runs out of something, raise one error that says what is kept and how to continue."""
    try:
        yield
    except Exception as error:
        for folder in (path, shared):
            if folder and not (folder / LOCK).exists():
                raise RunFolderError(
                    f"{folder}: was deleted or moved while the run was at work in it, with what it had finished; "
                    "run the same command again"
                ) from error
        if found := find_exhaustion(error):
            problem, remedy = found
            raise ExhaustedError(
                f"{path}: {problem}; {remedy}, and run the same command again: it goes on after the last finished stage"
            ) from error
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone in the folder."""
    with _opened_lock(path, "--out") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise RunFolderError(f"{path}: another run is at work here; wait for it or choose another --out")
        _remove_parts(path)
        yield


@contextmanager
def _joined(path: Path) -> Iterator[None]:
    """In the folder with other runs."""
    with _opened_lock(path, "--shared") as lock:
        if try_lock(lock, fcntl.LOCK_EX):  # what is half-written is nobody's
            _remove_parts(path)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def _opened_lock(path: Path, option: str) -> Iterator[TextIO]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("w")
    except OSError as error:
        problem = "is a file" if path.is_file() else f"cannot be written ({error.strerror})"
        raise RunFolderError(f"{path}: {problem}; choose another folder with {option}") from None
    with lock:
        yield lock


def _remove_parts(folder: Path) -> None:
    """Unfinished files, and SQLite's journals, of a killed run."""
    for part in [*folder.glob(".*.part*"), *folder.glob("*/.*.part")]:
        part.unlink()
