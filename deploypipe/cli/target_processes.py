"""Compress for several targets at once: one process for each target, which runs the command for that target."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import TextIO

from deploypipe.cli.app import app
from deploypipe.cli.exit_codes import EXIT_INTERRUPTED

_GRACE_S = 2.0  # Ctrl-C in a terminal reaches the children too; a second interrupt would disturb their shutdown


def run_commands(commands: Mapping[str, Sequence[str]], at_once: int, num_threads: int) -> dict[str, int]:
    """Run each command in its own process; return the exit codes by name (minus the signal's number if killed).

    At most `at_once` processes run at a time, each with `num_threads` threads. Every line they print starts with their
    name. An interrupt stops all of them before it is raised here. If this process is killed, they stop too.
    """
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # for the children: libraries read it when they load
    context = multiprocessing.get_context("spawn")
    width = max(map(len, commands))
    waiting = [(name, context.Process(target=_run, args=(name.ljust(width), list(c)))) for name, c in commands.items()]
    at_work: dict[str, SpawnProcess] = {}
    codes: dict[str, int] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < at_once:
                name, process = waiting.pop(0)
                with _no_interrupts():  # the child inherits this, until it can handle an interrupt
                    process.start()
                at_work[name] = process
            wait([process.sentinel for process in at_work.values()])
            for name, process in list(at_work.items()):
                if process.exitcode is not None:
                    codes[name] = process.exitcode
                    del at_work[name]
    except KeyboardInterrupt:
        _interrupt(list(at_work.values()))
        raise
    return {name: codes[name] for name in commands}


def _interrupt(processes: Sequence[SpawnProcess]) -> None:
    until = time.monotonic() + _GRACE_S
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold interrupts back until the block ends."""
    resource_tracker.ensure_running()  # else the first child starts it, which unblocks interrupts
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _run(name: str, command: list[str]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with _named(name):
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            app(command)
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)  # finished stages are on disk, so the run can be resumed


@contextmanager
def _named(name: str) -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_NamedLines(stream, name) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _NamedLines(io.TextIOBase):
    """Write whole lines only, each after a name, so that the lines of several processes do not mix."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._begun = stream, name, ""

    def fileno(self) -> int:
        """The file that processes started by a pipeline write to."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._name}  {line}".rstrip() + "\n")
            self._stream.flush()
        return len(text)
