"""Leases: rows of the study's database that let one process at a time do something, on whatever machine it runs.

A holder counts its row up while it holds it. A waiting process takes over a row that has not changed for `expiry_s` on
its own monotonic clock, or whose holder has ended on the same machine. So no two clocks are compared, and any may jump.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import sqlalchemy as sa

from deploypipe.scheduling.exclusive_measurement import machine, sleep_without_blocking

T = TypeVar("T")

_POLL_S = 0.2
_BEATS_PER_EXPIRY = 6
_META = sa.MetaData()
_LEASES = sa.Table(
    "deploypipe_leases",
    _META,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(200), nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
)


class Retry(Protocol):
    """Call a function again while the database cannot be reached."""

    def __call__(self, call: Callable[[], T]) -> T: ...


@dataclass(slots=True)
class Held:
    """A lease that this process holds, or has lost."""

    name: str
    holder: str
    lost: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Leases:
    """The leases in one database."""

    engine: sa.Engine
    retry: Retry
    expiry_s: float

    def __post_init__(self) -> None:
        make_table(self.engine, _LEASES)

    @contextmanager
    def held(self, name: str) -> Iterator[Held]:
        """Wait for the lease, and hold it during the block.

        `lost` is set if another process took the lease over. That shows only afterwards: call `is_held` before you
        trust what was done in the block.
        """
        held = Held(name=name, holder=f"{this_process()} {uuid.uuid4().hex[:8]}")
        self._wait_for(held)
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(held, ended), daemon=True)
        beating.start()
        try:
            yield held
        finally:
            ended.set()
            beating.join()
            if not self.retry(partial(self._release, held)):
                held.lost.set()

    def is_held(self, held: Held) -> bool:
        """Ask the database whether this process still holds the lease."""
        if not self.retry(partial(self._count_up, held)):
            held.lost.set()
        return not held.lost.is_set()

    def _wait_for(self, held: Held) -> None:
        seen: tuple[str, int] | None = None
        since = time.monotonic()
        while not self.retry(partial(self._insert, held)):
            row = self.retry(partial(self._read, held.name))
            if row is None:
                continue
            if row != seen:
                seen, since = row, time.monotonic()
            is_stale = time.monotonic() - since > self.expiry_s or is_gone(row[0])
            if is_stale and self.retry(partial(self._take_over, held, row)):
                return
            sleep_without_blocking(_POLL_S)

    def _insert(self, held: Held) -> bool:
        try:
            with self.engine.begin() as connection:
                connection.execute(_LEASES.insert().values(name=held.name, holder=held.holder, beat=0))
        except sa.exc.IntegrityError:
            row = self._read(held.name)  # our own row, if the answer to an earlier attempt was lost
            return row is not None and row[0] == held.holder
        return True

    def _read(self, name: str) -> tuple[str, int] | None:
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(_LEASES.c.holder, _LEASES.c.beat).where(_LEASES.c.name == name)).first()
        return (str(row[0]), int(row[1])) if row else None

    def _take_over(self, held: Held, row: tuple[str, int]) -> bool:
        same = sa.and_(_LEASES.c.name == held.name, _LEASES.c.holder == row[0], _LEASES.c.beat == row[1])
        with self.engine.begin() as connection:
            done = connection.execute(_LEASES.update().where(same).values(holder=held.holder, beat=0))
        return done.rowcount == 1

    def _count_up(self, held: Held) -> bool:
        own = sa.and_(_LEASES.c.name == held.name, _LEASES.c.holder == held.holder)
        with self.engine.begin() as connection:
            done = connection.execute(_LEASES.update().where(own).values(beat=_LEASES.c.beat + 1))
        return done.rowcount == 1

    def _release(self, held: Held) -> bool:
        own = sa.and_(_LEASES.c.name == held.name, _LEASES.c.holder == held.holder)
        with self.engine.begin() as connection:
            return connection.execute(_LEASES.delete().where(own)).rowcount == 1

    def _beat(self, held: Held, ended: threading.Event) -> None:
        while not ended.wait(self.expiry_s / _BEATS_PER_EXPIRY):
            try:
                if not self._count_up(held):
                    held.lost.set()
                    return
            except sa.exc.SQLAlchemyError:  # the database cannot be reached, so no other process can take the lease
                continue


def make_table(engine: sa.Engine, table: sa.Table) -> None:
    """Create the table unless it exists; other processes may be creating it at the same time."""
    try:
        with engine.begin() as connection:
            connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
    except sa.exc.DBAPIError:
        if not sa.inspect(engine).has_table(table.name):
            raise


def this_process() -> str:
    """HOST:PID:PLACE. PLACE is the machine and its PID namespace, since containers number their processes again."""
    return f"{os.uname().nodename}:{os.getpid()}:{_place()}"


def is_gone(process: str) -> bool:
    """Whether a process, as `this_process` names it, ran on this machine and has ended; False if that is unknown."""
    *_, pid, where = ["", "", *process.split(" ")[0].rsplit(":", 2)]
    if not where or where != _place():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _place() -> str:
    try:
        return f"{machine()[:13]}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
