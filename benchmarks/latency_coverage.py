"""Simulate how often latency intervals contain the true value, and how often a network at its limit would ship.

    python benchmarks/latency_coverage.py [--simulations 1000] [--seed 0]

A simulated machine, whose speed drifts by +-3 %, times two files by the product's own schedule: blocks of runs between
openings of the files. Each opening shifts the latency a little; there is white noise of 1 % and there are rare
interruptions. The speed is an Ornstein-Uhlenbeck process (3 % is its standard deviation) or a wave (3 % is its
amplitude, the time constant its period). Time constants are shares of the whole measurement. The true latency is the
median over a long time. "Ships" counts the intervals whose upper end is below the true value, so that a limit at the
true value would count as met. 95 % intervals should contain the truth in 95 % of cases and ship in 2.5 %.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from deploypipe.benchmark.latency import mirrored_orders, schedule
from deploypipe.benchmark.timed_runs import BLOCK
from deploypipe.numerics.intervals import interval_of_median_ratio, interval_of_quantile
from deploypipe.records import Interval

Floats = NDArray[np.float64]

NUM_RUNS = 588  # of each file: the default for a file of 4 ms and one of 2.8 ms
TIMES_MS = (4.0, 2.8)
DRIFT = 0.03
NOISE = 0.01
OPENING = 0.003  # the shift of latency by an opening
INTERRUPTED, SLOWER = 0.02, 0.5  # share of the runs, and by how much
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0)  # time constants
_REOPENING = 2 * BLOCK  # opening both files takes as long as so many runs
_LONG = 400_000  # runs that the true value is computed from


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """The shares of simulations with one kind of drift in which an interval held the truth, and shipped."""

    absolute: float
    absolute_ships: float
    relative: float
    relative_ships: float
    width: float  # of the absolute interval, from the value to the upper end: the median share of the value


def simulate(kind: str, share: float, simulations: int, seed: int = 0, num_resamples: int = 200) -> Coverage:
    """kind: "none", "wandering" or "wave". share: time constant, as a share of the measurement's length."""
    generator = np.random.default_rng(seed)
    truth = TIMES_MS[1] * _median_slowness(kind, generator)
    absolute, relative = [], []
    for _ in range(simulations):
        dense, compressed, block = timed(generator, kind, share)
        absolute.append(interval_of_quantile(compressed, 0.5, block=block, num_resamples=num_resamples))
        relative.append(interval_of_median_ratio(compressed, dense, block=block))
    return Coverage(
        absolute=_held(absolute, truth),
        absolute_ships=_shipped(absolute, truth),
        relative=_held(relative, TIMES_MS[1] / TIMES_MS[0]),
        relative_ships=_shipped(relative, TIMES_MS[1] / TIMES_MS[0]),
        width=float(np.median([interval.high / interval.value - 1 for interval in absolute])),
    )


def timed(generator: np.random.Generator, kind: str, share: float) -> tuple[Floats, Floats, int]:
    """Times (n,) of both files in ms, in the order of the product's schedule, and their blocks."""
    openings, runs = schedule(NUM_RUNS)
    length = openings * (_REOPENING + 2 * runs)
    slow = drift(generator, kind, share, length).reshape(openings, -1)[:, _REOPENING:]
    times: list[list[Floats]] = [[], []]
    for row, (_, timing) in zip(slow, mirrored_orders(2, openings, generator), strict=True):
        shift = generator.normal(scale=OPENING, size=2)
        for place, file in enumerate(timing * (runs // (2 * BLOCK))):
            times[file].append(row[place * BLOCK : (place + 1) * BLOCK] + shift[file])
    dense, compressed = (
        TIMES_MS[file] * np.exp(np.concatenate(rows) + _noise(generator, runs * openings))
        for file, rows in enumerate(times)
    )
    return dense, compressed, runs


def drift(generator: np.random.Generator, kind: str, share: float, length: int) -> Floats:
    """Log slowness of the machine, (length,), by run."""
    if kind == "none":
        return np.zeros(length)
    if kind == "wave":
        return DRIFT * np.sin(2 * np.pi * (np.arange(length) / (share * length) + generator.uniform()))
    keeps = np.exp(-1 / (share * length))
    steps = generator.normal(scale=DRIFT * np.sqrt(1 - keeps**2), size=length)
    steps[0] = generator.normal(scale=DRIFT)
    return np.asarray(lfilter([1.0], [1.0, -keeps], steps))


def _noise(generator: np.random.Generator, size: int) -> Floats:
    is_interrupted = generator.random(size) < INTERRUPTED
    return generator.normal(scale=NOISE, size=size) + is_interrupted * generator.exponential(SLOWER, size=size)


def _median_slowness(kind: str, generator: np.random.Generator) -> float:
    """The true median over a long time, of drift, openings and noise together."""
    moods = {
        "none": np.zeros(_LONG),
        "wave": DRIFT * np.sin(2 * np.pi * generator.random(_LONG)),
        "wandering": generator.normal(scale=DRIFT, size=_LONG),
    }
    logs = moods[kind] + generator.normal(scale=OPENING, size=_LONG) + _noise(generator, _LONG)
    return float(np.exp(np.median(logs)))


def _held(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


def _shipped(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.high <= truth for i in intervals]))


def rows(simulations: int, seed: int) -> Iterator[str]:
    """A table in Markdown."""
    yield "| drift | time constant | absolute holds | absolute ships | +- | ratio holds | ratio ships |"
    yield "|---|---|---|---|---|---|---|"
    for kind, shares in (("none", (0.0,)), ("wandering", SHARES), ("wave", SHARES)):
        for share in shares:
            found = simulate(kind, share, simulations, seed)
            cells = (found.absolute, found.absolute_ships, found.width, found.relative, found.relative_ships)
            yield f"| {kind} | {share:g} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    openings, runs = schedule(NUM_RUNS)
    print(f"{options.simulations} simulations a row, seed {options.seed}; {openings} x {runs} runs of each file\n")
    for row in rows(options.simulations, options.seed):
        print(row, flush=True)


if __name__ == "__main__":
    main()
