"""Which block scorer is best? Remove blocks of one trained network by each scorer, without training.

    python benchmarks/depth.py resnet56_cifar10 --out runs/depth-resnet56 [--counts 1 3 5 7 9]

Needs the environment variables of the pipeline (CIFAR10_DIR, RESNET56_WEIGHTS). For every scorer and number of blocks,
the table shows the test accuracy of the network without those blocks, before and after repair. Prints Markdown. A
killed run resumes.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from judging import test_hits
from torch import nn

from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import empty_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import BlockMi, BlockScorer, LogitDivergence, Mpruner, Repair
from deploypipe.records import Names
from deploypipe.runs.store import RunFolder, open_run
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.scoring.blocks.block_mi import choose_blocks
from deploypipe.task import take, take_calib
from deploypipe.user_pipeline import UserPipeline, load_pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The blocks to remove, by their number."""

    blocks: dict[str, Names]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracies:
    as_it_is: float  # percent
    repaired: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 3, 5, 7, 9])
    options = parser.parse_args()
    with open_run(options.out) as run:
        Comparison(run, load_pipeline(options.pipeline), options.counts).show()


class Comparison:
    def __init__(self, run: RunFolder, pipeline: UserPipeline, counts: list[int]) -> None:
        self.run, self.counts = run, counts
        self.dense, self.task = pipeline.build_model().eval(), pipeline.task()
        self.splits, self.recipe = pipeline.load_data(), pipeline.recipe()
        self.calib = take_calib(self.splits.calib, self.recipe.repair.num_samples)
        self.structures = list_structures(self.dense, take(self.calib[0][0], 2), self.recipe.keep)

    def show(self) -> None:
        moments = observe_activations(self.dense, self.structures, self.calib, self.recipe.observe)
        choices: dict[str, Callable[[], dict[str, Names]]] = {
            "KL of the answers, repaired": lambda: self.first(LogitDivergence(repair=Repair(num_samples=512)), moments),
            "KL of the answers": lambda: self.first(LogitDivergence(), moments),
            "MPruner (CKA)": lambda: self.first(Mpruner(), moments),
            "MI in to out, runs": lambda: {
                str(count): choose_blocks(self.structures, moments, BlockMi(), count) for count in self.counts
            },
            "MI in to out": lambda: self.first(BlockMi(), moments),
            "random": self.at_random,
        }
        print("\nAccuracy repaired (as it is), %, by blocks removed\n")
        print("| scorer | " + " | ".join(map(str, self.counts)) + " | s |\n" + "|---" * (len(self.counts) + 2) + "|")
        for name, choose in choices.items():
            order = self.run.remember(self.stage(name), self.key(), lambda _, c=choose: self.timed(c), Order).record
            cells = [self.accuracies(f"{self.stage(name)}-{n}", order.blocks[str(n)]) for n in self.counts]
            figures = " | ".join(f"{cell.repaired:.2f} ({cell.as_it_is:.1f})" for cell in cells)
            print(f"| {name} | {figures} | {order.seconds:.1f} |", flush=True)

    def first(self, scorer: BlockScorer, moments: Moments) -> dict[str, Names]:
        importance = rank_blocks(self.dense, self.structures, moments, self.calib, scorer).importance
        ranked = sorted(importance, key=lambda name: importance[name])
        return {str(count): tuple(ranked[:count]) for count in self.counts}

    def at_random(self) -> dict[str, Names]:
        names = [block.name for block in self.structures.blocks]
        random.Random(0).shuffle(names)
        return {str(count): tuple(names[:count]) for count in self.counts}

    def timed(self, choose: Callable[[], dict[str, Names]]) -> Order:
        started = time.perf_counter()
        return Order(blocks=choose(), seconds=time.perf_counter() - started)

    def accuracies(self, stage: str, blocks: Names) -> Accuracies:
        def compute(_: Path) -> Accuracies:
            plan = replace(empty_plan(self.structures), blocks=blocks)
            without = apply_plan(self.dense, plan)
            mended, _report = repair(self.dense, without, plan, self.calib, self.recipe.repair)
            return Accuracies(as_it_is=self.accuracy(without), repaired=self.accuracy(mended))

        return self.run.remember(stage, {**self.key(), "blocks": blocks}, compute, Accuracies).record

    def accuracy(self, model: nn.Module) -> float:
        return 100 * float(np.mean(test_hits(model, self.splits, self.task)))

    def key(self) -> dict[str, object]:
        return {"structures": self.structures, "recipe": self.recipe, "counts": self.counts}

    def stage(self, name: str) -> str:
        return "".join(letter for letter in name.replace(" ", "_") if letter.isalnum() or letter == "_")


if __name__ == "__main__":
    main()
