"""Networks fill their budgets by measured latencies, not predicted ones; unreachable budgets are refused first."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from known_latencies import levels_of, subject, timed_of, true_time
from networks import build

from deploypipe.budgets import BUDGETS
from deploypipe.errors import BudgetError
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.records import Candidate, Curves, Cut, LossCurve, PruningPlan, ScoreTable, Trial
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search.allocation.feasibility import feasibility_text, find_feasibility
from deploypipe.search.allocation.proposer import Proposer, cut_of
from deploypipe.search.allocation.solver import Emphasis

PLAIN = {
    "fill": 1.0,
    "exponent": 1.0,
    "block_weight": 1.0,
    "late": 0.0,
    "by_importance": 0.0,
    "magnitude": 0.0,
    "control": 0.0,
}
DENSE = Candidate(
    accuracy=0.9, latency_p50_ms=2.0, peak_memory_mib=None, file_size_mib=1.0, num_params=1000, num_macs=1000
)


class Device:
    """Takes `slower` times what the model was told, but for the dense network; counts what it is asked."""

    def __init__(self, name: str, slower: float) -> None:
        self.layers, self.slower, self.asked = subject(name)[2], slower, 0

    def __call__(self, plan: PruningPlan) -> float:
        self.asked += 1
        dense = true_time(self.layers, Cut(removed={}, blocks=()))
        return self.slower * true_time(self.layers, cut_of(plan)) / dense


def proposer(name: str, shares: Mapping[str, float], measure: Any = None) -> Proposer:
    network, structures, layers = subject(name)
    levels = levels_of(structures)
    curves = [
        LossCurve(
            name=g.name,
            kind="channels",
            kept=tuple(levels[g.name]),
            losses=tuple(0.1 * (1 - kept / g.num_units) ** 2 for kept in levels[g.name]),
        )
        for g in structures.groups
    ]
    curves += [LossCurve(name=b.name, kind="block", kept=(0,), losses=(0.2,)) for b in structures.blocks]
    return Proposer(
        dense=network,
        inputs=build(name)[1],
        structures=structures,
        scores=ScoreTable(scorer="none", channels={g.name: tuple(range(g.num_units)) for g in structures.groups}),
        magnitudes=score_magnitudes(network, structures),
        curves=Curves(curves=tuple(curves), num_samples=1),
        channel_multiple=1,
        shares=shares,
        reference=DENSE,
        layers=layers,
        timed=timed_of(name, 40, 0.01) if "latency_p50" in shares else (),
        measure=measure or Device(name, 1.0),
    )


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck"])
@pytest.mark.parametrize("slower", [0.9, 1.0, 1.1])
def test_a_network_fills_its_measured_latency_limit(name: str, slower: float) -> None:
    device = Device(name, slower)
    propose = proposer(name, {"latency_p50": 0.8}, device)
    plan = propose(PLAIN, ())
    assert device.asked <= 5
    assert device(plan) <= 0.8
    if slower > 1 and name == "bottleneck":  # what trusting the model comes to; the other has few widths
        once = propose.plan(propose.allocate(Emphasis(), propose.latency_model(()), propose.shares))
        assert device(once) > 0.8


def test_several_budgets_hold_at_once() -> None:
    propose = proposer("bottleneck", {"latency_p50": 0.8, "params": 0.5, "macs": 0.9})
    for knobs in (
        PLAIN,
        {**PLAIN, "exponent": 0.5},
        {**PLAIN, "control": 1.0},
        {**PLAIN, "control": 2.0},
        {**PLAIN, "magnitude": 0.5},
    ):
        plan = propose(knobs, ())
        num_params, num_macs = count_macs(apply_plan(propose.dense, plan), propose.inputs)
        assert propose.measure(plan) <= 0.82  # uniform widths are those of the model, which is not corrected
        assert num_params <= 0.5 * propose.structures.num_params and num_macs <= 0.9 * propose.structures.num_macs


def test_a_budget_is_predicted_as_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "weights", replace(BUDGETS["params"], name="weights"))
    new, known = proposer("bottleneck", {"weights": 0.5}), proposer("bottleneck", {"params": 0.5})
    assert new(PLAIN, ()) == known(PLAIN, ()) != proposer("bottleneck", {"macs": 0.5})(PLAIN, ())
    assert find_feasibility(new, new.shares).least["weights"] == find_feasibility(known, known.shares).least["params"]


def test_budgets_out_of_reach_are_refused_by_name() -> None:
    reach = find_feasibility(proposer("bottleneck", {"macs": 0.9}), {"macs": 0.9})
    assert 0 < reach.least["macs"] < 0.9 and reach.log10_choices > 1
    tiny = replace(reach, least={"macs": 0.0012})
    text = feasibility_text(tiny, {"macs": 0.9})
    assert text.startswith("in reach, with a margin for noise: macs 0.9x (lowest 0.0012x);")
    with pytest.raises(BudgetError, match=r"budget\.macs: 0\.0001 times .* out of reach: .* relax the budget"):
        find_feasibility(proposer("bottleneck", {"macs": 1e-4}), {"macs": 1e-4})
    least = find_feasibility(proposer("bottleneck", {"latency_p50": 0.9}), {"latency_p50": 0.9}).least["latency_p50"]
    asked = {"latency_p50": 0.8 * least}
    with pytest.raises(BudgetError, match=r"budget\.latency_p50"):
        find_feasibility(proposer("bottleneck", asked), asked)


@pytest.mark.parametrize(("name", "count", "noise", "seed"), [("encoder", 8, 0.3, 3), ("pad_resnet", 8, 0.3, 3)])
def test_the_lowest_reachable_latency_was_measured(name: str, count: int, noise: float, seed: int) -> None:
    """However few and noisy the times are; the smallest network of all is among those that are timed."""
    timed = timed_of(name, count, noise, seed)
    propose = replace(proposer(name, {"latency_p50": 0.9}), timed=timed)
    reach = find_feasibility(propose, propose.shares)
    assert reach.least["latency_p50"] == min(t.ratio for t in timed)
    assert f"(lowest {reach.least['latency_p50']:.2g}x)" in feasibility_text(reach, propose.shares)
    assert propose.figures(propose.cheapest("latency_p50"), propose.latency_model(())) >= [reach.least["latency_p50"]]
    sizes = [true_time(propose.layers, t.cut) for t in timed]
    assert sizes[0] == min(sizes)
    beyond = {"latency_p50": 0.9 * reach.least["latency_p50"]}
    with pytest.raises(BudgetError, match=r"out of reach: the smallest network .* reaches 0\.\d+ times"):
        find_feasibility(replace(propose, shares=beyond), beyond)


def test_the_latency_model_learns_from_timed_trials() -> None:
    propose = proposer("pad_resnet", {"latency_p50": 0.8})
    plan = propose(PLAIN, ())
    assert propose.latency_model(()).predict(cut_of(plan)).value != pytest.approx(0.4, rel=0.2)
    told = [_trial(plan, latency_ms=0.8)]
    assert len(propose.latency_model(told).timed) == len(propose.timed) + 1
    assert len(propose.latency_model([*told, replace(told[0], number=1)]).timed) == len(propose.timed) + 1


def _trial(plan: PruningPlan, latency_ms: float) -> Trial:
    candidate = replace(DENSE, latency_p50_ms=latency_ms)
    return Trial(number=0, knobs=PLAIN, candidate=candidate, violations={}, feasible=True, plan=plan)
