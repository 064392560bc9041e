"""How long do the stages of a search take on networks of ImageNet's size, and how much memory?

    python benchmarks/server_size.py [NAME ...] [--images 512] [--val 256] [--threads 2] [--stages observe score ...]
    python benchmarks/server_size.py mobilenet_v2 --checkout ../older          the same with the code in another folder

Networks of `transformers` in their published sizes, with random weights and random images of 224 pixels: resnet50,
mobilenet_v2, vit_b16, convnext_t; all by default. Each stage runs in a process of its own, which finds what earlier
stages left in the run folder. A process's seconds are those of the stage alone. Its peak memory is that of the whole
process: PyTorch, the network and the images included. Prints a Markdown table.

baseline is the dense network's file: its peak memory, its accuracy on val and a moment of timing. repair and trial are
of the network with three quarters of all units: repair with `search.num_repair_samples`, and a whole trial without
timing (surgery, repair, the file, accuracy on all of val). judging is trial minus repair.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SIZE, CLASSES, BATCH = 224, 1000, 32
NETWORKS = {  # by name: class in `transformers`, whose default settings are those sizes
    "resnet50": "ResNetForImageClassification",
    "mobilenet_v2": "MobileNetV2ForImageClassification",
    "vit_b16": "ViTForImageClassification",
    "convnext_t": "ConvNextForImageClassification",
}
STAGES = ("structures", "dense_file", "baseline", "observe", "score", "curves", "repair", "trial")
_KEPT = 0.75  # of the units of every group, in the trial's network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS), metavar="NAME", help=" ".join(NETWORKS))
    parser.add_argument("--images", type=int, default=512, help="of the calibration split")
    parser.add_argument("--val", type=int, default=256, help="images of val")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="shown; earlier ones run too")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="the code that is measured")
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NETWORKS]:
        parser.error(f"{unknown[0]} is unknown; choose from {', '.join(NETWORKS)}")
    if options.child:
        stage, folder = options.child
        print(json.dumps(run_stage(options.names[0], stage, Path(folder), options)))
    else:
        show(options)


def show(options: argparse.Namespace) -> None:
    print(f"{options.images} images for calibration, {options.val} of val, {SIZE} pixels, {options.threads} threads;")
    print(f"load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} processors; s, and MiB at the peak\n")
    heads = [head for stage in options.stages for head in (stage, *(["judging"] if stage == "trial" else []))]
    print(f"| network | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
    last = max(STAGES.index(stage) for stage in options.stages)
    for name in options.names:
        with TemporaryDirectory() as folder:
            found = {}
            for stage in STAGES[: last + 1]:
                found[stage] = in_own_process(name, stage, folder, options)
                sys.stderr.write(f"{name}, {stage}: {cell_of(found[stage])}\n")
        cells = []
        for head in heads:
            if head == "judging":
                have_both = all("seconds" in found[stage] for stage in ("trial", "repair"))
                cells.append(f"{found['trial']['seconds'] - found['repair']['seconds']:.1f}" if have_both else "-")
            else:
                cells.append(cell_of(found[head]))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def cell_of(found: dict[str, Any]) -> str:
    return found.get("failed") or f"{found['seconds']:.1f}, {found['peak_mib']:,.0f}"


def in_own_process(name: str, stage: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a stage, or why it failed."""
    numbers = {"--images": options.images, "--val": options.val, "--threads": options.threads}
    words = [word for key, value in numbers.items() for word in (key, str(value))]
    threads = str(options.threads)
    environment = {**os.environ, "PYTHONPATH": str(options.checkout.resolve()), "OMP_NUM_THREADS": threads}
    command = [sys.executable, __file__, name, *words, "--child", stage, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        sys.stderr.write(f"{name}, {stage}: {done.stderr[-2000:]}\n")
        return {"failed": "killed: memory?" if done.returncode < 0 else last[:60]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- one stage, in its process ----------------------------------------------------------------------------------------


class RandomImages:
    """Batches of random images, made anew in each pass, as a loader's are."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return -(-self.count // BATCH)

    def __iter__(self) -> Iterator[Any]:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, BATCH):
            size = min(BATCH, self.count - start)
            images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
            yield images, torch.randint(CLASSES, (size,), generator=generator)


def build_network(name: str) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, NETWORKS[name])
    torch.manual_seed(0)
    return kind(kind.config_class(num_labels=CLASSES)).eval()


def run_stage(name: str, stage: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    import torch

    from deploypipe.pruning.surgery.slim_attention import with_slim_attention
    from deploypipe.recipe import Recipe
    from deploypipe.runs.store import open_run
    from deploypipe.stages.context import prepare_run
    from deploypipe.target import Budget, Target
    from deploypipe.task import Splits, classification

    torch.set_num_threads(options.threads)
    calib, val = RandomImages(options.images, 1), RandomImages(options.val, 2)
    splits = Splits(calib=calib, train=val, val=val, test=val)
    target = Target(runtime="onnxruntime", num_threads=options.threads, budget=Budget(macs="0.6x"))
    with open_run(folder / "run") as run:
        model = with_slim_attention(build_network(name))
        ctx = prepare_run(model, splits, classification(), Recipe(), target, run)
        work = prepared(ctx, stage, folder)
        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def prepared(ctx: Any, stage: str, folder: Path) -> Callable[[], object]:
    """The stage as a call; what it needs is read from the run folder first."""
    from deploypipe.stages import profile

    if stage == "structures":
        return lambda: profile.structures(ctx)
    structures = profile.structures(ctx).record
    if stage == "dense_file":
        return lambda: profile.dense_export(ctx)
    if stage == "baseline":
        exported = profile.dense_export(ctx)
        return lambda: measured(ctx, exported)
    if stage == "observe":
        return lambda: profile.observe(ctx, structures)
    observed = profile.observe(ctx, structures)
    if stage == "score":
        return lambda: profile.score(ctx, structures, observed)
    scores = profile.score(ctx, structures, observed)
    if stage == "curves":
        return lambda: profile.loss_curves(ctx, structures, scores, observed)
    return on_one_network(ctx, stage, structures, scores.record, folder)


def measured(ctx: Any, exported: Any) -> Any:
    """The dense network's file, timed for a moment only: the machine need not be quiet."""
    from deploypipe.benchmark.latency import brief_timing
    from deploypipe.stages import profile

    with brief_timing():
        return profile.baseline(ctx, exported)


def on_one_network(ctx: Any, stage: str, structures: Any, scores: Any, folder: Path) -> Callable[[], object]:
    from deploypipe.pruning.repair.least_squares_repair import repair
    from deploypipe.pruning.surgery.apply_plan import apply_plan
    from deploypipe.pruning.surgery.plan import make_plan
    from deploypipe.records import PrecisionRow
    from deploypipe.search.allocation.solver import uniform
    from deploypipe.stages import profile, search

    chosen = uniform(structures, _KEPT, 1)
    plan = make_plan(structures, scores, chosen.widths, chosen.blocks)
    if stage == "repair":
        pruned = apply_plan(ctx.model, plan)
        settings = replace(ctx.recipe.repair, num_samples=ctx.recipe.search.num_repair_samples)
        fit = {"fit": ctx.memory.trial_repair} if hasattr(ctx, "memory") else {}  # of an older checkout
        return lambda: repair(ctx.model, pruned, plan, ctx.calib, settings, seed=ctx.recipe.seed, **fit)
    dense = measured(ctx, profile.dense_export(ctx))
    row = PrecisionRow(precision="fp32", file=dense.record.file)
    goal = search.goal(ctx, structures, dense, ctx.target.budget.limits(), row)
    evaluate = replace(search._evaluator(ctx, goal, folder), dense_p50_ms=None)
    return lambda: evaluate(plan, lambda *_: False)


if __name__ == "__main__":
    main()
