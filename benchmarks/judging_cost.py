"""How long does it take to evaluate a candidate on val: in eager torch as the batches came, in pieces, and by its file?

    OMP_NUM_THREADS=1 python benchmarks/judging_cost.py resnet20_cifar10 resnet56_cifar10 vit_cifar10 efficientnet_lite0
        [--samples 1000] [--rounds 3] [--kept 0.6]

Needs the environment variables of the pipelines (CIFAR10_DIR, RESNET56_WEIGHTS, ...). `efficientnet_lite0` is a network
for images of 224 pixels with random weights, on random images in batches of 64. Each network is cut to `--kept` of its
widths and repaired. The three ways take turns; each time is the median over the rounds, and holds the metric too.

"A trial" evaluates `--samples` of val in growing parts, as a search does: before with eager torch in the batches of the
parts, now by the file, with the time to open it and to compare it. The second table shows the seconds of a trial's
steps. Prints Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.accuracy import evaluate
from deploypipe.benchmark.forward_passes import ForwardPasses, Passes, network_passes
from deploypipe.compute_device import CPU
from deploypipe.data import TensorBatches
from deploypipe.export.graph_slicing.sliced_files import slice_or_raise
from deploypipe.export.graph_slicing.template import open_template
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.memory_order import find_order
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Recipe, Repair
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search.allocation.solver import uniform
from deploypipe.search.evaluation.candidate_passes import candidate_passes
from deploypipe.search.evaluation.early_stopping import draw_parts
from deploypipe.task import Batch, Splits, Task, classification, forward, take, take_calib
from deploypipe.user_pipeline import load_pipeline

NUM_PARITY = 2  # samples to check a file on, as in a search


class Inverted(nn.Module):
    """An inverted residual block without squeeze-and-excitation."""

    def __init__(self, width: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = width * expansion
        first = [nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()] if expansion > 1 else []
        self.body = nn.Sequential(
            *first,
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.has_shortcut = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.has_shortcut else y


STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5))


def build_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with random weights: 4.7 M parameters, 390 M multiply-accumulates at 224 pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    width = 32
    for expansion, out, count, stride, kernel in (*STAGES, (6, 320, 1, 1, 3)):
        for i in range(count):
            layers.append(Inverted(width, out, expansion, kernel, stride if i == 0 else 1))
            width = out
    layers += [nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, 1000)).eval()


def random_images(count: int) -> Splits:
    images = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    batches = TensorBatches(images, torch.arange(count) % 1000, 64)
    return Splits(calib=batches, train=batches, val=batches, test=batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--samples", type=int, default=1000, help="of val (a tenth of it for efficientnet_lite0)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kept", type=float, default=0.6, help="share of each group's units")
    options = parser.parse_args()
    rows, steps = [], []
    for name in options.networks:
        with TemporaryDirectory() as folder:
            row, own = measure(prepare(name, options.samples, options.kept, Path(folder)), options.rounds)
        rows.append(row)
        steps.append(own)
    print(f"\n{torch.get_num_threads()} threads\n")
    columns = (
        "eager, ms a sample | eager in pieces | file | a trial before, s | now | times | samples of another result"
    )
    print(f"| network | {columns} | outputs differ by |")
    print("|---" * 9 + "|")
    print("\n".join(rows))
    print("\n| network | surgery, s | repair | slice and check | open and compare | evaluate |")
    print("|---" * 6 + "|")
    print("\n".join(steps))


@dataclass(kw_only=True)
class Case:
    """A repaired network with its file, and val as it comes and in the parts of a search."""

    name: str
    repaired: nn.Module
    file: Path
    val: list[Batch]
    parts: Sequence[Sequence[Batch]]
    task: Task
    recipe: Recipe
    steps: dict[str, float]  # seconds
    reasons: list[str] = field(default_factory=list)  # why the file did not run

    def by_file(self, stack: ExitStack) -> Passes:
        example = self.parts[0][0][0]
        settings = self.recipe.export
        return stack.enter_context(
            candidate_passes(self.repaired, self.file, example, settings, CPU, self.reasons.append)
        )

    def in_eager(self, stack: ExitStack) -> Passes:
        stack.enter_context(network_passes(self.repaired))
        return ForwardPasses(call=lambda inputs: forward(self.repaired, inputs), samples_in_piece=None)

    def in_pieces(self, stack: ExitStack) -> Passes:
        return stack.enter_context(network_passes(self.repaired))


def prepare(name: str, count: int, kept: float, folder: Path) -> Case:
    """Cut and repair the network, and slice its file, as a trial does."""
    dense, splits, task, recipe = subject(name, count)
    calib, val = take_calib(splits.calib, recipe.search.num_repair_samples), take_calib(splits.val, count)
    few = take_calib(calib, NUM_PARITY)
    structures = list_structures(dense, take(few[0][0], 2), recipe.keep)
    allocation = uniform(structures, kept, 8)
    plan = make_plan(structures, score_magnitudes(dense, structures), allocation.widths, allocation.blocks)
    export_onnx(dense, few, folder / "dense.onnx", recipe.export, template=folder / "template.onnx")
    inputs = [value.name for value in onnx.load(folder / "dense.onnx", load_external_data=False).graph.input]
    template = open_template(folder / "template.onnx", dense, first_batch(few, inputs, NUM_PARITY))
    file, began = folder / "candidate.onnx", time.perf_counter()
    pruned = apply_plan(dense, plan)
    cut = time.perf_counter()
    repaired = repair(dense, pruned, plan, calib, recipe.repair, seed=0)[0]
    solved = time.perf_counter()
    slice_or_raise(template, dense, repaired, plan, few, file, recipe.export)
    arrange = find_order(dense, few[0][0])
    return Case(
        name=name,
        repaired=repaired,
        file=file,
        val=[(arrange(given), target) for given, target in val],
        parts=draw_parts(val, 0, arrange),
        task=task,
        recipe=recipe,
        steps={"surgery": cut - began, "repair": solved - cut, "slice": time.perf_counter() - solved},
    )


def measure(case: Case, rounds: int) -> tuple[str, str]:
    """The rows of both tables."""
    ways = {"eager": case.in_eager, "pieces": case.in_pieces, "file": case.by_file}
    times: dict[str, list[float]] = {way: [] for way in (*ways, "before", "now", "opened")}
    results = {}
    for _ in range(rounds):
        for way, opened in ways.items():
            with ExitStack() as stack:
                passes = opened(stack)
                began = time.perf_counter()
                evaluate(passes, case.val, case.task, case.name)
                times[way].append(time.perf_counter() - began)
        for way, opened in (("before", case.in_eager), ("now", case.by_file)):
            with ExitStack() as stack:
                began = time.perf_counter()
                passes = opened(stack)
                ready = time.perf_counter()
                results[way] = np.concatenate([evaluate(passes, part, case.task, case.name) for part in case.parts])
                times[way].append(time.perf_counter() - began)
        times["opened"].append(ready - began)
    assert not case.reasons, case.reasons
    took, count = {way: statistics.median(seconds) for way, seconds in times.items()}, len(results["now"])
    per_sample = " | ".join(f"{1000 * took[way] / count:.2f}" for way in ways)
    gain = f"{took['before']:.2f} | {took['now']:.2f} | {took['before'] / took['now']:.1f}"
    num_other = int((results["before"] != results["now"]).sum())
    row = f"| {case.name} | {per_sample} | {gain} | {num_other} of {count} | {difference(case):.1e} |"
    seconds = [*case.steps.values(), took["opened"], took["now"] - took["opened"]]
    return row, f"| {case.name} | {' | '.join(f'{each:.2f}' for each in seconds)} |"


def subject(name: str, count: int) -> tuple[nn.Module, Splits, Task, Recipe]:
    if name == "efficientnet_lite0":
        recipe = Recipe(repair=Repair(num_samples=64))
        recipe = replace(recipe, search=replace(recipe.search, num_repair_samples=64))
        return build_efficientnet_lite0(), random_images(max(count // 10, 64)), classification(), recipe
    pipeline = load_pipeline(name)
    network = with_slim_attention(pipeline.build_model()).eval()
    return network, pipeline.load_data(), pipeline.task(), pipeline.recipe()


def difference(case: Case) -> float:
    """The largest difference of the outputs, as a share of the largest output."""
    with ExitStack() as stack:
        inputs = [given for given, _ in case.val[:2]]
        one, other = (torch.cat(opened(stack).run(inputs)) for opened in (case.in_eager, case.by_file))
    return float((one - other).abs().max() / one.abs().max())


if __name__ == "__main__":
    main()
