"""Run a bound batch again and again, and time it."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import numpy as np

from deploypipe.runtimes import Array, Session
from deploypipe.runtimes.bound_runs import BoundRun, RunParts
from deploypipe.scheduling.exclusive_measurement import exclusive_measurement

BLOCK = 10  # timed runs in a row
GPU_WARM_UP_SECONDS = 0.2  # at least: an idle GPU takes that long to raise its clock (trtexec's --warmUp)
_WARM_UP_ROUNDS = 30  # at most, each of `BLOCK` runs
_WARM_UP_SECONDS = 3.0  # at most, once three rounds are done
_WARM_UP_TOLERANCE = 0.02  # medians of two rounds in a row


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def warm_up(bound: BoundRun, *, seconds: float = _WARM_UP_SECONDS, least: float = 0.0) -> float:
    """Run for `least` seconds, and until two rounds in a row take the same time or the limit is reached. Return ms of a
    run."""
    started = time.perf_counter()
    run_for(bound, least)
    before = float("inf")
    for round_ in range(_WARM_UP_ROUNDS):
        median = float(np.median(time_runs(bound, BLOCK, seconds=seconds)))
        is_late = round_ >= 2 and time.perf_counter() - started > seconds
        if is_late or abs(median - before) <= _WARM_UP_TOLERANCE * median:
            break
        before = median
    return median


def run_for(bound: BoundRun, seconds: float) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        bound.run()


def time_runs(bound: BoundRun, count: int, *, seconds: float = float("inf")) -> list[float]:
    """Milliseconds of `count` runs, or of as many as begin within `seconds`; at least two."""
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < count and (len(samples) < 2 or time.perf_counter() - begun < seconds):
        started = time.perf_counter_ns()
        bound.run()
        samples.append((time.perf_counter_ns() - started) / 1e6)
    return samples


def time_parts(session: Session, inputs: Mapping[str, Array], count: int) -> RunParts | None:
    """Medians of the parts of a run on a GPU, over `count` runs once it is warm; None for a processor."""
    with exclusive_measurement(), no_garbage_collection():
        bound = session.bind(inputs)
        if bound.time_parts() is None:
            return None
        warm_up(bound, least=GPU_WARM_UP_SECONDS)
        seen = [parts for _ in range(count) if (parts := bound.time_parts())]
    return RunParts(
        **{part.name: float(np.median([getattr(each, part.name) for each in seen])) for part in fields(RunParts)}
    )
