"""Time model files so that two files can be compared.

Files are timed in one process, `ROUND` runs of each at a time, in mirrored order (A B B A), so that changes of the
machine affect both. Every few rounds all files are opened again, in another order. The address of a file's weights, and
which file was opened first, change a latency by up to a percent, which would otherwise look like a difference between
the files. The runs between two openings are one independent sample of that difference.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploypipe.benchmark.conditions import MIN_SECONDS, judge_conditions, read_state
from deploypipe.benchmark.environment import count_cpus
from deploypipe.benchmark.timed_runs import (
    BLOCK,
    GPU_WARM_UP_SECONDS,
    no_garbage_collection,
    run_for,
    time_runs,
    warm_up,
)
from deploypipe.numerics.intervals import interval_of_quantile
from deploypipe.records import Conditions, Interval, Latency, MachineState, Notify, Progress, silent
from deploypipe.runtimes import Array, Runtime, Session
from deploypipe.scheduling.exclusive_measurement import exclusive_measurement, sleep_without_blocking
from deploypipe.target import Target

ROUND = 2 * BLOCK  # A B B A
PERCENTILE_FLOORS = {0.9: 64, 0.99: 662}  # samples; MLPerf LoadGen's early-stopping counts
_MANY_OPENINGS, _FEW_OPENINGS = 40, 8  # few if a file takes long to open: a signed-rank interval needs seven
_CHEAP_SECONDS = 3.0  # that opening files may take in total, even if timing them takes less
_ORDERS = 4  # of two files: which is opened first, which is timed first
_LEAD = 2  # untimed runs before a block, which bring the file's weights back into the caches
_REOPENED_SECONDS = 0.1  # at most, once two runs are done
_SECONDS = 2.0  # of timed runs of each file, if no number of runs is given
_BRIEF_SAMPLES = 80  # in brief timing, whatever number is asked for: one round in each of `_ORDERS` openings
_MAX_SAMPLES = 4000
_ATTEMPTS = 3  # to find the machine steady
_PAUSE_SECONDS = 5.0  # before the next one
_CHECK_SECONDS, _MAX_CHECKS = 1.0, 10  # after the pause, while the machine is still throttled or busy
_MAX_DRIFT = 0.10  # of the median, last third against first third
_MAX_SPREAD = 0.25  # interquartile range over the median


_IS_BRIEF: ContextVar[bool] = ContextVar("is_brief", default=False)


@contextmanager
def brief_timing() -> Iterator[None]:
    """Inside, files are run a few dozen times only, and a busy machine is not waited for: figures for no decision."""
    token = _IS_BRIEF.set(True)
    try:
        yield
    finally:
        _IS_BRIEF.reset(token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Timed runs of files, interleaved."""

    samples: tuple[NDArray[np.float64], ...]  # ms of one run, per file (n,) in order
    block: int  # samples [i * block, (i + 1) * block) of all files were timed together, between two openings
    before: MachineState | None = None  # None, like the next: the machine was not inspected
    after: MachineState | None = None


def time_interleaved(
    paths: Sequence[Path],
    inputs: Mapping[str, Array],
    runtime: Runtime,
    target: Target,
    notify: Notify = silent,
    *,
    num_samples: int | None = None,
) -> Timings:
    """Time at least `num_samples` runs of each file, on the same batch.

    The default is the target's number, or for quick files as many runs as take `_SECONDS`: more runs of a quick file
    cost little and narrow the interval. Raises what `runtime.open` and `Session.run` raise.
    """
    samples: list[list[float]] = [[] for _ in paths]
    with exclusive_measurement(), no_garbage_collection():
        before = read_state()
        spent = [_try(path, inputs, runtime, target) for path in paths]
        to_open, to_run = (sum(seconds) for seconds in zip(*spent, strict=True))
        quick = min(_MAX_SAMPLES, int(_SECONDS * len(paths) / to_run))
        asked = num_samples or max(target.num_latency_samples, quick)
        least = min(asked, _BRIEF_SAMPLES) if _IS_BRIEF.get() else asked
        openings, runs = schedule(least)
        if openings * to_open > max(_CHEAP_SECONDS, least * to_run):
            openings, runs = schedule(least, most=_FEW_OPENINGS)
        for number, (opening, timing) in enumerate(mirrored_orders(len(paths), openings, np.random.default_rng())):
            with ExitStack() as stack:
                bound = {
                    i: stack.enter_context(runtime.open(paths[i], num_threads=target.num_threads)).bind(inputs)
                    for i in opening
                }
                for i in opening:
                    run_for(bound[i], _least_seconds(target))
                    time_runs(bound[i], BLOCK, seconds=_REOPENED_SECONDS)
                for i in timing * (runs // ROUND):
                    time_runs(bound[i], _LEAD)
                    samples[i] += time_runs(bound[i], BLOCK)
            notify(Progress(stage="latency", done=number + 1, total=openings))
        after = read_state()
    return Timings(samples=tuple(np.array(s) for s in samples), block=runs, before=before, after=after)


def time_steadily(
    paths: Sequence[Path],
    inputs: Mapping[str, Array],
    runtime: Runtime,
    target: Target,
    notify: Notify = silent,
    minds_others: bool = True,
    *,
    num_samples: int | None = None,
) -> Timings:
    """Call `time_interleaved`, and again after a pause while there are doubts, at most `_ATTEMPTS` times.

    The result has no doubts, or is the last attempt: `find_doubts` says which. Only the machine's state decides, never
    how long the files took. minds_others: heat, clock, quota and other processes count as doubts too, as a figure that
    a verdict depends on needs; else only drift and spread of the timings do.
    """
    asked = {} if num_samples is None else {"num_samples": num_samples}
    for number in range(_ATTEMPTS):
        timings = time_interleaved(paths, inputs, runtime, target, notify, **asked)
        timings = _looked_at_long(timings) if minds_others and not _IS_BRIEF.get() else timings
        seen = timings if minds_others else replace(timings, before=None, after=None)
        doubts = find_doubts(seen, [str(file) for file in range(len(timings.samples))], target.num_threads)
        if number == _ATTEMPTS - 1 or not doubts or _IS_BRIEF.get():
            break
        notify(Progress(stage="latency", message="the machine was not steady: measuring again"))
        _wait_for_quiet(target.num_threads, can_look=minds_others)
    return timings


def find_doubts(timings: Timings, names: Sequence[str], num_threads: int) -> tuple[str, ...]:
    """Reasons not to trust these timings of files with these names; () if there are none.

    The machine was throttled or shared with others, or the timings drift or scatter.
    """
    if conditions := conditions_of(timings, names, num_threads):
        return conditions.reasons
    return _unsteady_files(timings, names)


def conditions_of(timings: Timings, names: Sequence[str], num_threads: int) -> Conditions | None:
    """The machine's state while these files were timed; None if it was not inspected."""
    if timings.before is None or timings.after is None:
        return None
    unsteady = _unsteady_files(timings, names)
    return judge_conditions(
        timings.before, timings.after, num_cpus=count_cpus(), num_threads=num_threads, unsteady=unsteady
    )


def _unsteady_files(timings: Timings, names: Sequence[str]) -> tuple[str, ...]:
    named = zip(names, timings.samples, strict=True)
    return tuple(f"{name}: {reason}" for name, samples in named if (reason := find_unsteadiness(samples)))


def _looked_at_long(timings: Timings) -> Timings:
    """Inspect the machine for long enough to detect other processes, since runs of a quick file end earlier."""
    if timings.before is None or timings.after is None:
        return timings
    missing = MIN_SECONDS - (timings.after.at_s - timings.before.at_s)
    if missing <= 0:
        return timings
    sleep_without_blocking(missing)
    return replace(timings, after=read_state())


def _wait_for_quiet(num_threads: int, *, can_look: bool) -> None:
    """Pause, and then a few seconds longer while the machine is still throttled or busy with other processes."""
    sleep_without_blocking(_PAUSE_SECONDS)
    for _ in range(_MAX_CHECKS if can_look else 0):
        before = read_state()
        sleep_without_blocking(_CHECK_SECONDS)
        now = judge_conditions(before, read_state(), num_cpus=count_cpus(), num_threads=num_threads, unsteady=())
        if now.verdict == "steady":
            break


def schedule(num_samples: int, *, most: int = _MANY_OPENINGS) -> tuple[int, int]:
    """Return (openings, runs of each file after every opening) for at least `num_samples` runs.

    Rounds are whole, and the openings use every order of two files equally often.
    """
    runs = ROUND * -(-num_samples // (ROUND * most))
    openings = -(-num_samples // runs)
    return -(-openings // _ORDERS) * _ORDERS, runs


def _try(path: Path, inputs: Mapping[str, Array], runtime: Runtime, target: Target) -> tuple[float, float]:
    """Seconds for opening a file, and for one run of it. Afterwards the machine is warm, and the file in memory."""
    begun = time.perf_counter()
    with runtime.open(path, num_threads=target.num_threads) as session:
        bound = session.bind(inputs)
        opened = time.perf_counter()
        return opened - begun, warm_up(bound, least=_least_seconds(target)) / 1e3


def mirrored_orders(
    num_files: int, openings: int, generator: np.random.Generator
) -> Iterator[tuple[list[int], list[int]]]:
    """For each opening: the order to open the files in, and the order to time them in.

    Orders are random, so that nothing periodic in the machine favours one file. Within `_ORDERS` openings each of two
    files comes first equally often.
    """
    ahead = list(range(num_files))
    for number in range(openings):
        if number % _ORDERS == 0:
            kinds = generator.permutation(_ORDERS)
            generator.shuffle(ahead)
        kind = int(kinds[number % _ORDERS])
        opening, timing = (ahead[:: -1 if kind & bit else 1] for bit in (1, 2))
        yield opening, timing + timing[::-1]


def time_file(
    path: Path, inputs: Mapping[str, Array], runtime: Runtime, target: Target, *, num_samples: int
) -> NDArray[np.float64]:
    """Milliseconds (num_samples,) of one file, for callers that need many figures of moderate precision."""
    with runtime.open(path, num_threads=target.num_threads) as session, no_garbage_collection():
        bound = session.bind(inputs)
        warm_up(bound, least=_least_seconds(target))
        return np.array(time_runs(bound, num_samples))


def time_loaded(
    session: Session, inputs: Mapping[str, Array], *, seconds: float, least: int, most: int
) -> NDArray[np.float64]:
    """Milliseconds (n,) of an open file, least <= n <= most, about `seconds` in total: one point of a sweep."""
    with no_garbage_collection():
        bound = session.bind(inputs)
        per_run = warm_up(bound, seconds=seconds) / 1e3
        return np.array(time_runs(bound, min(most, max(least, int(seconds / per_run)))))


def summarise(samples: NDArray[np.float64], target: Target, *, block: int) -> Latency:
    """Median with its interval, and the percentiles that the number of samples (n,) in ms suffices for."""
    p90, p99 = (percentile(samples, share, block=block) for share in (0.9, 0.99))
    return Latency(
        batch_size=target.batch_size,
        num_threads=target.num_threads,
        samples_ms=tuple(samples.tolist()),
        p50_ms=interval_of_quantile(samples, 0.5, block=block),
        p90_ms=p90.value if p90 else None,
        p99_ms=p99.value if p99 else None,
    )


def percentile(samples: NDArray[np.float64], share: float, *, block: int) -> Interval | None:
    """Milliseconds that `share` (0.9 or 0.99) of the runs stay below; None if (n,) samples are too few."""
    if len(samples) < PERCENTILE_FLOORS[share]:
        return None
    return interval_of_quantile(samples, share, block=block)


def find_unsteadiness(samples: NDArray[np.float64]) -> str:
    """Why these timings (n,) in ms should not be trusted; "" if there is no reason."""
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


def _least_seconds(target: Target) -> float:
    return GPU_WARM_UP_SECONDS if target.needs_gpu else 0.0
