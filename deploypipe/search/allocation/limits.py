"""What a search holds its candidates to."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deploypipe.errors import BudgetError
from deploypipe.records import Candidate, Check, Measurement, ModelFile, PrecisionRow, SearchResult
from deploypipe.runtimes.device_ability import Ability
from deploypipe.search.evaluation.trial_loop import violations
from deploypipe.target import Limit

_MARGINS = {"latency_p50": 0.03, "peak_memory": 0.05}
_CONFIRMED = 0.5  # finalists keep that part of the margin; the gate, which measures once more, needs the rest
_STAND_IN = 0.5  # of the dense MACs, for a limit that has no share
_SMALLEST_SHARE = 0.1  # of a budget; below, no candidate was ever worth repairing
_MIB_PER_PARAM = 4 / 2**20
Range = tuple[float, float]


def search_limits(limits: dict[str, Limit], ability: Ability) -> tuple[dict[str, Limit], str]:
    """The limits a search can hold a candidate to, and what stands in for those that cannot be measured here.

    MACs do, at the same share of the dense network's, or at half of them for a bound in ms or MiB; a limit of MACs
    that the user gave stays. The gate goes by the target's own limits, and finds these UNKNOWN.
    """
    unmeasured_ones = [name for name in ("latency_p50", "peak_memory") if name in limits]
    if ability.verdict == "run" or not unmeasured_ones:
        return limits, ""
    shares = [limits[name].value if limits[name].is_relative else _STAND_IN for name in unmeasured_ones]
    kept = {name: limit for name, limit in limits.items() if name not in unmeasured_ones}
    told = f"{' and '.join(unmeasured_ones)} cannot be measured here, and the search went by MACs instead"
    if "macs" in kept:
        return kept, f"{told}: those of budget.macs"
    share = min(shares)
    return {**kept, "macs": Limit(value=share, is_relative=True)}, f"{told}, at {share:g}x those of the dense network"


def candidate_of(dense: Measurement, opened: ModelFile, accuracy: float) -> Candidate:
    """The dense network's own figures, as a search compares them."""
    return Candidate(
        accuracy=accuracy,
        latency_p50_ms=dense.latency.p50_ms.value if dense.latency else None,
        peak_memory_mib=dense.peak_memory_mib,
        file_size_mib=opened.size_bytes / 2**20,
        num_params=dense.num_params,
        num_macs=dense.num_macs,
    )


def converted(dense: Candidate, row: PrecisionRow) -> Candidate:
    """The dense network in another precision. Its peak memory, which nobody measured, counts as that in fp32."""
    size = dense.file_size_mib if row.file is None or row.precision == "fp32" else row.file.size_bytes / 2**20
    latency = dense.latency_p50_ms
    if latency is not None and row.latency_ratio is not None:
        latency *= row.latency_ratio.high
    return replace(dense, latency_p50_ms=latency, file_size_mib=size)


def is_over_budget(candidate: Candidate, dense: Candidate, limits: Mapping[str, Limit]) -> bool:
    """Whether a network is above any of the limits."""
    return any(excess > 0 for excess in violations(candidate, dense, limits).values())


def with_margin(limits: Mapping[str, Limit], part: float = 1.0) -> dict[str, Limit]:
    """What is measured a little lower: a search that fills the whole budget leaves the gate's measurement no room.

    part: of the margin that is kept.
    """
    return {
        name: replace(limit, value=limit.value * (1 - part * _MARGINS[name])) if name in _MARGINS else limit
        for name, limit in limits.items()
    }


def share_to_confirm(limits: Mapping[str, Limit], dense: Candidate) -> float:
    """Of the dense network's latency, which was timed: the most that finalists may take when timed once more."""
    limit = with_margin(limits, _CONFIRMED)["latency_p50"]
    return limit.absolute(timed_ms(dense)) / timed_ms(dense)


def tightened_limit_fraction(limits: Mapping[str, Limit], found: SearchResult, failed: Check) -> float:
    """The part of the latency limit that finalists have to be held to, for a benchmark like the one that `failed` to
    pass: it took the winner for slower than it was when it was timed again."""
    if failed.interval is None or failed.limit is None:
        raise ValueError(f"{failed.name} was not measured")
    measured = limits["latency_p50"].absolute(timed_ms(found.dense)) * failed.interval.high / failed.limit
    return found.timed_again[str(found.best)] * timed_ms(found.dense) / measured


def timed_ms(candidate: Candidate) -> float:
    """The latency of a network that was timed."""
    if candidate.latency_p50_ms is None:
        raise ValueError("the network was not timed")
    return candidate.latency_p50_ms


def bounded_shares(
    limits: Mapping[str, Limit], dense: Candidate, shipped_mib: float, *, is_timed: bool
) -> dict[str, float]:
    """By budget, the most that a candidate may come to of the dense network's figure: of those that can be predicted.

    shipped_mib: the dense network's file in the precision that ships. A file's size is bounded by its parameters,
    next to which it holds its graph: BudgetError where that alone is over budget.
    """
    figures = {"macs": dense.num_macs, "params": dense.num_params}
    shares = {name: limits[name].absolute(figure) / figure for name, figure in figures.items() if name in limits}
    if "latency_p50" in limits and is_timed and dense.latency_p50_ms:
        shares["latency_p50"] = limits["latency_p50"].absolute(dense.latency_p50_ms) / dense.latency_p50_ms
    if "file_size" in limits:
        per_param = min(shipped_mib / dense.num_params, _MIB_PER_PARAM)
        graph = shipped_mib - per_param * dense.num_params
        most = limits["file_size"].absolute(dense.file_size_mib)
        if most <= graph:
            raise BudgetError(
                f"budget.file_size: {most:.3g} MiB is out of reach: the file takes {graph:.3g} MiB without its "
                "weights; relax the budget in the target"
            )
        shares["file_size"] = (most - graph) / (per_param * dense.num_params)
    return shares or {"macs": 1.0}


def fill_range(shares: Mapping[str, float], limits: Mapping[str, Limit], objectives: Sequence[str]) -> Range:
    """Which part of the budgets a trial fills, from the least to the most: all of them, unless a front of several
    objectives is wanted, or a budget is set that only a finished candidate tells.
    """
    if len(objectives) > 1 or not set(limits) <= set(shares):
        return _SMALLEST_SHARE, 1.0
    return 1.0, 1.0


def memory_limit_mib(limits: Mapping[str, Limit], dense: Candidate, objectives: Sequence[str]) -> float | None:
    """What a candidate's peak memory is held to: the budget, or the dense network's where it is an objective only."""
    if "peak_memory" in limits and dense.peak_memory_mib is not None:
        return limits["peak_memory"].absolute(dense.peak_memory_mib)
    return dense.peak_memory_mib if "peak_memory" in objectives else None
