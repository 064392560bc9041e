"""What the processes of test_exclusive_measurement.py do; it imports nothing heavy, for each of them begins with it."""

import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from deploypipe.scheduling.exclusive_measurement import exclusive_measurement, shared_machine, yield_to_measurements

NUM_TURNS = 8
Work = tuple[str, float, float]  # what, and from when to when by the clock that all processes share


def do_turns(folder: Path, ready: Barrier, done: "Queue[list[Work]]") -> None:
    work: list[Work] = []
    with shared_machine(folder):
        ready.wait()
        for _ in range(NUM_TURNS):
            for _ in range(4):
                work.append(spend("compute"))
                yield_to_measurements()
            with exclusive_measurement():
                work.append(spend("measure"))
                yield_to_measurements()  # as an evaluation does, also in there
    done.put(work)


def spend(what: str) -> Work:
    start = time.monotonic()
    time.sleep(0.01)
    return what, start, time.monotonic()


def hold(folder: Path, is_alone: bool, held: "Queue[bool]") -> None:
    with shared_machine(folder):
        if is_alone:
            with exclusive_measurement():
                held.put(True)
                time.sleep(600)
        held.put(True)
        time.sleep(600)


def measure(folder: Path, times: int, rest_s: float, ready: Barrier, done: "Queue[list[Work]]") -> None:
    work: list[Work] = []
    with shared_machine(folder):
        ready.wait()
        for _ in range(times):
            time.sleep(rest_s)
            with exclusive_measurement():
                work.append(spend("measure"))
    done.put(work)
