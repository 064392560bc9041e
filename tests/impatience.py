"""Runs in tests measure for a moment, the memory of a file once, and wait neither for a quiet machine nor for the disk;
an export is a third cheaper."""

import os
import sqlite3.dbapi2
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from deploypipe.benchmark import latency, memory
from deploypipe.files.hashing import file_sha256
from deploypipe.target import Budget


@cache
def hurry() -> None:
    """For this process, and those that it forks. Others do when they import `tiny_pipeline`."""
    latency._SECONDS, latency._PAUSE_SECONDS, latency._MAX_CHECKS = 0.0, 0.0, 0
    memory._NUM_CHILDREN, memory.run_child = 1, _once_for_a_file(memory.run_child)
    # Tests kill processes, not machines: what was written stays, whether or not it has reached the disk.
    os.fsync = lambda _: None
    sqlite3.dbapi2.connect = _without_waiting(sqlite3.dbapi2.connect)
    with suppress(ImportError):  # it is private to torch, which makes its table of 700 operators again for each file
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


def _once_for_a_file(run: Any) -> Any:
    """Remembered by the bytes of the file: runs measure the dense network again and again."""
    known: dict[object, Any] = {}

    def remembered(script: str, path: Path, inputs: Any, target: Any, **options: Any) -> Any:
        shapes = [(name, array.shape, str(array.dtype)) for name, array in inputs.items()]
        if not path.is_file():
            return run(script, path, inputs, target, **options)
        key = repr((script, file_sha256(path), shapes, replace(target, name="", budget=Budget()), options))
        if key not in known:
            known[key] = run(script, path, inputs, target, **options)
        return known[key]

    return remembered


def _without_waiting(connect: Any) -> Any:
    def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        with suppress(sqlite3.Error):  # of a file that is no database: the first statement says so
            connection.execute("PRAGMA synchronous = OFF")
        return connection

    return connected
