"""Are predicted loss curves as good as measured ones, and how much faster are they?

    python benchmarks/curves.py resnet20_cifar10 vit_cifar10 resnet56_cifar10 inverted_residuals [--images 512]
        [--val 5000] [--shares 0.6 0.4] [--seconds 170]
    python benchmarks/curves.py efficientnet_lite0 --images 16

Needs the environment variables of the pipelines (CIFAR10_DIR, RESNET20_WEIGHTS, ...). `inverted_residuals` is a small
network with the blocks of MobileNetV2, trained here on CIFAR-10 for --seconds. `efficientnet_lite0` has random weights
and random images of 224 pixels, so its plans are not judged.

For each network, from one process: processor seconds and seconds on the clock of all curves with
`search.curves = "measured"` and "predicted", Spearman's rank correlation of the two over all widths and the lowest in a
group, and how far a predicted loss is off (the root mean square of the log of the ratio, for losses above 1e-3). Then
both choose widths and blocks for a share of the multiply-accumulates (--shares), by the solver alone. The networks are
repaired and judged on the first --val images of val, without training. Reported: accuracy, and the difference with a
paired 95 % interval. Prints Markdown.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.memory_order import find_order_
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Magnitude, Recipe
from deploypipe.records import Curves, PruningPlan, ScoreTable, Structures
from deploypipe.scoring import score
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.search.allocation.solver import Allocation, Bound, allocate_to, allowed_widths
from deploypipe.search.cost_models.additive_costs import mac_costs
from deploypipe.task import Batch, Splits, Task, channels_last, classification, forward, take, take_calib
from deploypipe.user_pipeline import load_pipeline

_NUM_REPAIR = 1024
_SMALL = 1e-3  # losses below it decide nothing


@dataclass(frozen=True, slots=True)
class Subject:
    """A network and all that its curves need."""

    name: str
    dense: nn.Module
    calib: list[Batch]
    val: list[Batch]  # empty: plans are not judged
    task: Task
    recipe: Recipe
    structures: Structures
    moments: Moments
    scores: ScoreTable

    def curves(self, mode: str) -> tuple[Curves, float, float]:
        """The curves, and how long they took: processor seconds and seconds on the clock."""
        cpu, clock = time.process_time(), time.perf_counter()
        found = measure_curves(
            self.dense,
            self.structures,
            self.scores,
            self.moments,
            self.calib,
            replace(self.recipe.search, curves=mode),
            distillation_loss=self.task.distillation_loss,
        )
        return found, time.process_time() - cpu, time.perf_counter() - clock

    def plan(self, chosen: Allocation) -> PruningPlan:
        return make_plan(self.structures, self.scores, chosen.widths, chosen.blocks)

    def chosen(self, curves: Curves, share: float) -> Allocation:
        """Widths and blocks of the smallest summed loss within a share of the multiply-accumulates."""
        bound = Bound(costs=mac_costs(self.structures, allowed_widths(self.structures, curves)), share=share)
        return allocate_to(self.structures, curves, [bound], lambda chosen: [self.macs(chosen)])

    def macs(self, chosen: Allocation) -> float:
        """As a share of the dense network's."""
        pruned = apply_plan(self.dense, self.plan(chosen))
        return count_macs(pruned, take(self.calib[0][0], 2))[1] / self.structures.num_macs

    def hits(self, chosen: Allocation) -> NDArray[np.float64]:
        """The metric of the repaired network for each sample of val."""
        plan = self.plan(chosen)
        calib = take_calib(self.calib, _NUM_REPAIR)
        repaired, _ = repair(self.dense, apply_plan(self.dense, plan), plan, calib, self.recipe.repair)
        return self.judge(repaired)

    def judge(self, network: nn.Module) -> NDArray[np.float64]:
        """The metric of a network for each sample of val."""
        arrange = find_order_(network, self.val[0][0])
        return evaluate_module(network, ((arrange(inputs), target) for inputs, target in self.val), self.task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--val", type=int, default=5000)
    parser.add_argument("--shares", type=float, nargs="*", default=(0.6, 0.4))
    parser.add_argument("--seconds", type=float, default=170)
    options = parser.parse_args()
    for name in options.networks:
        subject = prepared(name, options.images, options.val, options.seconds)
        measured, *slow = subject.curves("measured")
        predicted, *fast = subject.curves("predicted")
        print(f"\n{name}: {len(subject.structures.groups)} groups, {len(subject.structures.blocks)} blocks, ", end="")
        print(f"{measured.num_samples} images, {torch.get_num_threads()} threads\n")
        print(agreement(measured, predicted, slow, fast), flush=True)
        if subject.val:
            print(f"\nDense: {100 * subject.judge(subject.dense).mean():.2f} % on val")
            print("\n| MACs | measured | predicted | difference, points | widths and blocks that differ |")
            print("|---|---|---|---|---|")
        for share in options.shares if subject.val else ():
            print(judged(subject, measured, predicted, share), flush=True)


def agreement(measured: Curves, predicted: Curves, slow: list[float], fast: list[float]) -> str:
    pairs = [(a, b) for a, b in zip(measured.curves, predicted.curves, strict=True) if a.kind == "channels"]
    all_losses = np.array([loss for a, _ in pairs for loss in a.losses[:-1]])
    all_guesses = np.array([loss for _, b in pairs for loss in b.losses[:-1]])
    within = [spearmanr(a.losses, b.losses)[0] for a, b in pairs if len(set(a.losses)) > 2]
    is_guess = np.array([kept in b.predicted for _, b in pairs for kept in b.kept[:-1]])
    large = is_guess & (all_losses > _SMALL)
    off = np.sqrt(np.mean(np.log(all_guesses[large] / all_losses[large]) ** 2)) if large.any() else 0.0
    rows = [
        ("processor seconds, measured and predicted", f"{slow[0]:.1f}, {fast[0]:.1f} ({slow[0] / fast[0]:.1f}x)"),
        ("seconds on the clock", f"{slow[1]:.1f}, {fast[1]:.1f} ({slow[1] / fast[1]:.1f}x)"),
        ("images of the predicted curves", str(predicted.num_samples)),
        ("widths predicted, of all below the dense one", f"{is_guess.sum()} of {len(is_guess)}"),
        ("Spearman over all widths", f"{spearmanr(all_losses, all_guesses)[0]:.4f}"),
        ("Spearman, lowest group", f"{min(within):.3f}"),
        ("root mean square log ratio of predicted losses", f"{off:.3f}"),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in rows)


def judged(subject: Subject, measured: Curves, predicted: Curves, share: float) -> str:
    one, other = (subject.chosen(curves, share) for curves in (measured, predicted))
    hits = [subject.hits(chosen) for chosen in (one, other)]
    drop = interval_of_drop_pp(*hits)
    num_widths = sum(one.widths[name] != other.widths.get(name) for name in one.widths)
    num_blocks = len(set(one.blocks) ^ set(other.blocks))
    cells = [
        f"{share}",
        *(f"{100 * each.mean():.2f} %" for each in hits),
        f"{-drop.value:+.2f} ({-drop.high:.2f} to {-drop.low:.2f})",
        f"{num_widths} of {len(one.widths)}, {num_blocks}",
    ]
    return "| " + " | ".join(cells) + " |"


def prepared(name: str, num_images: int, num_val: int, seconds: float) -> Subject:
    dense, splits, task, recipe = OWN[name](seconds) if name in OWN else of_pipeline(name)
    dense = dense.eval()
    recipe = replace(recipe, search=replace(recipe.search, num_curve_samples=num_images))
    calib = take_calib(splits.calib, max(num_images, _NUM_REPAIR))
    first, target = calib[0]
    with torch.no_grad():
        task = with_distillation_loss(task, forward(dense, first), target)
    structures = list_structures(dense, take(first, 2), recipe.keep, recipe.constraints)
    val = take_calib(splits.val, num_val) if list(splits.val) else []
    moments = observe_activations(dense, structures, calib, recipe.observe)
    scores = score(dense, structures, moments, Magnitude())
    return Subject(name, dense, calib, val, task, recipe, structures, moments, scores)


Parts = tuple[nn.Module, Splits, Task, Recipe]


def of_pipeline(name: str) -> Parts:
    loaded = load_pipeline(name)
    return loaded.build_model(), loaded.load_data(), loaded.task(), loaded.recipe()


def unit(
    num_in: int, num_out: int, size: int, stride: int = 1, groups: int = 1, *, is_linear: bool = False
) -> nn.Module:
    layers = [
        nn.Conv2d(num_in, num_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(num_out),
        nn.Identity() if is_linear else nn.ReLU6(inplace=True),
    ]
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, num_in: int, num_out: int, size: int, stride: int, factor: int) -> None:
        super().__init__()
        width = num_in * factor
        self.expand = unit(num_in, width, 1) if factor > 1 else nn.Identity()
        self.depthwise = unit(width, width, size, stride, width)
        self.project = unit(width, num_out, 1, is_linear=True)
        self.is_residual = num_in == num_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class InvertedResiduals(nn.Module):
    """stages: (expansion, outputs, size of the depthwise kernel, stride, blocks) each."""

    def __init__(
        self, stem: tuple[int, int], stages: tuple[tuple[int, int, int, int, int], ...], head: int, classes: int
    ) -> None:
        super().__init__()
        width, stride = stem
        self.stem = unit(3, width, 3, stride)
        blocks = []
        for factor, num_out, size, stride, count in stages:
            for number in range(count):
                blocks.append(InvertedResidual(width, num_out, size, 1 if number else stride, factor))
                width = num_out
        self.blocks, self.head, self.last = nn.Sequential(*blocks), unit(width, head, 1), nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def inverted_residuals(seconds: float) -> Parts:
    """Trained for a while: not to be good, but so that its layers differ in what they are worth."""
    from pipelines import resnet20_cifar10

    torch.manual_seed(0)
    stages = ((1, 16, 3, 1, 1), (4, 24, 3, 2, 2), (4, 40, 3, 2, 3), (4, 80, 3, 2, 2))
    network = InvertedResiduals((16, 1), stages, 256, 10).to(memory_format=torch.channels_last)
    splits = resnet20_cifar10.load_data()
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True, lr=0.1)
    started, step = time.perf_counter(), 0
    while (past := (time.perf_counter() - started) / seconds) < 1:
        for images, labels in splits.train:
            past = min((time.perf_counter() - started) / seconds, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(step / 50, 1) * (1 - past)
            optimizer.zero_grad()
            F.cross_entropy(network(channels_last(images)), labels).backward()
            optimizer.step()
            step += 1
            if past >= 1:
                break
    network = network.to(memory_format=torch.contiguous_format).eval()
    print(f"\ninverted_residuals: {step} steps of 128 images")
    return network, splits, classification(), Recipe()


def efficientnet_lite0(_: float) -> Parts:
    torch.manual_seed(0)
    stages = (
        (1, 16, 3, 1, 1),
        (6, 24, 3, 2, 2),
        (6, 40, 5, 2, 2),
        (6, 80, 3, 2, 3),
        (6, 112, 5, 1, 3),
        (6, 192, 5, 2, 4),
        (6, 320, 3, 1, 1),
    )
    network = InvertedResiduals((32, 2), stages, 1280, 1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: outputs that depend on the image
            nn.init.uniform_(module.weight, 0.5, 1.5)
    images = [(torch.randn(4, 3, 224, 224), torch.arange(4)) for _ in range(64)]
    with torch.no_grad():
        network.train()(torch.cat([batch for batch, _ in images[:8]]))
    none: list[Batch] = []
    return network, Splits(calib=images, train=none, val=none, test=none), classification(), Recipe()


OWN: dict[str, Callable[[float], Parts]] = {
    "inverted_residuals": inverted_residuals,
    "efficientnet_lite0": efficientnet_lite0,
}


if __name__ == "__main__":
    main()
