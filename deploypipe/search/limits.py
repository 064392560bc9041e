"""What a search holds its candidates to."""

from collections.abc import Mapping

from deploypipe.records import Candidate, Curves, Measurement, ModelFile, Structures
from deploypipe.runtimes.ability import Ability
from deploypipe.search.allocate import least_macs
from deploypipe.search.trials import violations
from deploypipe.target import Limit

_LATENCY_MARGIN = 0.03
_STAND_IN = 0.5  # of the dense MACs, for a limit that has no share
_SMALLEST_SHARE = 0.1  # of the dense MACs; below, no candidate was ever worth repairing


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


def is_over_budget(dense: Measurement, opened: ModelFile, limits: Mapping[str, Limit]) -> bool:
    """Whether the dense network, of which the device opens the file `opened`, is above any of the limits."""
    candidate = candidate_of(dense, opened, accuracy=0.0)  # no budget of the search is about it
    return any(excess > 0 for excess in violations(candidate, candidate, limits).values())


def with_margin(limits: Mapping[str, Limit]) -> dict[str, Limit]:
    """The latency a little lower: a search that fills the whole budget leaves the gate's interval nothing to lie in."""
    tightened = dict(limits)
    if "latency_p50" in limits:
        limit = limits["latency_p50"]
        tightened["latency_p50"] = Limit(value=limit.value * (1 - _LATENCY_MARGIN), is_relative=limit.is_relative)
    return tightened


def macs_bounds(structures: Structures, curves: Curves, limits: Mapping[str, Limit]) -> tuple[float, float]:
    """Between which shares of the dense MACs the study looks. With no other budget, at the limit alone."""
    high = min(1.0, limits["macs"].absolute(structures.num_macs) / structures.num_macs) if "macs" in limits else 1.0
    if set(limits) == {"macs"}:
        return high, high
    low = max(_SMALLEST_SHARE, least_macs(structures, curves) * 1.1)
    return min(low, high), high
