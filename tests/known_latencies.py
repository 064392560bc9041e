"""Networks of tests/networks.py on a device whose times are known."""

from functools import cache

import numpy as np
import torch
from networks import build
from torch import nn

from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import Cut, PruningPlan, ScoreTable, Structures, TimedCut
from deploypipe.search.allocation.latency_samples import sample_networks
from deploypipe.search.allocation.proposer import cut_of
from deploypipe.search.allocation.solver import Allocation
from deploypipe.search.cost_models.additive_costs import Levels
from deploypipe.search.cost_models.width_dependencies import LayerWidths, find_layer_widths


@cache
def subject(name: str) -> tuple[nn.Module, Structures, tuple[LayerWidths, ...]]:
    torch.manual_seed(0)
    network, inputs = build(name)
    structures = list_structures(network.eval(), inputs)
    return network, structures, find_layer_widths(network, structures, inputs)


def levels_of(structures: Structures) -> Levels:
    return {g.name: sorted({1, max(1, g.num_units // 2), g.num_units}) for g in structures.groups}


def networks(name: str, count: int, seed: int = 0) -> list[tuple[Allocation, PruningPlan]]:
    _, structures, _ = subject(name)
    scores = ScoreTable(scorer="none", channels={g.name: tuple(range(g.num_units)) for g in structures.groups})
    chosen = sample_networks(structures, levels_of(structures), count, seed)
    return [(a, make_plan(structures, scores, a.widths, a.blocks, 1)) for a in chosen]


def true_time(layers: tuple[LayerWidths, ...], cut: Cut) -> float:
    """Steps of eight channels, a fixed part a layer, and what the network takes beside its layers."""
    total = 50.0
    for layer in layers:
        if set(layer.blocks).isdisjoint(cut.blocks):
            wide_in, wide_out = (-(-side.width(cut.removed) // 8) * 8 for side in (layer.inputs, layer.outputs))
            total += 20 + (0.1 + 0.02 * len(layer.kind)) * wide_in * wide_out
    return total


def timed_of(name: str, count: int, noise: float, seed: int = 0) -> list[TimedCut]:
    _, _, layers = subject(name)
    generator, dense = np.random.default_rng(seed), true_time(layers, Cut(removed={}, blocks=()))
    cuts = [cut_of(plan) for _, plan in networks(name, count, seed)]
    return [TimedCut(cut=c, ratio=true_time(layers, c) / dense * float(generator.normal(1, noise))) for c in cuts]
