"""How long a model file takes, timed so that two files can be compared.

Files are timed in one process, in blocks that alternate (A B, B A, A B, ...): whatever the machine does meanwhile
meets both. A block is `BLOCK` timed runs after one untimed run that brings the file's weights back into the caches.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploypipe.numerics.intervals import interval_of_median
from deploypipe.records import Event, Latency, Progress, silent
from deploypipe.runtimes import Array, Runtime, Session
from deploypipe.target import Target

BLOCK = 10  # timed runs in a row
_MIN_BLOCKS = 8  # fewer do not carry a block bootstrap
_MIN_SAMPLES_P90, _MIN_SAMPLES_P99 = 64, 662  # MLPerf LoadGen's early-stopping counts
_WARM_UP_ROUNDS = 30  # at most, each of `BLOCK` runs
_WARM_UP_SECONDS = 3.0  # at most, once three rounds are done
_WARM_UP_TOLERANCE = 0.02  # medians of two rounds in a row
_MAX_DRIFT = 0.10  # of the median, last third against first third
_MAX_SPREAD = 0.25  # interquartile range over the median


def time_interleaved(
    paths: Sequence[Path],
    inputs: Mapping[str, Array],
    runtime: Runtime,
    target: Target,
    notify: Progress = silent,
) -> list[NDArray[np.float64]]:
    """Milliseconds of one run, per file (n,) in the order they were taken, n >= target.num_latency_samples.

    `inputs` are one batch, the same for all files. Samples [i * BLOCK, (i + 1) * BLOCK) of all files were taken
    together. Raises what `runtime.open` and `Session.run` raise.
    """
    num_blocks = -(-target.num_latency_samples // BLOCK)
    samples: list[list[float]] = [[] for _ in paths]
    with ExitStack() as stack:
        sessions = [stack.enter_context(runtime.open(path, num_threads=target.num_threads)) for path in paths]
        stack.enter_context(_no_garbage_collection())
        for session in sessions:
            _warm_up(session, inputs)
        order = list(range(len(sessions)))
        for block in range(num_blocks):
            for i in order:
                sessions[i].run(inputs)
                samples[i] += _time_runs(sessions[i], inputs, BLOCK)
            order.reverse()
            notify(Event(stage="latency", done=block + 1, total=num_blocks))
    return [np.array(s) for s in samples]


def time_file(
    path: Path, inputs: Mapping[str, Array], runtime: Runtime, target: Target, *, num_samples: int
) -> NDArray[np.float64]:
    """Milliseconds (num_samples,) of one file: for a search that needs many figures of moderate precision."""
    with runtime.open(path, num_threads=target.num_threads) as session, _no_garbage_collection():
        _warm_up(session, inputs)
        return np.array(_time_runs(session, inputs, num_samples))


def summarise(samples: NDArray[np.float64], target: Target) -> Latency:
    """Median with its interval, and the percentiles that the number of samples (n,) in ms allows to claim."""
    block = BLOCK if len(samples) >= _MIN_BLOCKS * BLOCK else 1
    return Latency(
        batch_size=target.batch_size,
        num_threads=target.num_threads,
        samples_ms=tuple(samples.tolist()),
        p50_ms=interval_of_median(samples, block=block),
        p90_ms=float(np.quantile(samples, 0.9)) if len(samples) >= _MIN_SAMPLES_P90 else None,
        p99_ms=float(np.quantile(samples, 0.99)) if len(samples) >= _MIN_SAMPLES_P99 else None,
    )


def find_unsteadiness(samples: NDArray[np.float64]) -> str:
    """Why these timings (n,) in ms should not be trusted; empty where nothing speaks against them."""
    third = max(1, len(samples) // 3)
    median = float(np.median(samples))
    drift = float(np.median(samples[-third:]) - np.median(samples[:third])) / median
    low, high = np.quantile(samples, [0.25, 0.75])
    spread = float(high - low) / median
    if abs(drift) > _MAX_DRIFT:
        return f"the median drifted by {drift:+.0%} from the first to the last third of the runs"
    if spread > _MAX_SPREAD:
        return f"the middle half of the runs spreads over {spread:.0%} of the median"
    return ""


def _warm_up(session: Session, inputs: Mapping[str, Array]) -> None:
    """Run until two rounds in a row take the same time, or for as long as a warm-up may take."""
    started = time.perf_counter()
    before = float("inf")
    for round_ in range(_WARM_UP_ROUNDS):
        median = float(np.median(_time_runs(session, inputs, BLOCK)))
        is_late = round_ >= 2 and time.perf_counter() - started > _WARM_UP_SECONDS
        if is_late or abs(median - before) <= _WARM_UP_TOLERANCE * median:
            return
        before = median


def _time_runs(session: Session, inputs: Mapping[str, Array], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        started = time.perf_counter_ns()
        session.run(inputs)
        samples.append((time.perf_counter_ns() - started) / 1e6)
    return samples


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
