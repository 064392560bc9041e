"""Let several runs share one machine: they compute together, and a run that measures has the machine to itself.

A run takes part by `shared_machine`. It measures inside `exclusive_measurement`, and pauses for the measurements of
others where it calls `yield_to_measurements`: when a stage begins (`runs.store`), when a trial begins (`search.study`),
and before each batch that is trained on (`training.epochs`) or evaluated (`benchmark.accuracy`). No other code knows
of it. The other long stages (observe, score, loss curves) are computed by one run for all, which need them to go on.

The locks are the kernel's: a run that is killed holds none. Nobody waits for a run that is stopped (Ctrl-Z).
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

_LOOK_EVERY_S = 0.25  # at which processes hold a lock
_POLL_S = 0.01
_TURN_S = 0.002  # enough for the next that waits to measure to take its turn before this run goes back to work


def machine() -> str:
    """The boot id of this machine, equal in all of its containers; its host name if the system has no boot id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


class _Lock:
    """A file's lock, in the order of asking."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w")
        self._saw_stopped = False

    def take(self, kind: int) -> None:
        """Wait for the lock (`fcntl.LOCK_EX` or `LOCK_SH`), but not for stopped processes: they disturb no measurement
        and may never continue."""
        if try_lock(self._file, kind):
            return
        if self._saw_stopped:  # each thread that gave up goes on waiting
            while not (_is_held_by_stopped(self._file) or try_lock(self._file, kind)):
                time.sleep(_POLL_S)
            return
        waiting = _Waiting(self._file, kind)
        while not waiting.has_ended(_LOOK_EVERY_S):
            if _is_held_by_stopped(self._file) and waiting.give_up():
                self._file, self._saw_stopped = self._path.open("w"), True
                return

    def is_free(self) -> bool:
        """Whether the lock can be shared right now."""
        if is_free := try_lock(self._file, fcntl.LOCK_SH):
            self.give_back()
        return is_free

    def give_back(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def leave(self) -> None:
        """Unlock, then close. Closing is not enough: forked processes (a data loader's workers) keep the file open."""
        self.give_back()
        self._file.close()


class _Waiting:
    """Wait for the lock in a thread, in the kernel's queue. A process that only polled could be overtaken for ever by
    one that takes the lock again and again."""

    def __init__(self, file: TextIO, kind: int) -> None:
        self._file, self._kind = file, kind
        self._guard, self._ended, self._is_over = threading.Lock(), threading.Event(), False
        threading.Thread(target=self._wait, daemon=True).start()

    def has_ended(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def give_up(self) -> bool:
        """Let the thread release the lock and close the file when it gets the lock; False if it has the lock."""
        with self._guard:
            self._is_over = not self._ended.is_set()
            return self._is_over

    def _wait(self) -> None:
        fcntl.flock(self._file, self._kind)
        with self._guard:
            if self._is_over:
                fcntl.flock(self._file, fcntl.LOCK_UN)
                self._file.close()
            self._ended.set()


class _Share:
    """One run's part in a shared machine.

    A run at work holds the `work` lock shared; a run that measures holds it exclusively. A run that wants to measure
    takes the `request` lock first, so that no other run goes back to work before its turn.
    """

    def __init__(self, request: _Lock, work: _Lock) -> None:
        self._request, self._work = request, work
        self._is_measuring = False
        self._go_to_work()

    def yield_to_measurements(self) -> None:
        if not self._is_measuring and not self._request.is_free():
            self._work.give_back()
            self._go_to_work()

    def sleep(self, seconds: float) -> None:
        if self._is_measuring:
            time.sleep(seconds)
            return
        self._work.give_back()
        time.sleep(seconds)
        self._go_to_work()

    @contextmanager
    def exclusive_measurement(self) -> Iterator[None]:
        self._work.give_back()
        self._request.take(fcntl.LOCK_EX)
        self._work.take(fcntl.LOCK_EX)
        self._is_measuring = True
        try:
            yield
        finally:
            self._is_measuring = False
            self._work.take(fcntl.LOCK_SH)
            self._request.give_back()
            self.sleep(_TURN_S)

    def leave(self) -> None:
        self._work.leave()
        self._request.leave()

    def _go_to_work(self) -> None:
        self._request.take(fcntl.LOCK_SH)
        self._work.take(fcntl.LOCK_SH)
        self._request.give_back()


_SHARE: ContextVar[_Share | None] = ContextVar("share", default=None)  # None: nothing but this run uses the machine


@contextmanager
def shared_machine(folder: Path) -> Iterator[None]:
    """Share this machine with all runs on it that name the same folder, for as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    share = _Share(*(_Lock(folder / f"{machine()[:8]}-{name}.lock") for name in ("request", "work")))
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)
        share.leave()


def yield_to_measurements() -> None:
    """Pause while other runs measure or wait to measure."""
    if share := _SHARE.get():
        share.yield_to_measurements()


def sleep_without_blocking(seconds: float) -> None:
    """Sleep while others may measure: a run that waits for others must not block them."""
    if share := _SHARE.get():
        share.sleep(seconds)
    else:
        time.sleep(seconds)


@contextmanager
def exclusive_measurement() -> Iterator[None]:
    """Use the machine alone: no other run that shares it computes or measures. Blocks do not nest."""
    share = _SHARE.get()
    if share is None:
        yield
        return
    with share.exclusive_measurement():
        yield


def try_lock(file: TextIO, kind: int) -> bool:
    """Whether the lock (`fcntl.LOCK_EX` or `LOCK_SH`) was free, and is held now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held_by_stopped(file: TextIO) -> bool:
    """Whether all processes that hold the lock are stopped; False if the system does not report it."""
    inode = str(os.fstat(file.fileno()).st_ino)
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        # 7: FLOCK ADVISORY READ 4711 fe:00:2146689 0 EOF
        holders = {lock[4] for lock in locks if lock[1] == "FLOCK" and lock[5].rpartition(":")[2] == inode}
        states = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] for process in holders]
    except OSError:
        return False
    return bool(states) and all(state in "Tt" for state in states)
