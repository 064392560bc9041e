"""Show accuracy against latency, or against another figure, over all trials of a search."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from deploypipe.budgets import BUDGETS, LATENCY_P50, MACS, BudgetRow
from deploypipe.records import Candidate, PruningPlan, SearchResult, Trial
from deploypipe.runs.result import RunResult
from deploypipe.target import Target
from deploypipe.text.amounts import amount

_MAX_ROWS = 12
_MAX_NAMES = 4  # of groups, and of blocks, that a trial is described by


@dataclass(frozen=True, kw_only=True, slots=True)
class TradeOff:
    """The trials of a search as accuracy against one figure."""

    search: SearchResult
    cost: BudgetRow  # the figure
    metric: str
    frontier: tuple[Trial | None, ...]  # by cost, ascending; None is the dense network

    def cost_of(self, candidate: Candidate) -> float:
        value = self.cost.of_candidate(candidate)
        if value is None:
            raise ValueError(f"{self.cost.name} of a candidate is unknown")
        return value

    def candidate_of(self, trial: Trial | None) -> Candidate:
        return self.search.dense if trial is None else trial.candidate

    @property
    def chosen(self) -> Trial:
        return self.search.trials[self.search.best]

    @property
    def cost_label(self) -> str:
        return f"{self.cost.label}, {self.cost.unit}" if self.cost.unit else self.cost.label

    @property
    def accuracy_label(self) -> str:
        return f"{self.metric} on val, %"


def trade_off(search: SearchResult, target: Target, metric: str) -> TradeOff:
    """Accuracy against the first budget that every trial has a figure of: the latency, if the target limits it."""
    cost = _cost(search, target)

    def place(trial: Trial | None) -> tuple[float, float]:
        candidate = search.dense if trial is None else trial.candidate
        return cost.of_candidate(candidate) or 0.0, -candidate.accuracy

    frontier: list[Trial | None] = []
    whole = [trial for trial in search.trials if not trial.is_stopped]
    for trial in sorted([None, *whole], key=place):
        if not frontier or place(trial)[1] < place(frontier[-1])[1]:
            frontier.append(trial)
    return TradeOff(search=search, cost=cost, metric=metric, frontier=tuple(frontier))


def trade_off_header(trade: TradeOff) -> tuple[str, ...]:
    return (trade.cost.label, f"{trade.metric} on val", "against dense", "trial", "what was removed")


def trade_off_rows(trade: TradeOff) -> list[tuple[str, ...]]:
    """The frontier, the chosen trial and the dense network, cheapest first; a long frontier is thinned out evenly."""
    steps = len(trade.frontier) - 1
    picked = {round(i * steps / (_MAX_ROWS - 1)) for i in range(_MAX_ROWS)}
    shown = [trial for i, trial in enumerate(trade.frontier) if i in picked]
    shown += [trial for trial in (trade.chosen, None) if trial not in shown]
    shown.sort(key=lambda trial: trade.cost_of(trade.candidate_of(trial)))
    return [_row(trade, trial) for trial in shown]


def removed_text(plan: PruningPlan) -> str:
    """The number of units and the blocks that a plan removes, and the groups that lose most."""
    cuts = sorted((cut for cut in plan.cuts if cut.removed), key=lambda c: -len(c.removed) / c.num_units)
    parts = []
    if cuts:
        gone, total = sum(len(cut.removed) for cut in cuts), sum(cut.num_units for cut in cuts)
        each = [f"{cut.group} {cut.num_units} to {cut.num_units - len(cut.removed)}" for cut in cuts]
        parts.append(f"{gone:,} of {total:,} units in {_groups(len(cuts))} ({_some(each)})")
    if plan.blocks:
        parts.append(f"{'block' if len(plan.blocks) == 1 else 'blocks'} {_some(plan.blocks)}")
    return "; ".join(parts) or "nothing"


def summary(trade: TradeOff) -> str:
    """The plot in words."""
    chosen, dense = trade.chosen, trade.search.dense
    points = amount(100 * (chosen.candidate.accuracy - dense.accuracy), "pp", signed=True)
    costs = [amount(trade.cost_of(candidate), trade.cost.unit) for candidate in (dense, chosen.candidate)]
    num = len(trade.frontier)
    return (
        f"{trade.metric} on val against {trade.cost.label}: {len(trade.search.trials)} trials and the dense network "
        f"({costs[0]}, {amount(100 * dense.accuracy, '%')}). Chosen: trial {chosen.number} ({costs[1]}, {points} "
        f"before fine-tuning). {num} {'network is' if num == 1 else 'networks are'} on the frontier: no other has as "
        f"much accuracy at as little cost."
    )


def ship_another(result: RunResult) -> str:
    """The command that ships another trial."""
    command = result.command or "deploypipe run PIPELINE TARGET"
    return f"{re.sub(r' --ship-trial=[0-9]+', '', command)} --ship-trial N"


def _cost(search: SearchResult, target: Target) -> BudgetRow:
    candidates = [search.dense, *(trial.candidate for trial in search.trials)]
    for name in (*target.budget.limits(), LATENCY_P50):
        if all(BUDGETS[name].of_candidate(candidate) is not None for candidate in candidates):
            return BUDGETS[name]
    return BUDGETS[MACS]


def _row(trade: TradeOff, trial: Trial | None) -> tuple[str, ...]:
    candidate, dense = trade.candidate_of(trial), trade.search.dense
    change = amount(100 * (candidate.accuracy - dense.accuracy), "pp", signed=True)
    if trial is None:
        about = ("dense", "nothing")
    else:
        mark = ", chosen" if trial is trade.chosen else "" if trial.feasible else ", over budget"
        about = (f"{trial.number}{mark}", removed_text(trial.plan))
    return (
        amount(trade.cost_of(candidate), trade.cost.unit),
        amount(100 * candidate.accuracy, "%"),
        "" if trial is None else change,
        *about,
    )


def _groups(num: int) -> str:
    return f"{num} {'group' if num == 1 else 'groups'}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join([*names[:_MAX_NAMES], *([f"{rest} more"] if rest > 0 else [])])
