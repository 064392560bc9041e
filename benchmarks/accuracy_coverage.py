"""How often would the gate ship a network whose true loss is exactly the limit? Intended: 2.5 %; allowed: 5 %.

    python benchmarks/accuracy_coverage.py [--runs 4000] [--samples 50 200]

Each run draws the metrics of two networks on the same samples. The true mean loss is known. Like the gate, a run ships
if `interval_of_drop_pp` ends at or below that loss. There are four shapes of losses, each for a metric between 0 and 1
and for an unbounded one. The table also shows Student's t, and the width of our interval relative to it.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.stats import t

from deploypipe.numerics.intervals import interval_of_drop_pp

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Draw: TypeAlias = Callable[[np.random.Generator, int], Array]  # (generator, n) -> (n,) losses in percentage points


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The result of many runs at the limit."""

    shipped: float  # share
    shipped_by_t: float
    width_against_t: float  # median quotient of the two distances from value to upper end


SHAPES: dict[str, tuple[Draw, float]] = {  # with the true mean loss
    "normal": (lambda random, n: random.normal(1, 5, n), 1.0),
    "lognormal": (lambda random, n: random.lognormal(0, 1, n), math.exp(0.5)),
    "5 % lose 20": (lambda random, n: np.where(random.random(n) < 0.05, 20.0, 0.0), 1.0),
    "1 % lose 100": (lambda random, n: np.where(random.random(n) < 0.01, 100.0, 0.0), 1.0),
}


def rates(shape: str, num_samples: int, num_runs: int, *, is_fraction: bool, seed: int = 0) -> Rates:
    """Simulate `num_runs` comparisons of networks with a true loss that equals the limit."""
    draw, limit = SHAPES[shape]
    random = np.random.default_rng(seed)
    shipped, shipped_by_t, widths = 0, 0, []
    for _ in range(num_runs):
        losses = draw(random, num_samples)
        dense = _fractions(random, losses) if is_fraction else np.zeros(num_samples)
        drop = interval_of_drop_pp(dense, dense - losses / 100)
        half = float(t.ppf(0.975, num_samples - 1)) * float(losses.std(ddof=1)) / math.sqrt(num_samples)
        shipped += drop.high <= limit
        shipped_by_t += float(losses.mean()) + half <= limit
        if half > 0:
            widths.append((drop.high - drop.value) / half)
    return Rates(
        shipped=shipped / num_runs,
        shipped_by_t=shipped_by_t / num_runs,
        width_against_t=float(np.median(widths)) if widths else math.inf,
    )


def _fractions(random: np.random.Generator, losses: Array) -> Array:
    """A metric between 0 and 1 that is high enough for each sample to lose its drawn loss."""
    return np.clip(random.uniform(0.5, 0.8, len(losses)), np.maximum(losses, 0) / 100, 1 + np.minimum(losses, 0) / 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--samples", type=int, nargs="+", default=[50, 200])
    options = parser.parse_args()
    print("| losses | metric | samples | shipped at the limit | by Student's t | wider than t |")
    print("|---|---|---:|---:|---:|---:|")
    for shape in SHAPES:
        for is_fraction in (True, False):
            for n in options.samples:
                found = rates(shape, n, options.runs, is_fraction=is_fraction)
                kind = "fraction" if is_fraction else "without bounds"
                cells = (f"{found.shipped:.2%}", f"{found.shipped_by_t:.2%}", f"{found.width_against_t:.1f}x")
                print(f"| {shape} | {kind} | {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
