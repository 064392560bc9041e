"""Runs share a machine: they compute together, and each measures with the machine to itself."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import tiny_pipeline as tiny
from measuring_processes import Work, do_turns, hold, measure
from runs_side_by_side import start_measuring

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.scheduling.exclusive_measurement import (
    exclusive_measurement,
    shared_machine,
    sleep_without_blocking,
    yield_to_measurements,
)
from deploypipe.training.finetune import finetune

NUM_PROCESSES = 3
CONTEXT = multiprocessing.get_context("spawn")


@contextmanager
def soon() -> Iterator[None]:
    """Fails where the block waits for a lock that nobody gives back."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def overlap(one: Work, other: Work) -> bool:
    return one[1] < other[2] and other[1] < one[2]


def test_who_measures_is_alone_and_who_computes_is_not(tmp_path: Path) -> None:
    ready, done = CONTEXT.Barrier(NUM_PROCESSES), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=do_turns, args=(tmp_path, ready, done)) for _ in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    by_process = [done.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    pairs = [
        (one, other)
        for i, mine in enumerate(by_process)
        for theirs in by_process[i + 1 :]
        for one in mine
        for other in theirs
        if overlap(one, other)
    ]
    assert pairs and all(one[0] == other[0] == "compute" for one, other in pairs)


def test_one_that_is_killed_holds_up_nobody(tmp_path: Path) -> None:
    for is_alone in (True, False):
        held: Queue[bool] = CONTEXT.Queue()
        process = CONTEXT.Process(target=hold, args=(tmp_path, is_alone, held))
        process.start()
        assert held.get(timeout=60)
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        with soon(), shared_machine(tmp_path), exclusive_measurement():
            pass
        process.join()


def test_one_that_measures_again_and_again_keeps_nobody_from_it(tmp_path: Path) -> None:
    ready, done = CONTEXT.Barrier(2), CONTEXT.Queue()
    turns = ((2, 0.1), (100, 0.0))
    processes = [CONTEXT.Process(target=measure, args=(tmp_path, *each, ready, done)) for each in turns]
    for process in processes:
        process.start()
    few, many = sorted((done.get(timeout=60) for _ in processes), key=len)
    for process in processes:
        process.join()
    assert few[-1][2] < many[-1][1]


def evaluate() -> object:
    return evaluate_module(tiny.build_model(), tiny.load_data().val, tiny.task())


def train() -> object:
    model, settings = tiny.build_model(), replace(tiny.recipe().finetune, num_epochs=1)
    return finetune(model, model, tiny.load_data(), tiny.task(), settings)


@pytest.mark.parametrize("work", [evaluate, train])
def test_before_each_batch_others_measure(work: Callable[[], object], tmp_path: Path) -> None:
    with shared_machine(tmp_path):
        measured = start_measuring(tmp_path)
        for _ in range(100):
            work()
            if measured.wait(0.1):
                break
        assert measured.is_set()


def test_while_one_sleeps_others_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_measured: list[bool] = []
    with shared_machine(tmp_path):
        measured = start_measuring(tmp_path)
        monkeypatch.setattr(time, "sleep", lambda seconds: has_measured.append(measured.wait(30)))
        sleep_without_blocking(1)
    assert has_measured[0]


def test_who_waits_to_measure_comes_before_who_has_measured_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other thread may be late on a busy machine.
    monkeypatch.setattr("deploypipe.scheduling.exclusive_measurement._TURN_S", 1.0)
    with shared_machine(tmp_path):
        with exclusive_measurement():
            measured = start_measuring(tmp_path)
            assert not measured.wait(0.5)
        assert measured.is_set()


@pytest.mark.parametrize("is_alone", [True, False])
def test_one_that_is_stopped_holds_up_nobody(tmp_path: Path, is_alone: bool) -> None:
    held: Queue[bool] = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold, args=(tmp_path, is_alone, held))
    process.start()
    assert held.get(timeout=60) and process.pid
    os.kill(process.pid, signal.SIGSTOP)
    num_threads = threading.active_count()
    try:
        with soon(), shared_machine(tmp_path):
            for _ in range(20):
                yield_to_measurements()
                with exclusive_measurement():
                    pass
            assert threading.active_count() <= num_threads + 2  # of those that wait on, one for each lock
    finally:
        process.kill()
        process.join()


def test_one_that_leaves_is_gone_though_what_it_forked_lives_on(tmp_path: Path) -> None:
    forking = multiprocessing.get_context("fork")
    with shared_machine(tmp_path):
        worker = forking.Process(target=time.sleep, args=(600,))
        worker.start()
    with soon(), shared_machine(tmp_path), exclusive_measurement():
        pass
    assert worker.is_alive()
    worker.kill()
    worker.join()


def test_without_others_nothing_waits() -> None:
    with exclusive_measurement():
        yield_to_measurements()
    yield_to_measurements()
