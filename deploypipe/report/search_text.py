"""What a search found, and what held it back, as sentences and rows: only what its records say."""

from collections import Counter
from dataclasses import dataclass
from math import isnan

from scipy.stats import spearmanr

from deploypipe.budgets import BUDGETS, Predictor
from deploypipe.records import MIN_TRIALS_FOR_IMPORTANCES, LatencyFit, SearchResult, Structures
from deploypipe.report.width_tables import Stage
from deploypipe.runs.result import RunResult
from deploypipe.target import Target

REACH_HEADER = ("budget", "least in reach", "asked for", "held to in the search", "chosen")
STAGE_HEADER = ("stage", "units left", "layers made narrower", "blocks removed")
_BINDING = 0.97  # of what the search allows

# What the least reachable share is about, by how it was found.
_LEAST_REMARKS: dict[Predictor | None, str] = {"latency_model": ", measured", "params_in_file": " of its weights"}
_KNOBS = {
    "fill": "which part of the budgets the plan was to fill",
    "exponent": "below 1 small losses count more",
    "block_weight": "how much the losses of blocks count",
    "late": "above 0 losses near the output count more",
    "by_importance": "1 for blocks in the order of their similarity (CKA), 0 for that of their losses",
    "magnitude": "how much of magnitude's ranking is mixed into that of the recipe's scorer",
    "control": "0 for widths by measured losses, 1 for uniform ones, 2 for those that magnitude alone leaves",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One budget as the search judged its winner by it, in shares of the dense network's figure."""

    name: str
    limit: float
    chosen: float


def held_budgets(search: SearchResult) -> list[Held]:
    """The limits that trials were held to: a latency budget's is a little lower, for the gate's interval."""
    best = search.trials[search.best]
    held = []
    for name, excess in best.violations.items():
        own, dense = BUDGETS[name].of_candidate(best.candidate), BUDGETS[name].of_candidate(search.dense)
        if own is not None and dense:
            held.append(Held(name=name, limit=own / (1 + excess) / dense, chosen=own / dense))
    return held


def reach_rows(search: SearchResult, target: Target) -> list[tuple[str, ...]]:
    """What each budget could come to, is to come to, and came to."""
    least = search.feasibility.least if search.feasibility else {}
    held = {budget.name: budget for budget in held_budgets(search)}
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys((*target.budget.limits(), *held, *least)):
        asked = getattr(target.budget, name)
        rows.append(
            (
                BUDGETS[name].label,
                _least(name, least[name]) if name in least else "not predicted",
                asked or ("nothing; stands in for what cannot be measured here" if name in held else "nothing"),
                _times(held[name].limit) if name in held else "-",
                _times(held[name].chosen) if name in held else "-",
            )
        )
    return rows


def limit_sentences(result: RunResult, search: SearchResult, stages: tuple[Stage, ...]) -> list[str]:
    """What limited the result."""
    return [
        _trials_sentence(search),
        *_workers_sentence(search),
        *_narrowed_sentence(search),
        *_finalists_sentence(search),
        *_too_slow_sentence(result),
        *_budget_sentences(search),
        _accuracy_sentence(search, result.target),
        *_narrowest_sentence(stages, result.structures, result.target.channel_multiple),
        *_blocks_sentence(result, search),
        *_stages_sentence(stages),
    ]


def stage_rows(stages: tuple[Stage, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        share = stage.share_left
        stayed = [layer for layer in stage.layers if layer.num_units and not layer.is_gone]
        narrower = sum(layer.kept < layer.num_units for layer in stayed)
        rows.append(
            (
                stage.name,
                "-" if share is None else f"{_percent(share)} of {stage.num_units:,}",
                f"{narrower} of {len(stayed)}" if stayed else "-",
                f"{stage.num_removed_blocks} of {stage.num_blocks}" if stage.num_blocks else "-",
            )
        )
    return rows


def importance_note(search: SearchResult) -> str:
    """What the knobs are, or why nothing is said of them."""
    if search.importances:
        told = "; ".join(f"{name}: {_KNOBS[name]}" for name in search.importances if name in _KNOBS)
        return f"Share of what decided whether a trial within the budget was among the most accurate quarter. {told}."
    num_feasible = sum(trial.feasible for trial in search.trials)
    if num_feasible < MIN_TRIALS_FOR_IMPORTANCES:
        return (
            f"Not told: {num_feasible} trials lie within the budget, and it takes {MIN_TRIALS_FOR_IMPORTANCES} to tell."
        )
    return "Not told: the search did not note it."


def fit_sentence(fit: LatencyFit) -> str:
    """How far the latency model was off, and how well it ranked."""
    errors = [abs(a - b) for a, b in zip(fit.predicted, fit.measured, strict=True)]
    told = f"mean absolute error {100 * sum(errors) / len(errors):.1f} % of the dense network's latency"
    can_rank = min(len(set(fit.predicted)), len(set(fit.measured))) > 1
    rank = float(spearmanr(fit.predicted, fit.measured).statistic) if can_rank else float("nan")
    told += "" if isnan(rank) else f", Spearman correlation {rank:.2f}"
    return f"{len(errors)} networks, each predicted without its own measurement: {told}."


def _trials_sentence(search: SearchResult) -> str:
    feasible = [trial for trial in search.trials if trial.feasible]
    stopped = sum(trial.is_stopped for trial in feasible)
    told = f"{len(feasible)} of {len(search.trials)} trials lie within the budget"
    return f"{told}; {stopped} of them were stopped early, as certainly less accurate." if stopped else f"{told}."


def _workers_sentence(search: SearchResult) -> list[str]:
    counts = Counter(trial.judged_by for trial in search.trials if trial.judged_by)
    if not counts:
        return []
    best = search.trials[search.best]
    each = ", ".join(f"{worker} ({count})" for worker, count in counts.most_common())
    taken = best.candidate.measured_by
    measured = f"; the latency of trial {best.number} was taken by {taken}" if taken else ""
    return [f"Trials were done by {each}{measured}."]


def _narrowed_sentence(search: SearchResult) -> list[str]:
    narrowed = [trial for trial in search.trials if trial.narrowed_from is not None]
    if not narrowed:
        return []
    made = ", ".join(f"{trial.number} from {trial.narrowed_from}" for trial in narrowed)
    return [f"The best trials did not hold their latency when they were timed again; faster ones were made: {made}."]


def _too_slow_sentence(result: RunResult) -> list[str]:
    if not result.too_slow:
        return []
    return [f"Trained before this network, and measured too slow at last: {'; '.join(result.too_slow)}."]


def _finalists_sentence(search: SearchResult) -> list[str]:
    if not search.tuned:
        return []
    each = [
        f"{100 * search.trials[int(number)].candidate.accuracy:.2f} -> {100 * accuracy:.2f} % (trial {number})"
        for number, accuracy in search.tuned.items()
    ]
    return [f"The best were trained for a short while, on val: {', '.join(each)}; trial {search.best} went on."]


def _budget_sentences(search: SearchResult) -> list[str]:
    told = []
    for budget in held_budgets(search):
        fill = budget.chosen / budget.limit
        verdict = "this budget was binding" if fill > _BINDING else "this budget left room"
        label, fill_asked = BUDGETS[budget.name].label, search.trials[search.best].knobs.get("fill")
        is_predicted = BUDGETS[budget.name].predictor == "latency_model" and search.latency_fit is not None
        aim = f", its plan aimed at {100 * fill_asked:.1f} %" if is_predicted and fill_asked is not None else ""
        told.append(
            f"{label[0].upper()}{label[1:]}: the chosen network fills {100 * fill:.1f} % of what the search allowed "
            f"({_times(budget.limit)} the dense network's){aim}; {verdict}."
        )
    return told


def _accuracy_sentence(search: SearchResult, target: Target) -> str:
    drop_pp = 100 * (search.dense.accuracy - search.trials[search.best].candidate.accuracy)
    side = f"{drop_pp:.2f} pp below" if drop_pp > 0 else f"{-drop_pp:.2f} pp above"
    if round(drop_pp, 2) == 0:
        side = "level with"
    allowed = f"{target.budget.accuracy_drop_pp:g} pp"
    return (
        f"Before fine-tuning it was {side} the dense network on val; the budget allows a drop of {allowed} at the end."
    )


def _narrowest_sentence(stages: tuple[Stage, ...], structures: Structures, channel_multiple: int) -> list[str]:
    least = {group.name: structures.least_width(group, channel_multiple) for group in structures.groups}
    stayed = [layer for stage in stages for layer in stage.layers if layer.num_units and not layer.is_gone]
    narrowest = [layer for layer in stayed if layer.kept == least[layer.name]]
    if not stayed:
        return []
    told = f"{len(narrowest)} of the {len(stayed)} layers that stay are at the narrowest width allowed"
    return [f"{told} (widths are multiples of {channel_multiple})." if channel_multiple > 1 else f"{told}."]


def _blocks_sentence(result: RunResult, search: SearchResult) -> list[str]:
    blocks, least = result.structures.blocks, result.structures.constraints.least_blocks
    if not blocks:
        return []
    if not result.recipe.search.prune_blocks:
        return ["No block could go: the recipe keeps them (search.prune_blocks)."]
    num_left = len(blocks) - len(search.trials[search.best].plan.blocks)
    if num_left == 0:
        return ["Every block that could go is gone."]
    return [f"No further block could go: {num_left} of {len(blocks)} have to stay."] if num_left == least else []


def _stages_sentence(stages: tuple[Stage, ...]) -> list[str]:
    shares = [(stage.share_left, stage) for stage in stages if stage.share_left is not None]
    if not shares:
        return []
    (low, shrunk), (high, kept) = min(shares, key=lambda s: s[0]), max(shares, key=lambda s: s[0])
    if low == high:
        return [f"Every stage keeps {_percent(low)} of its units."] if len(shares) > 1 else []
    return [f"{shrunk.name} shrank most: {_stage(shrunk, low)}. {kept.name} was kept most: {_stage(kept, high)}."]


def _stage(stage: Stage, share: float) -> str:
    blocks = f", {stage.num_removed_blocks} of {stage.num_blocks} blocks removed" if stage.num_blocks else ""
    return f"{_percent(share)} of its units left{blocks}"


def _least(name: str, share: float) -> str:
    return _times(share) + _LEAST_REMARKS.get(BUDGETS[name].predictor, "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(share: float) -> str:
    return f"{share:.3g}x"
