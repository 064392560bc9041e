"""Turn the few knobs of a study into a plan that meets every budget that can be predicted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deploypipe.budgets import BUDGETS, LATENCY_P50, Predictor
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.records import Candidate, Curves, Cut, LatencyFit, PruningPlan, ScoreTable, Structures, TimedCut, Trial
from deploypipe.scoring.mixed_scores import mixed
from deploypipe.search.allocation.solver import (
    Allocation,
    Bound,
    Emphasis,
    allocate_to,
    allowed_widths,
    cheapest,
    greedy,
    uniform,
    widest_within,
)
from deploypipe.search.cost_models.additive_costs import Costs, latency_costs, mac_costs, param_costs
from deploypipe.search.cost_models.latency_model import LatencyModel
from deploypipe.search.cost_models.width_dependencies import LayerWidths

NUM_TIMED = 5  # networks timed for one trial, at most
UNIFORM, GREEDY = 1.0, 2.0  # values of the knob "control"
_FILLED = 0.97  # of the latency limit: closer to it, times cannot be distinguished


def cut_of(plan: PruningPlan) -> Cut:
    return Cut(removed={c.group: len(c.removed) for c in plan.cuts if c.removed}, blocks=plan.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposer:
    """The `Propose` that a search is given: knobs and earlier trials -> a plan."""

    dense: nn.Module
    inputs: Any  # a batch, to count multiply-accumulates with
    structures: Structures
    scores: ScoreTable
    magnitudes: ScoreTable
    curves: Curves
    channel_multiple: int
    shares: Mapping[str, float]  # by budget: the limit, as a share of the dense network's figure
    reference: Candidate  # the dense network
    layers: Sequence[LayerWidths]
    timed: Sequence[TimedCut]  # empty if no latency is bounded
    dense_ratio: float = 1.0  # latency of the dense network, in the precision that ships, to that of its fp32 file
    measure: Callable[[PruningPlan], float]  # its latency, as a share of the dense network's

    def __call__(self, knobs: Mapping[str, float], trials: Sequence[Trial]) -> PruningPlan:
        model = self.latency_model(trials)
        shares = {name: share * knobs["fill"] for name, share in self.shares.items()}
        if knobs["control"]:
            allocations = {UNIFORM: self._uniform, GREEDY: self._greedy}
            return self.plan(self._widest_within(allocations[knobs["control"]], list(shares.values()), model))
        emphasis = Emphasis(
            exponent=knobs["exponent"],
            block_weight=knobs["block_weight"],
            by_importance=bool(knobs["by_importance"] and self.curves.block_importance),
            late=knobs["late"],
        )
        if model is None or LATENCY_P50 not in shares:
            return self.plan(self.allocate(emphasis, model, shares), knobs["magnitude"])
        return self._timed_within(emphasis, model, shares, knobs["magnitude"])

    def _timed_within(
        self, emphasis: Emphasis, model: LatencyModel, shares: Mapping[str, float], magnitude: float
    ) -> PruningPlan:
        """Time what the solver finds, add it to the model, and solve again, until the network fills its latency limit.

        The solver tends to pick networks whose latency the model underestimates, so predictions alone do not suffice.
        Returns the slowest network within the limit, or the fastest if none is.
        """
        limit = asked = shares[LATENCY_P50]
        found: list[tuple[float, PruningPlan]] = []
        for _ in range(NUM_TIMED):
            plan = self.plan(self.allocate(emphasis, model, {**shares, LATENCY_P50: asked}), magnitude)
            ratio = self.measure(plan)
            is_known = any(plan == other for _, other in found)
            found.append((ratio, plan))
            if _FILLED * limit <= ratio <= limit:
                break
            model = LatencyModel(self.layers, [*model.timed, TimedCut(cut=cut_of(plan), ratio=ratio)], self.dense_ratio)
            # The model explains a part of the difference as noise. The limit has to make up for the rest.
            asked = asked * limit / ratio if is_known else limit * model.predict(cut_of(plan)).value / ratio
        within = [pair for pair in found if pair[0] <= limit]
        return max(within, key=lambda pair: pair[0])[1] if within else min(found, key=lambda pair: pair[0])[1]

    def allocate(self, emphasis: Emphasis, model: LatencyModel | None, shares: Mapping[str, float]) -> Allocation:
        """The choice of smallest loss whose figures are within the shares."""
        bounds = [Bound(costs=self.costs(name, model), share=share) for name, share in shares.items()]
        return allocate_to(self.structures, self.curves, bounds, lambda chosen: self.figures(chosen, model), emphasis)

    def plain(self) -> PruningPlan:
        """The choice of smallest measured loss, within the shares as predicted before the search."""
        return self.plan(self.allocate(Emphasis(), self.latency_model(()), self.shares))

    def cheapest(self, name: str) -> Allocation:
        """The choice that costs least by the budget `name`."""
        return cheapest(self.structures, self.curves, self.costs(name, self.latency_model(())))

    def latency_model(self, trials: Sequence[Trial]) -> LatencyModel | None:
        """Fit a model to the networks timed before the search and to its trials; None if nothing was timed."""
        if not self.timed:
            return None
        return LatencyModel(self.layers, [*self.timed, *measured_trials(trials, self.reference)], self.dense_ratio)

    def plan(self, allocation: Allocation, magnitude: float = 0.0) -> PruningPlan:
        """Make the plan. magnitude: its weight next to the recipe's scorer, in which units each group loses first."""
        widths, blocks = allocation.widths, allocation.blocks
        scores = mixed(self.scores, self.magnitudes, magnitude)
        return make_plan(self.structures, scores, widths, blocks, self.channel_multiple)

    def costs(self, name: str, model: LatencyModel | None) -> Costs:
        levels, predictor = allowed_widths(self.structures, self.curves), BUDGETS[name].predictor
        if predictor == "latency_model" and model:
            return latency_costs(model, self.structures, levels)
        return mac_costs(self.structures, levels) if predictor == "mac_count" else param_costs(self.structures, levels)

    def figures(self, allocation: Allocation, model: LatencyModel | None) -> list[float]:
        """The network's figures in the order of `shares`: latency is predicted, the others are counted."""
        plan = self.plan(allocation)
        num_params, num_macs = count_macs(apply_plan(self.dense, plan), self.inputs)
        params, macs = num_params / self.structures.num_params, num_macs / self.structures.num_macs
        latency = model.predict(cut_of(plan)).value if model else 0.0
        known: dict[Predictor | None, float] = {
            "latency_model": latency,
            "mac_count": macs,
            "param_count": params,
            "params_in_file": params,
        }
        return [known[BUDGETS[name].predictor] for name in self.shares]

    def latency_fit(self, trials: Sequence[Trial]) -> LatencyFit | None:
        """How well the model predicts each network that was timed, before the search or in it, from all others."""
        model = self.latency_model(trials)
        if not model:
            return None
        measured = tuple(timed.ratio for timed in model.timed)
        return LatencyFit(predicted=tuple(model.held_out().tolist()), measured=measured)

    def _widest_within(
        self, choose: Callable[[float], Allocation], shares: Sequence[float], model: LatencyModel | None
    ) -> Allocation:
        def is_within(allocation: Allocation) -> bool:
            figures = self.figures(allocation, model)
            return all(figure <= share for figure, share in zip(figures, shares, strict=True))

        return widest_within(choose, is_within)

    def _uniform(self, share: float) -> Allocation:
        return uniform(self.structures, share, self.channel_multiple)

    def _greedy(self, share: float) -> Allocation:
        return greedy(self.structures, self.magnitudes, share, self.channel_multiple)


def measured_trials(trials: Sequence[Trial], reference: Candidate) -> list[TimedCut]:
    """Each network that the search's trials timed, once."""
    found: list[TimedCut] = []
    for trial in trials:
        latency, dense = trial.candidate.latency_p50_ms, reference.latency_p50_ms
        if latency is not None and dense is not None:
            timed = TimedCut(cut=cut_of(trial.plan), ratio=latency / dense)
            found += [] if timed in found else [timed]
    return found
