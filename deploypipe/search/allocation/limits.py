"""The limits that a search holds its candidates to, derived from a target's budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deploypipe.budgets import BUDGETS, LATENCY_P50, MACS, PEAK_MEMORY, Predictor
from deploypipe.errors import BudgetError
from deploypipe.records import Candidate, Check, Measurement, ModelFile, PrecisionRow, SearchResult
from deploypipe.runtimes.ability_for_target import Ability
from deploypipe.target import Limit

_FINALISTS_MARGIN = 0.5  # part of the margin that finalists keep; the gate, which measures once more, needs the rest
_STAND_IN_SHARE = 0.5  # of the dense MACs, for a limit in ms or MiB
_MIN_FILL = 0.1  # of a budget; no candidate below it was ever worth repairing
_MIB_PER_PARAM = 4 / 2**20
# Predictors that the solver can bound. If no choice meets all bounds, the solver takes the cheapest by the first one.
_SOLVER_ORDER: tuple[Predictor, ...] = ("mac_count", "param_count", "latency_model", "params_in_file")
Range = tuple[float, float]


def search_limits(limits: dict[str, Limit], ability: Ability) -> tuple[dict[str, Limit], str]:
    """Return the limits that a candidate can be held to on this machine, and a sentence about those replaced.

    A limit that cannot be measured here is replaced by one of MACs: at the same share of the dense network's, or at
    half of them for a limit in ms or MiB. A limit of MACs that the user gave stays. The gate checks the target's own
    limits, and finds those that were replaced UNKNOWN.
    """
    replaced = [name for name in limits if BUDGETS[name].source != "counted"]
    if ability.verdict == "run" or not replaced:
        return limits, ""
    kept = {name: limit for name, limit in limits.items() if name not in replaced}
    sentence = f"{' and '.join(replaced)} cannot be measured here, and the search went by MACs instead"
    if MACS in kept:
        return kept, f"{sentence}: those of budget.macs"
    share = min(limits[name].value if limits[name].is_relative else _STAND_IN_SHARE for name in replaced)
    return {**kept, MACS: Limit(value=share, is_relative=True)}, f"{sentence}, at {share:g}x those of the dense network"


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
    """The dense network in another precision. Its peak memory, which was not measured, counts as that in fp32."""
    size = dense.file_size_mib if row.file is None or row.precision == "fp32" else row.file.size_bytes / 2**20
    latency = dense.latency_p50_ms
    if latency is not None and row.latency_ratio is not None:
        latency *= row.latency_ratio.high
    return replace(dense, latency_p50_ms=latency, file_size_mib=size)


def violations(candidate: Candidate, dense: Candidate, limits: Mapping[str, Limit]) -> dict[str, float]:
    """Relative excess over each limit whose figure was measured; zero or less meets it."""
    excess = {}
    for name, limit in limits.items():
        measured, reference = BUDGETS[name].of_candidate(candidate), BUDGETS[name].of_candidate(dense)
        if measured is not None and reference is not None:  # the gate reports a figure that was not measured
            excess[name] = measured / limit.absolute(reference) - 1
    return excess


def is_over_budget(candidate: Candidate, dense: Candidate, limits: Mapping[str, Limit]) -> bool:
    """Whether a network exceeds any of the limits."""
    return any(excess > 0 for excess in violations(candidate, dense, limits).values())


def with_margin(limits: Mapping[str, Limit], part: float = 1.0) -> dict[str, Limit]:
    """Lower the limits of measured figures by `part` of their margin.

    A network that fills the whole budget would leave no room for the gate, which measures once more.
    """
    return {
        name: replace(limit, value=limit.value * (1 - part * BUDGETS[name].margin)) for name, limit in limits.items()
    }


def share_to_confirm(limits: Mapping[str, Limit], dense: Candidate) -> float:
    """The share of the dense network's latency that a finalist may take at most when it is timed again."""
    limit = with_margin(limits, _FINALISTS_MARGIN)[LATENCY_P50]
    return limit.absolute(timed_ms(dense)) / timed_ms(dense)


def tightened_limit_fraction(limits: Mapping[str, Limit], found: SearchResult, failed: Check) -> float:
    """The part of the latency limit that finalists have to meet, so that a benchmark like the `failed` one passes.

    That benchmark measured the winner slower than it was when it was timed again.
    """
    if failed.interval is None or failed.limit is None:
        raise ValueError(f"{failed.name} was not measured")
    measured = limits[LATENCY_P50].absolute(timed_ms(found.dense)) * failed.interval.high / failed.limit
    return found.timed_again[str(found.best)] * timed_ms(found.dense) / measured


def timed_ms(candidate: Candidate) -> float:
    """The latency of a network that was timed; ValueError if it was not."""
    if candidate.latency_p50_ms is None:
        raise ValueError("the network was not timed")
    return candidate.latency_p50_ms


def bounded_shares(
    limits: Mapping[str, Limit], dense: Candidate, shipped_mib: float, *, is_timed: bool
) -> dict[str, float]:
    """The share of the dense network's figure that a candidate may reach, for each budget that the solver can bound.

    shipped_mib: size of the dense network's file in the precision that ships.
    is_timed: whether there are timed networks for the latency model.
    Raises BudgetError if a file exceeds its budget even without its weights.
    """
    shares = {}
    for predictor in _SOLVER_ORDER:
        for name in (name for name in limits if BUDGETS[name].predictor == predictor):
            if predictor == "params_in_file":
                shares[name] = _share_of_weights(name, limits[name], dense, shipped_mib)
            elif (figure := BUDGETS[name].of_candidate(dense)) and (is_timed or predictor != "latency_model"):
                shares[name] = limits[name].absolute(figure) / figure
    return shares or {MACS: 1.0}


def _share_of_weights(name: str, limit: Limit, dense: Candidate, shipped_mib: float) -> float:
    """The share of the parameters that a file within the limit can hold next to its graph."""
    per_param = min(shipped_mib / dense.num_params, _MIB_PER_PARAM)
    graph_mib = shipped_mib - per_param * dense.num_params
    limit_mib = limit.absolute(dense.file_size_mib)
    if limit_mib <= graph_mib:
        raise BudgetError(
            f"budget.{name}: {limit_mib:.3g} MiB is out of reach: the file takes {graph_mib:.3g} MiB without its "
            "weights; relax the budget in the target"
        )
    return (limit_mib - graph_mib) / (per_param * dense.num_params)


def fill_range(shares: Mapping[str, float], limits: Mapping[str, Limit], objectives: Sequence[str]) -> Range:
    """The smallest and the largest part of its budgets that a trial fills.

    A trial fills all of them, unless the search has several objectives, or a budget that only a finished candidate
    can be measured by.
    """
    if len(objectives) > 1 or not set(limits) <= set(shares):
        return _MIN_FILL, 1.0
    return 1.0, 1.0


def memory_limit_mib(limits: Mapping[str, Limit], dense: Candidate, objectives: Sequence[str]) -> float | None:
    """The limit of a candidate's peak memory: the budget; if memory is only an objective, the dense network's peak."""
    if PEAK_MEMORY in limits and dense.peak_memory_mib is not None:
        return limits[PEAK_MEMORY].absolute(dense.peak_memory_mib)
    return dense.peak_memory_mib if PEAK_MEMORY in objectives else None
