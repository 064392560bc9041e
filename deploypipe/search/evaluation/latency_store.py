"""Store measured latencies, and lease the right to measure: for one process, and for the workers of one study."""

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
    sa.Column("measured_by", sa.String(400), nullable=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLatency:
    """A measured latency."""

    ratio: float  # a share of the dense network's
    measured_by: str = ""  # who measured it, when and in what state of the machine


class LatencyStore(Protocol):
    """Latencies of one kind of device."""

    is_shared: bool

    def find(self, key: str) -> KnownLatency | None:
        """Return what was measured for the network and device that the key stands for."""

    def publish(self, key: str, ratio: float, *, is_precise: bool) -> KnownLatency:
        """Store a ratio, for later runs only if it is precise. Return the ratio to use: the first one published."""

    def exclusive(self) -> AbstractContextManager[Callable[[], bool]]:
        """Let no other process measure on this machine during the block. The value reports whether that was so."""


class LocalLatencyStore:
    """For the only process that measures. Precise ratios are kept in the cache folder for later runs."""

    is_shared = False

    def find(self, key: str) -> KnownLatency | None:
        try:
            entry = strict_json.loads(unseal((cache_folder() / "latency" / key).read_bytes()))
            return KnownLatency(ratio=entry["ratio"]) if entry["key"] == key and _is_ratio(entry["ratio"]) else None
        except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: it is measured again
            return None

    def publish(self, key: str, ratio: float, *, is_precise: bool) -> KnownLatency:
        if is_precise:
            at = cache_folder() / "latency" / key
            at.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(at, seal(strict_json.dumps({"key": key, "ratio": ratio})))
        return KnownLatency(ratio=ratio)

    def exclusive(self) -> AbstractContextManager[Callable[[], bool]]:
        return nullcontext(lambda: True)


class SharedLatencyStore:
    """For the workers of a study: on one machine they measure in turn, and all use the first ratio measured."""

    is_shared = True

    def __init__(self, storage: Storage, device: str) -> None:
        self._storage, self._study = storage, storage.study
        self._own = LocalLatencyStore()
        with storage.translated_errors():
            self._engine = storage.open().engine
            self._leases = Leases(self._engine, self._retry, storage.grace_s)
            make_table(self._engine, _LATENCIES)
        self._lease_name = f"measuring on {machine()} {device}"

    def find(self, key: str) -> KnownLatency | None:
        found = self._retry(partial(self._read, key))
        if found is None:
            cached = self._own.find(key)
            found = self._publish(key, cached.ratio, "an earlier run here") if cached else None
        return found

    def publish(self, key: str, ratio: float, *, is_precise: bool) -> KnownLatency:
        self._own.publish(key, ratio, is_precise=is_precise)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        return self._publish(key, ratio, f"{socket.gethostname()}, {when}, load {read_state().load:.1f}")

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], bool]]:
        with self._leases.held(self._lease_name) as held:
            yield partial(self._was_alone, held)

    def _retry(self, call: Callable[[], T]) -> T:
        with self._storage.translated_errors():
            return self._storage.retry_while_away(call)

    def _was_alone(self, held: Held) -> bool:
        return self._leases.is_held(held)

    def _publish(self, key: str, ratio: float, measured_by: str) -> KnownLatency:
        self._retry(partial(self._insert, key, ratio, measured_by))
        found = self._retry(partial(self._read, key))
        return found or KnownLatency(ratio=ratio, measured_by=measured_by)

    def _insert(self, key: str, ratio: float, measured_by: str) -> None:
        row = {"study": self._study, "key": key, "ratio": ratio, "measured_by": measured_by}
        try:
            with self._engine.begin() as connection:
                connection.execute(_LATENCIES.insert().values(**row))
        except sa.exc.IntegrityError:  # another worker was first
            return

    def _read(self, key: str) -> KnownLatency | None:
        query = sa.select(_LATENCIES.c.ratio, _LATENCIES.c.measured_by)
        query = query.where(_LATENCIES.c.study == self._study, _LATENCIES.c.key == key)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return KnownLatency(ratio=float(row[0]), measured_by=str(row[1])) if row and _is_ratio(row[0]) else None


def _is_ratio(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
