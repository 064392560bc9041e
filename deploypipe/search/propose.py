"""From the few knobs of a study to a plan that meets every budget that can be predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deploypipe.pruning.apply import apply_plan
from deploypipe.pruning.plan import make_plan
from deploypipe.pruning.structures import count_macs
from deploypipe.records import Candidate, Curves, Cut, LatencyFit, PruningPlan, ScoreTable, Structures, TimedCut, Trial
from deploypipe.search.allocate import (
    Allocation,
    Bound,
    Emphasis,
    allocate_to,
    allowed_widths,
    cheapest,
    uniform,
)
from deploypipe.search.costs import Costs, latency_costs, mac_costs, param_costs
from deploypipe.search.latency_model import LatencyModel
from deploypipe.search.sites import Site

_UNIFORM_STEPS = 64  # shares of every width that are tried


def cut_of(plan: PruningPlan) -> Cut:
    return Cut(removed={c.group: len(c.removed) for c in plan.cuts if c.removed}, blocks=plan.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposer:
    """A `Propose` for `search`."""

    dense: nn.Module
    inputs: Any  # a batch, to count multiply-accumulates with
    structures: Structures
    scores: ScoreTable
    curves: Curves
    channel_multiple: int
    shares: Mapping[str, float]  # of the dense network's figures: the most by budget, those of `BOUNDED` at least one
    reference: Candidate  # the dense network
    sites: Sequence[Site]
    timed: Sequence[TimedCut]  # empty where latency bounds nothing

    def __call__(self, knobs: Mapping[str, float], trials: Sequence[Trial]) -> PruningPlan:
        model = self.latency_model(trials)
        shares = {name: share * knobs["fill"] for name, share in self.shares.items()}
        if knobs["measured"] == 0.0:
            return self.plan(self._uniform_within(list(shares.values()), model))
        emphasis = Emphasis(exponent=knobs["exponent"], block_weight=knobs["block_weight"], late=knobs["late"])
        return self.plan(self.allocate(emphasis, model, shares))

    def allocate(self, emphasis: Emphasis, model: LatencyModel | None, shares: Mapping[str, float]) -> Allocation:
        """The choice of least loss whose figures are within the shares."""
        bounds = [Bound(costs=self.costs(name, model), share=share) for name, share in shares.items()]
        return allocate_to(self.structures, self.curves, bounds, lambda chosen: self.figures(chosen, model), emphasis)

    def cheapest(self, name: str) -> Allocation:
        """The choice that costs least by one of the budgets."""
        return cheapest(self.structures, self.curves, self.costs(name, self.latency_model(())))

    def latency_model(self, trials: Sequence[Trial]) -> LatencyModel | None:
        """Of what was measured before the search and, as they are real, of its trials."""
        if not self.timed:
            return None
        return LatencyModel(self.sites, [*self.timed, *measured_trials(trials, self.reference)])

    def plan(self, allocation: Allocation) -> PruningPlan:
        widths, blocks = allocation.widths, allocation.blocks
        return make_plan(self.structures, self.scores, widths, blocks, self.channel_multiple)

    def costs(self, name: str, model: LatencyModel | None) -> Costs:
        levels = allowed_widths(self.structures, self.curves)
        if name == "latency_p50" and model:
            return latency_costs(model, self.structures, levels)
        return mac_costs(self.structures, levels) if name == "macs" else param_costs(self.structures, levels)

    def figures(self, allocation: Allocation, model: LatencyModel | None) -> list[float]:
        """What the network comes to, by `shares`: its latency predicted, the rest counted."""
        plan = self.plan(allocation)
        num_params, num_macs = count_macs(apply_plan(self.dense, plan), self.inputs)
        params, macs = num_params / self.structures.num_params, num_macs / self.structures.num_macs
        latency = model.predict(cut_of(plan)).value if model else 0.0
        known = {"latency_p50": latency, "macs": macs, "params": params, "file_size": params}
        return [known[name] for name in self.shares]

    def latency_fit(self, trials: Sequence[Trial]) -> LatencyFit | None:
        """How well the model knows each network that was timed, before the search or in it, from all others."""
        model = self.latency_model(trials)
        if not model:
            return None
        measured = tuple(timed.ratio for timed in model.timed)
        return LatencyFit(predicted=tuple(model.held_out().tolist()), measured=measured)

    def _uniform_within(self, shares: Sequence[float], model: LatencyModel | None) -> Allocation:
        """The widest of uniform networks within the bounds; the narrowest where none is."""
        low, high = 0, _UNIFORM_STEPS
        while low < high:  # share low / 64 is within, or unknown for 0
            middle = (low + high + 1) // 2
            figures = self.figures(uniform(self.structures, middle / _UNIFORM_STEPS, self.channel_multiple), model)
            if all(figure <= share for figure, share in zip(figures, shares, strict=True)):
                low = middle
            else:
                high = middle - 1
        return uniform(self.structures, low / _UNIFORM_STEPS, self.channel_multiple)


def measured_trials(trials: Sequence[Trial], reference: Candidate) -> list[TimedCut]:
    """Each network that a search timed, once."""
    found: list[TimedCut] = []
    for trial in trials:
        latency, dense = trial.candidate.latency_p50_ms, reference.latency_p50_ms
        if latency is not None and dense is not None:
            timed = TimedCut(cut=cut_of(trial.plan), ratio=latency / dense)
            found += [] if timed in found else [timed]
    return found
