"""Measure how latency changes with the batch size and with the number of threads, by a few quick runs of each."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from deploypipe.benchmark.bench_results import SweepPoint
from deploypipe.benchmark.latency import time_loaded
from deploypipe.benchmark.timed_runs import BLOCK
from deploypipe.numerics.intervals import interval_of_quantile
from deploypipe.runtimes import Array, Runtime
from deploypipe.target import Target

MAX_BATCH = 64
_SECONDS = 0.3  # of timed runs for each point
MIN_RUNS, _MAX_RUNS = 8, 400
PATIENCE = 5.0  # seconds that one point may take
_CPUINFO = Path("/proc/cpuinfo")


def sweep_batches(
    path: Path,
    inputs: Mapping[str, Array],
    runtime: Runtime,
    target: Target,
    sizes: Sequence[int],
    refused: Mapping[int, str],
) -> Iterator[SweepPoint]:
    """Throughput at each batch size. Sizes that are `refused` (size -> reason) or too slow have a reason instead."""
    per_sample = 0.0  # seconds, at the last size
    with runtime.open(path, num_threads=target.num_threads) as session:
        for size in sizes:
            if reason := refused.get(size):
                yield _unmeasured(size, target.num_threads, reason)
                continue
            if per_sample * size * MIN_RUNS > PATIENCE:
                yield _unmeasured(size, target.num_threads, f"would take more than {PATIENCE:.0f} s")
                continue
            batch = resized(inputs, size)
            begun = time.perf_counter()
            session.run(batch)
            per_sample = (time.perf_counter() - begun) / size
            samples = time_loaded(session, batch, seconds=_SECONDS, least=MIN_RUNS, most=_MAX_RUNS)
            yield _point(samples, size, target.num_threads)


def resized(inputs: Mapping[str, Array], size: int) -> dict[str, Array]:
    """A batch of that size, its samples repeated."""
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}


def sweep_threads(
    path: Path, inputs: Mapping[str, Array], runtime: Runtime, batch_size: int, counts: Sequence[int]
) -> Iterator[SweepPoint]:
    """Latency with each number of threads. The file is opened again for each."""
    for count in counts:
        with runtime.open(path, num_threads=count) as session:
            samples = time_loaded(session, inputs, seconds=_SECONDS, least=MIN_RUNS, most=_MAX_RUNS)
        yield _point(samples, batch_size, count)


def batch_sizes(least: int = 1, most: int = MAX_BATCH) -> list[int]:
    """Powers of two within the bounds."""
    return [size for size in (2**i for i in range(most.bit_length())) if least <= size <= most]


def thread_counts(num_cores: int) -> list[int]:
    """Powers of two up to the physical cores, and all of those."""
    return sorted({*batch_sizes(most=num_cores), num_cores})


def count_cores(num_cpus: int, cpuinfo: Path = _CPUINFO) -> int:
    """Physical cores, at most `num_cpus` (which this process may use); `num_cpus` if the system does not report."""
    try:
        blocks = cpuinfo.read_text(errors="replace").split("\n\n")
    except OSError:
        return num_cpus
    cores = set()
    for block in blocks:
        fields = dict(line.replace("\t", "").split(":", 1) for line in block.splitlines() if ":" in line)
        if "core id" in fields:
            cores.add((fields.get("physical id"), fields["core id"]))
    return min(len(cores), num_cpus) or num_cpus


def _point(samples: np.ndarray[tuple[int], np.dtype[np.float64]], batch_size: int, num_threads: int) -> SweepPoint:
    p50 = interval_of_quantile(samples, 0.5, block=max(1, len(samples) // BLOCK))
    return SweepPoint(
        batch_size=batch_size, num_threads=num_threads, p50_ms=p50, throughput=1e3 * batch_size / p50.value
    )


def _unmeasured(batch_size: int, num_threads: int, reason: str) -> SweepPoint:
    return SweepPoint(batch_size=batch_size, num_threads=num_threads, p50_ms=None, throughput=None, reason=reason)
