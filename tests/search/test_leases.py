"""A lease has one holder at a time, and passes on when its holder ends or pauses."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa

from deploypipe.scheduling.exclusive_measurement import exclusive_measurement, shared_machine
from deploypipe.search.distributed import leases
from deploypipe.search.distributed.leases import Held, Leases, is_gone, this_process
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.evaluation.latency_store import SharedLatencyStore

T = TypeVar("T")


def at_once(call: Callable[[], T]) -> T:
    return call()


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return sa.create_engine(f"sqlite:///{tmp_path}/leases.db", connect_args={"timeout": 30})


def test_one_holder_at_a_time(engine: sa.Engine) -> None:
    inside, most, count = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, count
        for _ in range(3):
            with Leases(engine, at_once, 60).held("slot") as held:
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1
                count += 1
            assert not held.lost.is_set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 12)


def test_two_names_do_not_wait_for_each_other(engine: sa.Engine) -> None:
    both = Leases(engine, at_once, 60)
    with both.held("a"), both.held("b"):
        pass


def test_a_paused_holder_loses_the_lease_and_detects_it(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = Leases(engine, at_once, 0.6), Leases(engine, at_once, 0.6)
    monkeypatch.setattr(Leases, "_beat", lambda *_: None)
    with slow.held("slot") as still:
        assert slow.is_held(still)
        started = time.monotonic()
        with quick.held("slot") as taken:
            assert time.monotonic() - started > 0.6
            assert quick.is_held(taken) and not slow.is_held(still)
    assert still.lost.is_set()


def test_a_working_holder_keeps_the_lease(engine: sa.Engine) -> None:
    both, got = Leases(engine, at_once, 0.6), threading.Event()

    def wait() -> None:
        with both.held("slot"):
            got.set()

    with both.held("slot") as held:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(2.0)  # three times as long as one that does not move may keep it
        assert both.is_held(held)
    waiting.join()
    assert got.is_set()


def test_the_lease_of_a_dead_process_is_free_at_once(engine: sa.Engine) -> None:
    code = "from deploypipe.search.distributed.leases import this_process; print(this_process())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(dead) and not is_gone(this_process())
    host, pid, _ = dead.split(":")
    assert not is_gone(f"{host}:{pid}:another-place") and not is_gone(f"{host}:{pid}:")
    assert not is_gone("") and not is_gone("a word")
    patient = Leases(engine, at_once, 3600)
    assert patient._insert(Held(name="slot", holder=f"{dead} 1"))
    with patient.held("slot") as held:
        assert patient.is_held(held)


def test_all_workers_use_the_first_latency_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(url=f"sqlite:///{tmp_path}/study.db", study="one")
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "first"))
    first, second = (SharedLatencyStore(storage, "device") for _ in range(2))
    assert first.find("network") is None
    assert first.publish("network", 0.5, is_precise=False).ratio == 0.5
    assert second.publish("network", 0.7, is_precise=True).ratio == 0.5
    known = second.find("network")
    assert known and known.ratio == 0.5 and "load" in known.measured_by
    other = SharedLatencyStore(Storage(url=storage.url, study="another"), "device")
    found = other.find("network")  # what this machine remembers of an earlier search
    assert found and found.ratio == 0.7 and found.measured_by == "an earlier run here"


def test_only_one_worker_of_a_machine_measures(tmp_path: Path) -> None:
    storage = Storage(url=f"sqlite:///{tmp_path}/study.db", study="one", grace_s=60)
    first, second = (SharedLatencyStore(storage, "device") for _ in range(2))
    got = threading.Event()

    def wait() -> None:
        with second.exclusive() as was_alone:
            got.set()
            assert was_alone()

    with first.exclusive() as was_alone:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.8) and was_alone()
    waiting.join()
    assert got.is_set()
    assert leases.machine() and not leases.machine().isspace()


def test_waiting_for_a_lease_does_not_block_its_holder(engine: sa.Engine, tmp_path: Path) -> None:
    """Two runs side by side: the one with the lease measures, for which the other has to stand aside."""
    waits = threading.Event()

    def wait_for_it() -> None:
        with shared_machine(tmp_path):
            waits.set()
            with Leases(engine, at_once, 60).held("slot"):
                pass

    other, done = threading.Thread(target=wait_for_it, daemon=True), threading.Event()

    def hold_it() -> None:
        with shared_machine(tmp_path), Leases(engine, at_once, 60).held("slot"):
            other.start()
            assert waits.wait(30)
            with exclusive_measurement():
                done.set()

    threading.Thread(target=hold_it, daemon=True).start()
    assert done.wait(30)
    other.join(30)
    assert not other.is_alive()
