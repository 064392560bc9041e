"""Peak memory of observing, repair and judging networks of 224 pixels, each stage in a process of its own.

    python benchmarks/memory.py resnet50 vit --samples 2048

A row is what `recipe.memory` allows, what was predicted, and the peak resident size of the process, with Python,
PyTorch, the network's weights and all calibration samples. `--whole` repairs all samples as one batch, as before
`recipe.memory`; that takes more than most machines have, so give it few samples: it grows linearly. Weights are random.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.compute_device import CPU
from deploypipe.memory_budget import GIB
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.preflight.memory_plan import memory_text, plan_memory
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Observe, Recipe, Repair, Search
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.task import Batch, classification, cut_batches, find_logits

NETWORKS = {  # of transformers, in their default sizes
    "resnet50": ("ResNetForImageClassification", {}),
    "mobilenetv2": ("MobileNetV2ForImageClassification", {}),
    "vit": ("ViTForImageClassification", {}),
    "convnext": ("ConvNextForImageClassification", {}),
}
STAGES = ("observe", "repair", "judge")
BATCH = 64


class Logits(nn.Module):
    """A network of transformers that returns its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = find_logits(self.inner(pixels))
        assert logits is not None
        return logits


def build(name: str) -> nn.Module:
    kind, settings = NETWORKS[name]
    cls = getattr(import_module("transformers"), kind)
    torch.manual_seed(0)
    return Logits(cls(cls.config_class(num_labels=1000, **settings))).eval()


def images(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    return [(torch.randn(n, 3, 224, 224, generator=generator), torch.zeros(n, dtype=torch.long)) for n in sizes]


def run_stage(name: str, stage: str, count: int, memory: str, *, is_whole: bool) -> dict[str, Any]:
    """One stage in this process: its seconds, its peak resident GiB, and what was predicted."""
    dense, calib = build(name), images(count if stage != "judge" else min(count, 256))
    recipe = Recipe(
        observe=Observe(num_samples=min(count, Observe().num_samples)),
        repair=Repair(num_samples=count),
        search=Search(num_repair_samples=min(count, Search().num_repair_samples)),
        memory=memory,
    )
    plan = plan_memory(dense, calib, classification(), recipe, CPU)
    before = peak_gib()
    started = time.perf_counter()
    if stage == "judge":
        evaluate_module(dense, calib, classification(), device=CPU)
    else:
        structures = list_structures(dense, calib[0][0][:2])
        started = time.perf_counter()
        if stage == "observe":
            cut = cut_batches(calib, plan.observe.max_samples) if plan.observe.max_samples else calib
            observe_halves(dense, structures, cut, recipe.observe)
        else:
            widths = {group.name: -(-group.num_units * 3 // 4) for group in structures.groups}
            chosen = make_plan(structures, score_magnitudes(dense, structures), widths, (), 1)
            fit = None if is_whole else plan.repair
            repair(dense, apply_plan(dense, chosen), chosen, calib, recipe.repair, fit=fit)
    stage_bytes = {"observe": plan.observe.num_bytes, "judge": 0}.get(stage, plan.repair.num_bytes)
    if is_whole:
        stage_bytes = plan.repair.whole_bytes
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "before_gib": round(before, 2),
        "peak_gib": round(peak_gib(), 2),
        "predicted_gib": round((stage_bytes + plan.data_bytes) / GIB, 2),
        "text": memory_text(plan),
    }


def peak_gib() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process: one network, one stage")
    options = parser.parse_args()
    run: Callable[..., dict[str, Any]] = run_stage if options.here else in_a_child
    for name in options.networks:
        for stage in options.stages:
            row = run(name, stage, options.samples, options.memory, is_whole=options.whole)
            print(json.dumps({"network": name, "stage": stage, "samples": options.samples, **row}), flush=True)


def in_a_child(name: str, stage: str, count: int, memory: str, *, is_whole: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--stages", stage, "--samples", str(count), "--memory", memory, "--here"]
    done = subprocess.run(
        [*command, *["--whole"] * is_whole], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"failed": done.returncode}
    return found


if __name__ == "__main__":
    main()
