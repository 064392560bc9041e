"""Which scorer should one use? All of them, on one trained network, at several uniform widths, no training.

    python benchmarks/scores.py resnet20_cifar10 --out runs/scores-resnet20 [--widths 0.75 0.5 0.4] [--draws 3]

needs the environment variables of the pipeline (CIFAR10_DIR, RESNET20_WEIGHTS). For every draw of the calibration
samples, every scorer and every width: the accuracy on the test split of the network sliced only, and of the repaired
one. A draw takes half of the calibration split at random; scores and repair see the same samples. Prints a Markdown
table of means over the draws with the interval that the draws span; a run that was killed goes on where it stopped.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from judging import test_hits
from torch import nn

from deploypipe.observe.moments import Moments
from deploypipe.observe.stream import observe
from deploypipe.pipeline_module import Pipeline, load_pipeline
from deploypipe.pruning.apply import apply_plan
from deploypipe.pruning.plan import make_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.structures import count_macs, list_structures
from deploypipe.recipe import (
    BatchNormScale,
    ConditionalMi,
    Fpgm,
    LabelMi,
    LayerwiseMi,
    Magnitude,
    Mipp,
    OutputError,
    Random,
    Scorer,
    Taylor,
)
from deploypipe.runs import RunFolder, open_run
from deploypipe.scoring import score
from deploypipe.search.allocate import uniform
from deploypipe.task import Batch, stack_batches, take, take_calib

ENTRANTS: dict[str, Scorer] = {
    "magnitude L2": Magnitude(),
    "magnitude L1": Magnitude(power=1),
    "MIPP": Mipp(),
    "MIPP, kept targets": Mipp(keep=0.5),
    "layer-wise MI, joint": LayerwiseMi(),
    "layer-wise MI, independent": LayerwiseMi(joint=False),
    "output error": OutputError(),
    "output error, Fisher": OutputError(fisher=True),
    "conditional MI": ConditionalMi(),
    "label MI": LabelMi(),
    "Taylor": Taylor(),
    "batch norm scale": BatchNormScale(),
    "FPGM": Fpgm(),
    "random": Random(),
}

BATCH = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One scorer, one draw."""

    seconds: float  # to score, after the pass
    macs_kept: dict[str, float]  # by width
    sliced: dict[str, float]  # accuracy in percent
    repaired: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.75, 0.5, 0.4])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--scorers", nargs="+", choices=ENTRANTS, default=list(ENTRANTS))
    options = parser.parse_args()
    with open_run(options.out) as run:
        comparison = Comparison(run, load_pipeline(options.pipeline), options.widths)
        outcomes = {name: [] for name in options.scorers}
        for draw in range(options.draws):
            for name, outcome in comparison.outcomes(draw, options.scorers).items():
                outcomes[name].append(outcome)
    show(outcomes, options.widths)


class Comparison:
    def __init__(self, run: RunFolder, pipeline: Pipeline, widths: list[float]) -> None:
        self.run, self.widths = run, widths
        self.dense, self.task = pipeline.build_model().eval(), pipeline.task()
        self.splits, self.recipe = pipeline.load_data(), pipeline.recipe()
        self.calib = take_calib(self.splits.calib, 10_000)
        self.inputs = take(self.calib[0][0], 2)
        self.structures = list_structures(self.dense, self.inputs)

    def outcomes(self, draw: int, names: list[str]) -> dict[str, Outcome]:
        batches = self.drawn(draw)

        @cache
        def moments() -> Moments:  # only where a scorer has not been judged in an earlier run
            settings = replace(self.recipe.observe, num_samples=len(batches) * BATCH)
            return observe(self.dense, self.structures, batches, settings, loss=self.task.loss, seed=draw)

        found = {}
        for name in names:
            found[name] = self.run.remember(
                f"{name.replace(' ', '_').replace(',', '')}-{draw}",
                {"scorer": ENTRANTS[name], "draw": draw, "widths": self.widths, "structures": self.structures},
                lambda _, n=name: self.judge(ENTRANTS[n], moments(), batches, draw),
                Outcome,
            )
            print(f"draw {draw}, {name}: repaired {found[name].repaired}", flush=True)
        return found

    def drawn(self, draw: int) -> list[Batch]:
        """Half of the calibration samples."""
        inputs, target = stack_batches([i for i, _ in self.calib]), torch.cat([t for _, t in self.calib])
        picked = torch.randperm(len(target), generator=torch.Generator().manual_seed(draw))[: len(target) // 2]
        parts = picked.split(BATCH)
        return [(inputs[part], target[part]) for part in parts]

    def judge(self, scorer: Scorer, moments: Moments, batches: list[Batch], draw: int) -> Outcome:
        started = time.perf_counter()
        table = score(self.dense, self.structures, moments, scorer, seed=draw)
        seconds = time.perf_counter() - started
        macs, sliced, repaired = {}, {}, {}
        for width in self.widths:
            allocation = uniform(self.structures, width, 1)
            plan = make_plan(self.structures, table, allocation.widths, allocation.blocks)
            pruned = apply_plan(self.dense, plan)
            mended, _ = repair(self.dense, pruned, plan, batches, self.recipe.repair, seed=draw)
            macs[str(width)] = count_macs(pruned, self.inputs)[1] / self.structures.num_macs
            sliced[str(width)], repaired[str(width)] = self.accuracy(pruned), self.accuracy(mended)
        return Outcome(seconds=seconds, macs_kept=macs, sliced=sliced, repaired=repaired)

    def accuracy(self, model: nn.Module) -> float:
        return 100 * float(np.mean(test_hits(model, self.splits, self.task)))


def show(outcomes: dict[str, list[Outcome]], widths: list[float]) -> None:
    first = next(iter(outcomes.values()))[0]
    heads = [f"{100 * w:g} % widths, 1/{1 / first.macs_kept[str(w)]:.2f} MACs" for w in widths]
    print("\nAccuracy repaired (sliced only), %; mean of the draws, and their least and greatest\n")
    print("| scorer | " + " | ".join(heads) + " | s |\n" + "|---" * (len(widths) + 2) + "|")
    last = str(widths[-1])
    for name, seen in sorted(outcomes.items(), key=lambda item: -np.mean([o.repaired[last] for o in item[1]])):
        cells = []
        for width in map(str, widths):
            values = [o.repaired[width] for o in seen]
            spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread} ({np.mean([o.sliced[width] for o in seen]):.1f})")
        print(f"| {name} | " + " | ".join(cells) + f" | {np.mean([o.seconds for o in seen]):.1f} |")


if __name__ == "__main__":
    main()
