"""Runs side by side on one machine: they compute together, and one that measures has the machine to itself.

Between two steps of its work a run gives way to those that wait to measure. The locks are the kernel's: a run that is
killed holds none, and for one that is stopped (Ctrl-Z) nobody waits.
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

_LOOK_EVERY_S = 0.25  # at who holds a lock
_POLL_S = 0.01
_TURN_S = 0.002  # enough for the next at the door to take it, before this run goes in again and has to give way


def machine() -> str:
    """This machine since it was started, the same in all of its containers; its name where the system does not tell."""
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
        """Wait for it (`fcntl.LOCK_EX` or `LOCK_SH`), but not for processes that were stopped: they disturb nobody, and
        may never go on."""
        if try_lock(self._file, kind):
            return
        if self._saw_stopped:  # each thread that gave up waits on
            while not (_is_held_by_stopped(self._file) or try_lock(self._file, kind)):
                time.sleep(_POLL_S)
            return
        waiting = _Waiting(self._file, kind)
        while not waiting.has_ended(_LOOK_EVERY_S):
            if _is_held_by_stopped(self._file) and waiting.give_up():
                self._file, self._saw_stopped = self._path.open("w"), True
                return

    def is_free(self) -> bool:
        """Whether it could be shared at once."""
        if is_free := try_lock(self._file, fcntl.LOCK_SH):
            self.give_back()
        return is_free

    def give_back(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def leave(self) -> None:
        """What was forked meanwhile, a data loader's workers, has the file open still: closing it is not enough."""
        self.give_back()
        self._file.close()


class _Waiting:
    """A thread waits for the lock in the kernel's queue: who only looked now and then would never come before one that
    takes the lock again and again."""

    def __init__(self, file: TextIO, kind: int) -> None:
        self._file, self._kind = file, kind
        self._guard, self._ended, self._is_over = threading.Lock(), threading.Event(), False
        threading.Thread(target=self._wait, daemon=True).start()

    def has_ended(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def give_up(self) -> bool:
        """The lock goes back, and the file is closed, as soon as it is there. False where it is there already."""
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


class _Place:
    """A run's place beside others: it holds `room` shared while it computes, and alone while it measures.

    Who wants to measure closes `door` first, so that nobody comes back into the room before it had its turn.
    """

    def __init__(self, door: _Lock, room: _Lock) -> None:
        self._door, self._room = door, room
        self._is_alone = False
        self._enter()

    def give_way(self) -> None:
        """Wait outside for as long as others measure, or wait to."""
        if not self._is_alone and not self._door.is_free():
            self._room.give_back()
            self._enter()

    def pause(self, seconds: float) -> None:
        """Outside: who sleeps disturbs nobody, and holds up nobody that wants to measure."""
        if self._is_alone:
            time.sleep(seconds)
            return
        self._room.give_back()
        time.sleep(seconds)
        self._enter()

    @contextmanager
    def alone(self) -> Iterator[None]:
        self._room.give_back()
        self._door.take(fcntl.LOCK_EX)
        self._room.take(fcntl.LOCK_EX)
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False
            self._room.take(fcntl.LOCK_SH)
            self._door.give_back()
            self.pause(_TURN_S)

    def leave(self) -> None:
        self._room.leave()
        self._door.leave()

    def _enter(self) -> None:
        self._door.take(fcntl.LOCK_SH)
        self._room.take(fcntl.LOCK_SH)
        self._door.give_back()


_PLACE: ContextVar[_Place | None] = ContextVar("place", default=None)  # where a file is timed, no run is in hand


@contextmanager
def side_by_side(folder: Path) -> Iterator[None]:
    """This run computes and measures in turn with all on this machine that are side by side in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    place = _Place(*(_Lock(folder / f"{machine()[:8]}-{name}.lock") for name in ("door", "room")))
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)
        place.leave()


def give_way() -> None:
    """Between two steps of a run's work: wait for as long as runs beside it measure, or wait to."""
    if place := _PLACE.get():
        place.give_way()


def pause(seconds: float) -> None:
    """Sleep, and let others measure meanwhile: least of all may a run hold up what it waits for."""
    if place := _PLACE.get():
        place.pause(seconds)
    else:
        time.sleep(seconds)


@contextmanager
def alone() -> Iterator[None]:
    """For as long as the block lasts, no run beside this one computes or measures. Blocks do not nest."""
    place = _PLACE.get()
    if place is None:
        yield
        return
    with place.alone():
        yield


def try_lock(file: TextIO, kind: int) -> bool:
    """Whether the lock (`fcntl.LOCK_EX` or `LOCK_SH`) was to be had at once, and is held now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held_by_stopped(file: TextIO) -> bool:
    """Whether all that hold the lock are stopped; False where the system does not tell."""
    inode = str(os.fstat(file.fileno()).st_ino)
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        # 7: FLOCK ADVISORY READ 4711 fe:00:2146689 0 EOF
        holders = {lock[4] for lock in locks if lock[1] == "FLOCK" and lock[5].rpartition(":")[2] == inode}
        states = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] for process in holders]
    except OSError:
        return False
    return bool(states) and all(state in "Tt" for state in states)
