"""The latency model: widths as surgery leaves them, predictions of untimed networks, and the solver's costs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from known_latencies import levels_of, networks, subject, timed_of
from torch import nn

from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.records import Cut
from deploypipe.search.allocation.proposer import cut_of
from deploypipe.search.allocation.solver import cost_of
from deploypipe.search.cost_models.additive_costs import latency_costs
from deploypipe.search.cost_models.latency_model import LatencyModel
from deploypipe.search.cost_models.width_dependencies import LayerWidths

NETWORKS = ("pad_resnet", "bottleneck", "separable", "dense", "flattened", "encoder", "upsampled")


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_widths_are_those_that_surgery_leaves(name: str) -> None:
    network, _, layers = subject(name)
    assert layers
    for _, plan in networks(name, 8):
        pruned, cut = dict(apply_plan(network, plan).named_modules()), cut_of(plan)
        for layer in layers:
            if not set(layer.blocks).isdisjoint(cut.blocks):
                continue
            left = _widths(pruned[layer.module])
            assert (layer.inputs.width(cut.removed), layer.outputs.width(cut.removed)) == left, layer.module


def _widths(module: Any) -> tuple[int, int]:
    """(inputs, outputs)"""
    weight = module.in_proj_weight if hasattr(module, "in_proj_weight") else module.weight
    if getattr(module, "transposed", False) or isinstance(module, nn.Embedding):
        return weight.shape[0], weight.shape[1] * getattr(module, "groups", 1)
    return weight.shape[1] * getattr(module, "groups", 1), weight.shape[0]


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck", "encoder"])
def test_networks_that_were_not_timed_are_predicted(name: str) -> None:
    layers, noise = subject(name)[2], 0.01
    model = LatencyModel(layers, timed_of(name, 40, noise))
    others = timed_of(name, 60, noise, seed=1)
    predicted = [model.predict(t.cut) for t in others]
    errors = np.array([p.value / t.ratio - 1 for p, t in zip(predicted, others, strict=True)])
    assert np.abs(errors).mean() < 3 * noise
    assert np.mean([p.low <= t.ratio <= p.high for p, t in zip(predicted, others, strict=True)]) > 0.85
    again = LatencyModel(layers, timed_of(name, 40, noise))
    assert [again.predict(t.cut) for t in others] == predicted
    held_out = model.held_out() / [t.ratio for t in model.timed] - 1
    assert np.abs(held_out).mean() < 5 * noise  # the first two networks lie at the ends


def test_held_out_predictions_are_those_without_the_network() -> None:
    """With the same prior; here it is fitted anew, on so many networks that one does not move it."""
    timed, layers = timed_of("pad_resnet", 60, 0.01), subject("pad_resnet")[2]
    model = LatencyModel(layers, timed)
    for left_out in (5, 17):
        without = LatencyModel(layers, [*timed[:left_out], *timed[left_out + 1 :]])
        expected = without.predict(timed[left_out].cut).value
        assert model.held_out()[left_out] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("name", "count", "noise", "seed"), [("encoder", 8, 0.3, 3), ("bottleneck", 12, 0.6, 0)])
def test_predictions_stay_within_the_bounds_of_timed_networks(name: str, count: int, noise: float, seed: int) -> None:
    """Also where few and noisy times make the sum over the layers negative, as they do here."""
    _, _, layers = subject(name)
    timed = timed_of(name, count, noise, seed)
    model = LatencyModel(layers, timed)
    cuts = [cut_of(plan) for _, plan in networks(name, 40, seed + 9)]
    assert min(model.fixed + sum(model.time_of(*layer) for layer in remaining_layers(layers, cut)) for cut in cuts) < 0
    for cut in cuts:
        found = model.predict(cut)
        assert found.value >= model.least == min(t.ratio for t in timed) > 0
        assert 0 < found.low <= found.value <= found.high
    assert model.held_out().min() > 0


@pytest.mark.parametrize(("name", "noise"), [("encoder", 0.1), ("pad_resnet", 0.2)])
def test_predictions_keep_the_order_of_nested_networks(name: str, noise: float) -> None:
    layers = subject(name)[2]
    timed = timed_of(name, 8, noise, 2)
    model = LatencyModel(layers, timed)

    def is_within(inner: Cut, outer: Cut) -> bool:
        wide = {layer.module: widths for layer, widths in remaining_layers(layers, outer)}
        return all(
            layer.module in wide and all(a <= b for a, b in zip(widths, wide[layer.module], strict=True))
            for layer, widths in remaining_layers(layers, inner)
        )

    for _, plan in networks(name, 40, 11):
        value = model.predict(cut_of(plan)).value
        for known in timed:
            if is_within(cut_of(plan), known.cut):
                assert value <= 1.1 * known.ratio + 1e-9
            if is_within(known.cut, cut_of(plan)):
                assert value >= 0.9 * known.ratio - 1e-9


def remaining_layers(layers: tuple[LayerWidths, ...], cut: Cut) -> list[tuple[LayerWidths, tuple[int, int]]]:
    """Those that stay, with their widths."""
    stay = [layer for layer in layers if set(layer.blocks).isdisjoint(cut.blocks)]
    return [(layer, (layer.inputs.width(cut.removed), layer.outputs.width(cut.removed))) for layer in stay]


def test_the_dense_network_has_the_time_of_the_precision_that_ships() -> None:
    """In 8 bits it takes 0.4 of its time in fp32, and so do all others: no network is slower than that."""
    layers = subject("bottleneck")[2]
    timed = [replace(t, ratio=0.4 * t.ratio) for t in timed_of("bottleneck", 40, 0.01)]
    model, whole = LatencyModel(layers, timed, 0.4), Cut(removed={}, blocks=())
    assert model.predict(whole).value == pytest.approx(0.4, rel=0.05)
    assert np.abs(model.held_out() / [t.ratio for t in timed] - 1).mean() < 0.05


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck", "encoder", "separable"])
def test_the_solvers_sum_is_the_prediction(name: str) -> None:
    """Where no layer depends on more than two groups; with blocks gone and stream widths changed at once."""
    _, structures, layers = subject(name)
    model = LatencyModel(layers, timed_of(name, 40, 0.01))
    costs = latency_costs(model, structures, levels_of(structures))
    for chosen, plan in networks(name, 20, seed=2):
        assert cost_of(chosen, costs) == pytest.approx(model.predict(cut_of(plan)).value, abs=1e-6)
    if name in ("bottleneck", "encoder"):
        assert costs.pairs
