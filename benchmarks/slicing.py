"""How long does it take to make a pruned network's file without an export, and is it as fast as the exported file?

    python benchmarks/slicing.py resnet56_cifar10 vit_cifar10 [--plans 5] [--samples 400] [--threads 1]

Needs the environment variables of the pipelines (CIFAR10_DIR, RESNET56_WEIGHTS, ...). Plans are random: widths between
a quarter and all of a group's units, every fifth block removed. For each plan, the table shows the seconds to slice and
to export (both without surgery), the difference of the outputs on unseen samples, and the latency of the sliced file
relative to the exported one. For comparison, it shows the latency of a copy of the exported file relative to that file:
this difference is pure chance. Prints Markdown.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.latency import time_interleaved
from deploypipe.export.graph_slicing.sliced_files import slice_file
from deploypipe.export.graph_slicing.template import open_template
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import Interval, PruningPlan, ScoreTable, Structures
from deploypipe.runtimes import Array
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.target import Target
from deploypipe.task import take, take_calib
from deploypipe.user_pipeline import UserPipeline, load_pipeline

NUM_PARITY = 2  # samples to check an export, as in a search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+")
    parser.add_argument("--plans", type=int, default=5)
    parser.add_argument("--samples", type=int, default=400, help="timed runs of each file")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.pipelines:
        with TemporaryDirectory() as folder:
            show(name, load_pipeline(name), Path(folder), options)


def show(name: str, pipeline: UserPipeline, folder: Path, options: argparse.Namespace) -> None:
    dense, splits, settings = (
        with_slim_attention(pipeline.build_model()).eval(),
        pipeline.load_data(),
        pipeline.recipe(),
    )
    few, unseen = take_calib(splits.calib, NUM_PARITY), take_calib(splits.val, 64)
    structures = list_structures(dense, take(few[0][0], 2), settings.keep)
    at = {kind: folder / f"{kind}.onnx" for kind in ("dense", "template", "sliced", "exported", "copy")}
    whole = seconds(lambda: export_onnx(dense, few, at["dense"], settings.export, template=at["template"]))
    inputs = [value.name for value in onnx.load(at["template"], load_external_data=False).graph.input]
    began = time.perf_counter()
    template = open_template(at["template"], dense, first_batch(few, inputs, NUM_PARITY))
    opened = time.perf_counter() - began
    print(f"\n### {name}\n\nThe dense network with its template: {whole:.1f} s; opening that: {opened:.2f} s.\n")
    print(
        "| plan | blocks gone | slice, s | export, s | times | differ by | latency, sliced / exported | the same file |"
    )
    print("|---" * 8 + "|")
    ratios = []
    for seed in range(options.plans):
        plan = random_plan(structures, seed)
        pruned = apply_plan(dense, plan)
        began = time.perf_counter()
        file = slice_file(template, dense, pruned, plan, few, at["sliced"], settings.export)
        sliced = time.perf_counter() - began
        exported = seconds(lambda p=pruned: export_onnx(p, few, at["exported"], settings.export))
        ratios.append(exported / sliced)
        shutil.copy(at["exported"], at["copy"])
        feed = first_batch(unseen, inputs, 64)
        outputs = [run(at[kind], feed) for kind in ("sliced", "exported")]
        apart = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())
        one = first_batch(unseen, inputs, 1)
        compared = [latency_ratio(at[kind], at["exported"], one, options) for kind in ("sliced", "copy")]
        cells = [seed, len(plan.blocks), f"{sliced:.3f}", f"{exported:.2f}", f"{ratios[-1]:.0f}", f"{apart:.1e}"]
        print("| " + " | ".join(map(str, [*cells, *compared])) + f" | {file.reason}", flush=True)
    logs = np.log(ratios)
    resampled = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(resampled, [0.025, 0.975]))
    print(
        f"\nExport / slice: {np.exp(logs.mean()):.0f} times [{low:.0f}, {high:.0f}] (geometric mean, bootstrap 95 %)."
    )


def random_plan(structures: Structures, seed: int) -> PruningPlan:
    rng = random.Random(seed)
    scores = {g.name: tuple(rng.random() for _ in range(g.num_units)) for g in structures.groups}
    widths = {g.name: rng.randint(max(1, g.num_units // 4), g.num_units) for g in structures.groups}
    blocks = [b.name for b in structures.blocks if rng.random() < 0.2]
    return make_plan(structures, ScoreTable(scorer="random", channels=scores), widths, blocks)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(path: Path, feed: dict[str, Array]) -> Array:
    with OnnxRuntime().open(path, num_threads=1) as session:
        return session.run(feed)[0]


def latency_ratio(path: Path, other: Path, feed: dict[str, Array], options: argparse.Namespace) -> str:
    target = Target(runtime="onnxruntime", num_threads=options.threads, num_latency_samples=options.samples)
    timings = time_interleaved((path, other), feed, OnnxRuntime(), target)
    found: Interval = interval_of_median_ratio(*timings.samples, block=timings.block)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


if __name__ == "__main__":
    main()
