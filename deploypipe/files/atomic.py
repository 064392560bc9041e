"""Files that appear whole or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar
from deploypipe.errors import ExhaustedError, RunFolderError
from deploypipe.files.exhausted_resources import find_exhaustion
from deploypipe.files.json_records import from_json, from_plain, to_json, to_plain
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BaselineComparison,
    BenchmarkReport,
    EngineFile,
    Event,
    GateDecision,
    Golden,
    Origin,
    PrecisionChoice,
    Progress,
    PruneReport,
    PruningPlan,
    RepairReport,
    ScoreSummary,
    SearchResult,
    StageTime,
    Structures,
    TrainLog,
    silent,
)
from deploypipe.runs.stage_mirror import download_stage, upload_stage
from deploypipe.scheduling.exclusive_measurement import give_way, pause, side_by_side, try_lock
from deploypipe.target import Target
from deploypipe.text import strict_json
from deploypipe.text.masked_addresses import masked
from deploypipe.text.sealed_json import seal, unseal



def place_file(source: Path, path: Path) -> None:
    """A second, stable name for a file: a hard link where the file system has them, else a copy; atomic."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(path)
    part.unlink(missing_ok=True)  # two names of one file are not renamed to each other


def write_atomically(path: Path, content: bytes) -> None:
    """Write and flush beside `path`, then rename over it: readers see the old content or the new, never a part.

    A device or a shell's name of a stream (/dev/stdout) is written to and stays what it is.
    """
    if _is_stream(path):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # others may be at the same file
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _is_stream(path: Path) -> bool:
    is_in_dev = path.is_absolute() and path.parts[1:2] == ("dev",)
    return path.is_char_device() or (is_in_dev and path.is_symlink())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
