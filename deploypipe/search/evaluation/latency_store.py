"""What is known of a device's times, and who may take one now: for a process alone, and for many."""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, TypeVar

import sqlalchemy as sa

from deploypipe.benchmark.conditions import read_state
from deploypipe.files.atomic import write_atomically
from deploypipe.files.cache_folder import cache_folder
from deploypipe.scheduling.exclusive_measurement import machine
from deploypipe.search.distributed.leases import Held, Leases, make_table
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.text import strict_json
from deploypipe.text.sealed_json import seal, unseal

T = TypeVar("T")

_META = sa.MetaData()
_LATENCIES = sa.Table(
    "deploypipe_latencies",
    _META,
    sa.Column("study", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("ratio", sa.Float(53), nullable=False),
    sa.Column("told", sa.String(400), nullable=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A latency, as a share of the dense network's; by whom, when and in what state of the machine it was taken."""

    ratio: float
    told: str = ""


class Measuring(Protocol):
    """Of one kind of device."""

    is_shared: bool

    def known(self, key: str) -> Known | None:
        """What was measured of the network and device that the key stands for."""

    def publish(self, key: str, ratio: float, *, is_telling: bool) -> Known:
        """Remember it, if it is telling also for later runs; what counts from now on: the first that was published."""

    def alone(self) -> AbstractContextManager[Callable[[], bool]]:
        """Nobody else measures here for as long as the block lasts; what it gives says whether that was so."""


class LocalLatencyStore:
    """For the only process that measures; well told times are kept in the cache folder for later runs."""

    is_shared = False

    def known(self, key: str) -> Known | None:
        try:
            entry = strict_json.loads(unseal((cache_folder() / "latency" / key).read_bytes()))
            return Known(ratio=entry["ratio"]) if entry["key"] == key and _is_ratio(entry["ratio"]) else None
        except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: it is measured again
            return None

    def publish(self, key: str, ratio: float, *, is_telling: bool) -> Known:
        if is_telling:
            at = cache_folder() / "latency" / key
            at.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(at, seal(strict_json.dumps({"key": key, "ratio": ratio})))
        return Known(ratio=ratio)

    def alone(self) -> AbstractContextManager[Callable[[], bool]]:
        return nullcontext(lambda: True)


class SharedLatencyStore:
    """For the workers of a study: one of a machine's at a time, and all of them go by the first time that was taken."""

    is_shared = True

    def __init__(self, storage: Storage, device: str) -> None:
        self._storage, self._study = storage, storage.study
        self._own = LocalLatencyStore()
        with storage.errors_told():
            self._engine = storage.open().engine
            self._leases = Leases(self._engine, self._patiently, storage.grace_s)
            make_table(self._engine, _LATENCIES)
        self._slot = f"measuring on {machine()} {device}"

    def known(self, key: str) -> Known | None:
        found = self._patiently(partial(self._read, key))
        if found is None:
            cached = self._own.known(key)
            found = self._publish(key, cached.ratio, "an earlier run here") if cached else None
        return found

    def publish(self, key: str, ratio: float, *, is_telling: bool) -> Known:
        self._own.publish(key, ratio, is_telling=is_telling)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        return self._publish(key, ratio, f"{socket.gethostname()}, {when}, load {read_state().load:.1f}")

    @contextmanager
    def alone(self) -> Iterator[Callable[[], bool]]:
        with self._leases.held(self._slot) as held:
            yield partial(self._was_alone, held)

    def _patiently(self, call: Callable[[], T]) -> T:
        with self._storage.errors_told():
            return self._storage.patiently(call)

    def _was_alone(self, held: Held) -> bool:
        return self._leases.is_held(held)

    def _publish(self, key: str, ratio: float, told: str) -> Known:
        self._patiently(partial(self._insert, key, ratio, told))
        found = self._patiently(partial(self._read, key))
        return found or Known(ratio=ratio, told=told)

    def _insert(self, key: str, ratio: float, told: str) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(_LATENCIES.insert().values(study=self._study, key=key, ratio=ratio, told=told))
        except sa.exc.IntegrityError:  # another was first
            return

    def _read(self, key: str) -> Known | None:
        asked = sa.select(_LATENCIES.c.ratio, _LATENCIES.c.told)
        asked = asked.where(_LATENCIES.c.study == self._study, _LATENCIES.c.key == key)
        with self._engine.connect() as connection:
            row = connection.execute(asked).first()
        return Known(ratio=float(row[0]), told=str(row[1])) if row and _is_ratio(row[0]) else None


def _is_ratio(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
