"""Runs for several targets at once: each is the command for its target in a process of its own."""

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

_GRACE_S = 2.0  # a terminal interrupts all its processes by itself, and a second interrupt would disturb the end


def run_commands(commands: Mapping[str, Sequence[str]], at_once: int, num_threads: int) -> dict[str, int]:
    """The exit code of each command, by name; one that is killed has minus the signal's number.

    At most `at_once` are at work at a time, each with `num_threads` threads. What they print begins with their name. An
    interrupt ends them all before it is raised here; where this process is killed, they end, too.
    """
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read when a process loads its libraries: here that is done
    context = multiprocessing.get_context("spawn")
    width = max(map(len, commands))
    waiting = [(name, context.Process(target=_run, args=(name.ljust(width), list(c)))) for name, c in commands.items()]
    at_work: dict[str, SpawnProcess] = {}
    codes: dict[str, int] = {}
    try:
        while waiting or at_work:
            while waiting and len(at_work) < at_once:
                name, process = waiting.pop(0)
                with _no_interrupts():  # nor in the process, until it can end well
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
    """They come when the block ends."""
    resource_tracker.ensure_running()  # the first process would start it, which lets interrupts through again
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
        os.kill(os.getpid(), signal.SIGKILL)  # a run loses nothing by it


@contextmanager
def _named(name: str) -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_NamedLines(stream, name) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _NamedLines(io.TextIOBase):
    """Whole lines, each after a name and in one piece, so that those of several processes do not mix."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._begun = stream, name, ""

    def fileno(self) -> int:
        """What a pipeline's own processes write to."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._name}  {line}".rstrip() + "\n")
            self._stream.flush()
        return len(text)
