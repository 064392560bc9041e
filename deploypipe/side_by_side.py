"""Runs side by side on one machine: they compute together, and one that measures has the machine to itself.

Between two steps of its work a run gives way to those that wait to measure. The locks are the kernel's: a run that is
killed holds none, and for one that is stopped (Ctrl-Z) nobody waits.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import TextIO

_POLL_S = 0.01
_LOOK_EVERY = 25  # polls, at who holds the lock


def machine() -> str:
    """This machine since it was started, the same in all of its containers; its name where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


class _Place:
    """A run's place beside others: it holds `room` shared while it computes, and alone while it measures.

    Who wants to measure closes `door` first, so that nobody comes back into the room before it had its turn.
    """

    def __init__(self, door: TextIO, room: TextIO) -> None:
        self._door, self._room = door, room
        self._is_alone = False
        self._enter()

    def give_way(self) -> None:
        """Wait outside for as long as others measure, or wait to."""
        if self._is_alone:
            return
        if try_lock(self._door, fcntl.LOCK_SH):
            fcntl.flock(self._door, fcntl.LOCK_UN)
        else:
            fcntl.flock(self._room, fcntl.LOCK_UN)
            self._enter()

    @contextmanager
    def alone(self) -> Iterator[None]:
        fcntl.flock(self._room, fcntl.LOCK_UN)
        _wait_for(self._door, fcntl.LOCK_EX)
        _wait_for(self._room, fcntl.LOCK_EX)
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False
            _wait_for(self._room, fcntl.LOCK_SH)
            fcntl.flock(self._door, fcntl.LOCK_UN)

    def leave(self) -> None:
        """What was forked meanwhile, a data loader's workers, has the files open still: closing them is not enough."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._door, fcntl.LOCK_UN)

    def _enter(self) -> None:
        _wait_for(self._door, fcntl.LOCK_SH)
        _wait_for(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)


_PLACE: ContextVar[_Place | None] = ContextVar("place", default=None)  # where a file is timed, no run is in hand


@contextmanager
def side_by_side(folder: Path) -> Iterator[None]:
    """This run computes and measures in turn with all on this machine that are side by side in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    door, room = (folder / f"{machine()[:8]}-{name}.lock" for name in ("door", "room"))
    with door.open("w") as opened_door, room.open("w") as opened_room:
        place = _Place(opened_door, opened_room)
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
    """A step of waiting for others: who waits holds up nobody that wants to measure, least of all whom it waits for."""
    time.sleep(seconds)
    give_way()


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


def _wait_for(file: TextIO, kind: int) -> None:
    """Until the lock is there, or held by nobody but processes that were stopped: they disturb nobody, and may never go
    on."""
    for number in count(1):
        if try_lock(file, kind) or (number % _LOOK_EVERY == 0 and _is_held_by_stopped(file)):
            return
        time.sleep(_POLL_S)


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
