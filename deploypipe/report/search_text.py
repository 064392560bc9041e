"""Sentences and table rows about a search: its result, and what limited it."""

from collections import Counter
from dataclasses import dataclass
from math import isnan

from scipy.stats import spearmanr

from deploypipe.budgets import BUDGETS, Predictor
from deploypipe.records import MIN_TRIALS_FOR_IMPORTANCES, LatencyFit, SearchResult, Structures
from deploypipe.report.width_tables import Stage
from deploypipe.runs.result import RunResult
from deploypipe.target import Target
from deploypipe.text.amounts import NO_LIMIT, share_limit_text

REACH_HEADER = ("budget", "lowest reachable", "asked for", "limit in the search", "chosen")
STAGE_HEADER = ("stage", "units left", "layers made narrower", "blocks removed")
_BINDING = 0.97  # of what the search allows

# How the lowest reachable share was found.
_LEAST_REMARKS: dict[Predictor | None, str] = {"latency_model": ", measured", "params_in_file": " of its weights"}
_KNOBS = {
    "fill": "the share of the budgets that the plan aims to use",
    "exponent": "below 1, small losses count more",
    "block_weight": "the weight of the losses of blocks",
    "late": "above 0, losses near the output count more",
    "by_importance": "1: remove blocks by similarity (CKA), 0: by their losses",
    "magnitude": "the share of the magnitude ranking mixed into the ranking of the recipe's scorer",
    "control": "0: widths by measured losses, 1: uniform widths, 2: widths by magnitude alone",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A budget's limit in the search and the winner's figure, as shares of the dense network's figure."""

    name: str
    limit: float
    chosen: float


def held_budgets(search: SearchResult) -> list[Held]:
    """List the limits that the search held its trials to. Those of measured figures are lower than the budget's."""
    best = search.trials[search.best]
    held = []
    for name, excess in best.violations.items():
        own, dense = BUDGETS[name].of_candidate(best.candidate), BUDGETS[name].of_candidate(search.dense)
        if own is not None and dense:
            held.append(Held(name=name, limit=own / (1 + excess) / dense, chosen=own / dense))
    return held


def reach_rows(search: SearchResult, target: Target) -> list[tuple[str, ...]]:
    """One row for each budget: the lowest reachable share, the limit asked for, that of the search, the chosen one."""
    least = search.feasibility.least if search.feasibility else {}
    held = {budget.name: budget for budget in held_budgets(search)}
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys((*target.budget.limits(), *held, *least)):
        limit = target.budget.limits().get(name)
        asked = NO_LIMIT if limit and limit.bounds_nothing else getattr(target.budget, name)
        rows.append(
            (
                BUDGETS[name].label,
                _least(name, least[name]) if name in least else "not predicted",
                asked or ("nothing; replaces a budget that cannot be measured here" if name in held else "nothing"),
                share_limit_text(held[name].limit) if name in held else "-",
                _times(held[name].chosen) if name in held else "-",
            )
        )
    return rows


def margin_sentence(target: Target) -> str:
    """Say how far below each limit the search aims, and why; "" if no limit has a margin."""
    rows = [BUDGETS[name] for name in target.budget.limits() if BUDGETS[name].margin]
    if not rows:
        return ""
    margins = " and ".join(f"{100 * row.margin:g} % for {row.label}" for row in rows)
    return f"The search aims below a limit that is measured ({margins}), because the gate measures once more."


def limit_sentences(result: RunResult, search: SearchResult, stages: tuple[Stage, ...]) -> list[str]:
    """Say what limited the result."""
    return [
        _trials_sentence(search),
        *_time_sentence(result, search),
        *_workers_sentence(search),
        *_curves_sentence(search),
        *_narrowed_sentence(search),
        *_finalists_sentence(search),
        *_chosen_sentence(search),
        *_too_slow_sentence(result),
        *_budget_sentences(search),
        _accuracy_sentence(search, result.target),
        *_narrowest_sentence(stages, result.structures, result.target.channel_multiple),
        *_blocks_sentence(result, search),
        *_stages_sentence(stages),
    ]


def _curves_sentence(search: SearchResult) -> list[str]:
    points = search.curve_points
    if points is None:
        return []
    measured = f"{points.num_measured:,} losses were measured on {points.num_samples:,} samples"
    if not points.num_predicted:
        return [f"Loss curves: {measured}."]
    return [f"Loss curves: {measured}, and {points.num_predicted:,} others predicted from them."]


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
    """Say what the knobs mean, or why their importances are not known."""
    if search.importances:
        knobs = "; ".join(f"{name}: {_KNOBS[name]}" for name in search.importances if name in _KNOBS)
        return (
            f"How much each knob decides whether a trial within the budget is among the most accurate quarter. {knobs}."
        )
    num_feasible = sum(trial.feasible for trial in search.trials)
    if num_feasible < MIN_TRIALS_FOR_IMPORTANCES:
        return (
            f"Not available: {num_feasible} trials lie within the budget, and at least {MIN_TRIALS_FOR_IMPORTANCES} "
            "are needed."
        )
    return "Not available: the search did not record it."


def fit_sentence(fit: LatencyFit) -> str:
    """State the error of the latency model, and how well it ranked networks."""
    errors = [abs(a - b) for a, b in zip(fit.predicted, fit.measured, strict=True)]
    text = f"mean absolute error {100 * sum(errors) / len(errors):.1f} % of the dense network's latency"
    can_rank = min(len(set(fit.predicted)), len(set(fit.measured))) > 1
    rank = float(spearmanr(fit.predicted, fit.measured).statistic) if can_rank else float("nan")
    text += "" if isnan(rank) else f", Spearman correlation {rank:.2f}"
    return f"{len(errors)} networks, each predicted without its own measurement: {text}."


def _trials_sentence(search: SearchResult) -> str:
    feasible = [trial for trial in search.trials if trial.feasible]
    stopped = sum(trial.is_stopped for trial in feasible)
    text = f"{len(feasible)} of {len(search.trials)} trials lie within the budget"
    return f"{text}; {stopped} of them were stopped early, because they were less accurate." if stopped else f"{text}."


def _time_sentence(result: RunResult, search: SearchResult) -> list[str]:
    settings = result.recipe.search
    if not stopped_by_time(result, search):
        return []
    done = num_searched(search)
    return [
        f"The search ended after {settings.max_minutes:g} minutes: {done} of {settings.num_trials} trials were run."
    ]


def num_searched(search: SearchResult) -> int:
    """The trials of the search itself, without the faster versions made of its best."""
    return sum(trial.narrowed_from is None for trial in search.trials)


def stopped_by_time(result: RunResult, search: SearchResult) -> bool:
    """Whether `search.max_minutes` ended the search before its last trial."""
    settings = result.recipe.search
    return settings.max_minutes is not None and num_searched(search) < settings.num_trials


def _workers_sentence(search: SearchResult) -> list[str]:
    counts = Counter(trial.evaluated_by for trial in search.trials if trial.evaluated_by)
    if not counts:
        return []
    best = search.trials[search.best]
    each = ", ".join(f"{worker} ({count})" for worker, count in counts.most_common())
    taken = best.candidate.measured_by
    measured = f"; the latency of trial {best.number} was measured by {taken}" if taken else ""
    return [f"Trials were run by {each}{measured}."]


def _narrowed_sentence(search: SearchResult) -> list[str]:
    narrowed = [trial for trial in search.trials if trial.narrowed_from is not None]
    if not narrowed:
        return []
    made = ", ".join(f"{trial.number} from {trial.narrowed_from}" for trial in narrowed)
    return [f"The best trials exceeded the latency budget when timed again; faster versions were made: {made}."]


def _too_slow_sentence(result: RunResult) -> list[str]:
    if not result.too_slow:
        return []
    return [f"Fine-tuned before this network, but too slow in the final benchmark: {'; '.join(result.too_slow)}."]


def _finalists_sentence(search: SearchResult) -> list[str]:
    if not search.tuned:
        return []
    winner = search.best if search.winner is None else search.winner
    each = [
        f"{100 * search.trials[int(number)].candidate.accuracy:.2f} -> {100 * accuracy:.2f} % (trial {number})"
        for number, accuracy in search.tuned.items()
    ]
    return [f"The best trials were fine-tuned briefly; accuracy on val: {', '.join(each)}; trial {winner} won."]


def _chosen_sentence(search: SearchResult) -> list[str]:
    if search.winner is None:
        return []
    return [
        f"Trial {search.best} ships because it was asked for (--ship-trial); the search chose trial {search.winner}."
    ]


def _budget_sentences(search: SearchResult) -> list[str]:
    sentences = []
    for budget in held_budgets(search):
        if share_limit_text(budget.limit) == NO_LIMIT:
            continue
        fill = budget.chosen / budget.limit
        verdict = "this budget was binding" if fill > _BINDING else "this budget left room"
        label, fill_asked = BUDGETS[budget.name].label, search.trials[search.best].knobs.get("fill")
        is_predicted = BUDGETS[budget.name].predictor == "latency_model" and search.latency_fit is not None
        aim = f", its plan aimed at {100 * fill_asked:.1f} %" if is_predicted and fill_asked is not None else ""
        sentences.append(
            f"{label[0].upper()}{label[1:]}: the chosen network uses {100 * fill:.1f} % of the limit in the search "
            f"({_times(budget.limit)} the dense network's){aim}; {verdict}."
        )
    return sentences


def _accuracy_sentence(search: SearchResult, target: Target) -> str:
    drop_pp = 100 * (search.dense.accuracy - search.trials[search.best].candidate.accuracy)
    side = f"{drop_pp:.2f} pp below" if drop_pp > 0 else f"{-drop_pp:.2f} pp above"
    if round(drop_pp, 2) == 0:
        side = "equal to"
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
    text = f"{len(narrowest)} of the {len(stayed)} remaining layers have the narrowest width allowed"
    return [f"{text} (widths are multiples of {channel_multiple})." if channel_multiple > 1 else f"{text}."]


def _blocks_sentence(result: RunResult, search: SearchResult) -> list[str]:
    blocks, least = result.structures.blocks, result.structures.constraints.least_blocks
    if not blocks:
        return []
    if not result.recipe.search.prune_blocks:
        return ["No block could be removed: the recipe keeps them (search.prune_blocks)."]
    num_left = len(blocks) - len(search.trials[search.best].plan.blocks)
    if num_left == 0:
        return ["Every removable block was removed."]
    return [f"No further block could be removed: {num_left} of {len(blocks)} must stay."] if num_left == least else []


def _stages_sentence(stages: tuple[Stage, ...]) -> list[str]:
    shares = [(stage.share_left, stage) for stage in stages if stage.share_left is not None]
    if not shares:
        return []
    (low, shrunk), (high, kept) = min(shares, key=lambda s: s[0]), max(shares, key=lambda s: s[0])
    if low == high:
        return [f"Every stage keeps {_percent(low)} of its units."] if len(shares) > 1 else []
    return [f"{shrunk.name} shrank most: {_stage(shrunk, low)}. {kept.name} shrank least: {_stage(kept, high)}."]


def _stage(stage: Stage, share: float) -> str:
    blocks = f", {stage.num_removed_blocks} of {stage.num_blocks} blocks removed" if stage.num_blocks else ""
    return f"{_percent(share)} of its units left{blocks}"


def _least(name: str, share: float) -> str:
    return _times(share) + _LEAST_REMARKS.get(BUDGETS[name].predictor, "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(share: float) -> str:
    return f"{share:.3g}x"
