"""How much do scores cost? Time, memory, and growth with width.

    python benchmarks/scoring_cost.py resnet56_cifar10 [--rounds 9]   the calibration pass, with and without all
                                                                      closed-form scores, relative to a forward pass
    python benchmarks/scoring_cost.py resnet50 [--samples 1024]       seconds and peak memory at 224 px, random weights
    python benchmarks/scoring_cost.py width                           one linear group of 256 to 4096 units, and the
                                                                      exponent with which each score's time grows

All timings use the same samples, in turns, in one process. A pipeline needs its own environment variables.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval, SequentialSelection
from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.numerics.label_information import forward_selection
from deploypipe.numerics.output_error import SequentialErrorRemoval
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import ConditionalMi, LabelMi, LayerwiseMi, Mipp, Observe, OutputError, Scorer
from deploypipe.records import Structures
from deploypipe.scoring import score
from deploypipe.task import Batch, forward, take, take_calib
from deploypipe.user_pipeline import load_pipeline

CLOSED_FORMS: tuple[Scorer, ...] = (Mipp(), LayerwiseMi(), OutputError(), ConditionalMi(), LabelMi())
WIDTHS = (256, 512, 1024, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="PIPELINE|resnet50|width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1024)
    options = parser.parse_args()
    if options.what == "width":
        show_growth()
    elif options.what == "resnet50":
        show_resnet50(options.samples)
    else:
        show_pipeline(options.what, options.rounds)


# --- a pipeline -------------------------------------------------------------------------------------------------------


def show_pipeline(name: str, rounds: int) -> None:
    loaded = load_pipeline(name)
    model, settings = loaded.build_model().eval(), loaded.recipe().observe
    batches = take_calib(loaded.load_data().calib, settings.num_samples)
    structures = list_structures(model, take(batches[0][0], 2))
    works: dict[str, Callable[[], object]] = {
        "plain forward": lambda: run_plainly(model, batches),
        "observe": lambda: observe_activations(model, structures, batches, settings),
        "observe and scores": lambda: score_all(
            model, structures, observe_activations(model, structures, batches, settings), CLOSED_FORMS
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = timed(work)
            if number:  # the first round warms up
                seconds[name].append(taken)
    for name, taken in seconds.items():
        ratio = interval_of_median_ratio(np.array(taken), np.array(seconds["plain forward"]))
        text = f"{ratio.value:.2f}x (95 %: {ratio.low:.2f} to {ratio.high:.2f})"
        print(f"{name:<20} {np.median(taken):6.2f} s   {text}")


def run_plainly(model: nn.Module, batches: list[Batch]) -> None:
    with torch.no_grad():
        for inputs, _ in batches:
            forward(model, inputs)


def score_all(
    model: nn.Module, structures: Structures, moments: Moments, scorers: tuple[Scorer, ...]
) -> dict[str, float]:
    """The seconds of each scorer."""
    return {s.kind: timed(lambda s=s: score(model, structures, moments, s)) for s in scorers}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- ResNet-50 --------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, num_out, 1, bias=False), nn.BatchNorm2d(num_out)
        is_same = num_in == num_out and stride == 1
        projection = (nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        self.shortcut = nn.Identity() if is_same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def build_resnet50() -> nn.Module:
    """ResNet-50 (He et al., arXiv:1512.03385, table 1)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    num_in = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(depth):
            layers.append(Bottleneck(num_in, width, stride if number == 0 else 1))
            num_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, 1000)).eval()


def show_resnet50(num_samples: int) -> None:
    torch.manual_seed(0)
    model = build_resnet50()
    images = (torch.randn(32, 3, 224, 224), torch.randint(0, 10, (32,)))
    batches = [images] * (num_samples // 32)
    structures = list_structures(model, images[0][:2])
    before = peak_mib()
    plain = timed(lambda: run_plainly(model, batches))
    after_plain = peak_mib()
    found: list[Moments] = []
    settings = Observe(num_samples=num_samples)
    seconds = timed(lambda: found.append(observe_activations(model, structures, batches, settings)))
    by_scorer = score_all(model, structures, found[0], CLOSED_FORMS)
    total = seconds + sum(by_scorer.values())
    print(f"{num_samples} images of 224 px; {torch.get_num_threads()} threads")
    print(f"plain forward {plain:.1f} s; observe {seconds:.1f} s ({seconds / plain:.2f}x)")
    print(f"with all closed-form scores {total:.1f} s ({total / plain:.2f}x)")
    print("scores, s:", {kind: round(value, 1) for kind, value in by_scorer.items()})
    print(f"peak memory, MiB: before {before:.0f}, after the plain pass {after_plain:.0f}, at the end {peak_mib():.0f}")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- width ------------------------------------------------------------------------------------------------------------


def show_growth() -> None:
    works: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "MIPP": lambda s, b, _: remove_all(SequentialRemoval(s, b, singles(s), noise=1.0), len(s)),
        "output error": lambda s, b, _: remove_all(
            SequentialErrorRemoval(s, b, singles(s), output_weights=torch.ones(b.shape[1], dtype=b.dtype)), len(s)
        ),
        "layer-wise MI, joint": lambda s, b, _: choose_all(SequentialSelection(s, b, singles(s), noise=1e-3), len(s)),
        "conditional MI": lambda _s, _b, rows: forward_selection(rows, torch.arange(len(rows)) % 10),
    }
    print("| units | " + " | ".join(works) + " |\n" + "|---" * (len(works) + 1) + "|")
    table = []
    for width in WIDTHS:
        table.append([time_at(width, work) for work in works.values()])
        print(f"| {width} | " + " | ".join(f"{seconds:.2f} s" for seconds in table[-1]) + " |", flush=True)
    slopes = [np.polyfit(np.log(WIDTHS[1:]), np.log([row[i] for row in table[1:]]), 1)[0] for i in range(len(works))]
    print("| exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")


def time_at(width: int, work: Callable[[Tensor, Tensor, Tensor], object]) -> float:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(width, width + 64, generator=generator, dtype=torch.float64)
    weights = torch.randn(width, width // 2, generator=generator, dtype=torch.float64)
    rows = torch.randn(1024, width, generator=generator)
    covariance = root @ root.T / width
    return timed(lambda: work(covariance, weights, rows))


def singles(covariance: Tensor) -> list[list[int]]:
    return [[unit] for unit in range(len(covariance))]


def remove_all(problem: SequentialRemoval | SequentialErrorRemoval, count: int) -> None:
    gone = torch.zeros(count, dtype=torch.float64)
    for _ in range(count):
        unit = int((problem.losses() + gone).argmin())
        gone[unit] = torch.inf
        problem.remove_(unit)


def choose_all(problem: SequentialSelection, count: int) -> None:
    chosen = torch.zeros(count, dtype=torch.float64)
    for _ in range(count):
        unit = int((problem.gains() - chosen).argmax())
        chosen[unit] = torch.inf
        problem.choose_(unit)


if __name__ == "__main__":
    main()
