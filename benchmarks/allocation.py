"""How long does the solver take, and how does it grow with the network?

    python benchmarks/allocation.py resnet18 resnet50 resnet101 vgg16 [--levels 8]

The networks are ResNets and VGGs of pytorchcv with random weights at 224 pixels. Losses are random numbers. The latency
model is fitted to simulated times of 40 networks (steps of 8 channels and a fixed cost per layer). For 0.7, 0.5 and
0.35 of the latency, the table shows the seconds of one call of `allocate` and how far its cost lies below the bound.
Prints Markdown.
"""

import argparse
import importlib
import time

import numpy as np
import torch

from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import Curves, Cut, LossCurve, ScoreTable, Structures, TimedCut
from deploypipe.search.allocation.latency_samples import sample_networks
from deploypipe.search.allocation.loss_curves import width_levels
from deploypipe.search.allocation.proposer import cut_of
from deploypipe.search.allocation.solver import Bound, allocate, allowed_widths, cost_of
from deploypipe.search.cost_models.additive_costs import latency_costs
from deploypipe.search.cost_models.latency_model import LatencyModel
from deploypipe.search.cost_models.width_dependencies import LayerWidths, find_layer_widths

SHARES = (0.7, 0.5, 0.35)
NUM_TIMED = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--levels", type=int, default=8)
    options = parser.parse_args()
    print("\n| network | layers | groups | blocks | joint costs | s to fit |" + "".join(f" s at {s} |" for s in SHARES))
    print("|---" * (6 + len(SHARES)) + "|")
    for name in options.networks:
        print(row(name, options.levels), flush=True)


def row(name: str, num_levels: int) -> str:
    family = "vgg" if name.startswith("vgg") else "resnet"
    module = importlib.import_module(f"pytorchcv.models.{family}")  # importing the whole package would need torchvision
    network, inputs = getattr(module, name)().eval(), torch.randn(2, 3, 224, 224)
    structures = list_structures(network, inputs)
    layers = find_layer_widths(network, structures, inputs)
    curves = drawn_curves(structures, num_levels)
    levels = allowed_widths(structures, curves)
    scores = ScoreTable(scorer="none", channels={g.name: tuple(range(g.num_units)) for g in structures.groups})
    cuts = [
        cut_of(make_plan(structures, scores, chosen.widths, chosen.blocks, 8))
        for chosen in sample_networks(structures, levels, NUM_TIMED, 0)
    ]
    dense = made_up_time(layers, Cut(removed={}, blocks=()))
    started = time.perf_counter()
    model = LatencyModel(layers, [TimedCut(cut=cut, ratio=made_up_time(layers, cut) / dense) for cut in cuts])
    fitted = time.perf_counter() - started
    costs = latency_costs(model, structures, levels)
    cells = []
    for share in SHARES:
        started = time.perf_counter()
        chosen = allocate(structures, curves, [Bound(costs=costs, share=share)])
        seconds = time.perf_counter() - started
        cells.append(f"{seconds:.1f} ({100 * (share - cost_of(chosen, costs)) / share:.2f} % below)")
    counts = [len(layers), len(structures.groups), len(structures.blocks), len(costs.pairs)]
    return f"| {name} | " + " | ".join(map(str, counts)) + f" | {fitted:.1f} | " + " | ".join(cells) + " |"


def drawn_curves(structures: Structures, num_levels: int) -> Curves:
    generator = np.random.default_rng(0)
    curves = []
    for group in structures.groups:
        kept = (*width_levels(group.num_units, num_levels, 8, min(8, group.num_units)), group.num_units)
        weight = generator.lognormal(-3, 1)
        losses = tuple(float(weight * (1 - width / group.num_units) ** 2) for width in kept)
        curves.append(LossCurve(name=group.name, kind="channels", kept=kept, losses=losses))
    for block in structures.blocks:
        curves.append(LossCurve(name=block.name, kind="block", kept=(0,), losses=(float(generator.lognormal(-2, 1)),)))
    return Curves(curves=tuple(curves), num_samples=1)


def made_up_time(layers: tuple[LayerWidths, ...], cut: Cut) -> float:
    total = 0.0
    for layer in layers:
        if set(layer.blocks).isdisjoint(cut.blocks):
            share = [-(-side.width(cut.removed) // 8) * 8 / side.dense for side in (layer.inputs, layer.outputs)]
            total += 1e6 + layer.macs * share[0] * share[1]
    return total


if __name__ == "__main__":
    main()
