"""Stability of a score: agreement of two halves, samples needed, and the score of shuffled labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.stats import spearmanr

from deploypipe.errors import DataError
from deploypipe.observe.pass_statistics import Moments
from deploypipe.records import ScoreTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Null:
    """Sum of a group's scores with the real labels, and on average with shuffled labels."""

    real: float
    shuffled: float


def stability(first: ScoreTable, second: ScoreTable) -> dict[str, float]:
    """By group: Spearman's rank correlation of two score tables, from two halves of the samples.

    1 for a group of one unit, which has only one order. 0 if a table gives all units of a group the same score.
    """
    return {name: _rank_correlation(row, second.channels[name]) for name, row in first.channels.items()}


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    if len(first) == 1:
        return 1.0
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return float(spearmanr(first, second).statistic)


def recommended_samples(rho: float, num_samples: int, target: float = 0.9) -> int | None:
    """Samples needed for a correlation of `target` between scores on two such sets; None if no number helps.

    rho: `stability` of two halves of `num_samples` each holding half of them. Solves the Spearman-Brown formula
    (Spearman 1910, Brown 1910) target = k rho / (1 + (k - 1) rho) for the factor k by which a half must grow. Exact for
    linear correlation and errors with variance proportional to 1 / samples; close for ranks. None for rho <= 0.
    """
    if rho <= 0:
        return None
    lengthening = target * (1 - rho) / (rho * (1 - target))
    return max(1, math.ceil(round(lengthening * num_samples / 2, 6)))


def shuffled_null(score: Callable[[Moments], ScoreTable], moments: Moments, *, seeds: Sequence[int]) -> dict[str, Null]:
    """Each group's total score with permuted labels, averaged over `seeds`.

    For label scores in nats (LabelMi, ConditionalMi). A real total near the shuffled one is estimator bias, not
    information. Groups that the method could not score itself are left out.
    """
    if moments.labels is None:
        raise DataError(
            "shuffling needs labels, but the calibration samples have none; give batches of (inputs, class indices)"
        )
    table = score(moments)
    totals = {name: sum(row) for name, row in table.channels.items() if name not in table.reasons}
    shuffled = dict.fromkeys(totals, 0.0)
    for seed in seeds:
        permutation = torch.randperm(len(moments.labels), generator=torch.Generator().manual_seed(seed))
        channels = score(replace(moments, labels=moments.labels[permutation])).channels
        for name in shuffled:
            shuffled[name] += sum(channels[name]) / len(seeds)
    return {name: Null(real=total, shuffled=shuffled[name]) for name, total in totals.items()}
