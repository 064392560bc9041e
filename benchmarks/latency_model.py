"""How well is the latency of unmeasured networks predicted?

    python benchmarks/latency_model.py resnet20_cifar10 resnet56_cifar10 [--timed 40] [--unseen 32] [--batch 1]
        [--multiple 4] [--precision fp32]

Needs the environment variables of the pipelines (CIFAR10_DIR, RESNET56_WEIGHTS, ...). A model is fitted to --timed
random networks and predicts --unseen others. Those are measured twice: no model can have a smaller error than the
difference between the two measurements. ONNX Runtime, one thread. All files are cut from one export; no earlier
measurement is used. Prints Markdown.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.stats import spearmanr

from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.int8 import to_int8
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import PrecisionRow, ScoreTable, TimedNetworks
from deploypipe.runtimes.int8_arithmetic import kernels_of
from deploypipe.search.allocation.loss_curves import width_levels
from deploypipe.search.allocation.solver import Allocation
from deploypipe.search.cost_models.latency_model import LatencyModel
from deploypipe.search.cost_models.width_dependencies import find_layer_widths
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.time_networks import time_networks
from deploypipe.target import Target
from deploypipe.task import take, take_calib
from deploypipe.user_pipeline import UserPipeline, load_pipeline

HEADER = (
    "| network | groups | mean error, % | largest, % | Spearman | in the 95 % interval | left out of the fit, % | "
    "the same networks twice, % | s to measure | s to fit | exported |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+")
    parser.add_argument("--timed", type=int, default=40)
    parser.add_argument("--unseen", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--multiple", type=int, default=4, help="widths are multiples of this number")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"\nBatch {options.batch}, {options.precision}, {options.timed} networks fitted, {options.unseen} predicted\n"
    )
    print(HEADER + "\n" + "|---" * 11 + "|")
    for name in options.pipelines:
        with TemporaryDirectory() as folder:
            print(row(name, load_pipeline(name), Path(folder), options), flush=True)


def row(name: str, pipeline: UserPipeline, folder: Path, options: argparse.Namespace) -> str:
    dense, calib = with_slim_attention(pipeline.build_model()).eval(), take_calib(pipeline.load_data().calib, 64)
    recipe, inputs = pipeline.recipe(), take(calib[0][0], 2)
    structures = list_structures(dense, inputs, recipe.keep)
    levels = {
        g.name: (*width_levels(g.num_units, 8, g.step(options.multiple), 1), g.num_units) for g in structures.groups
    }
    scores = ScoreTable(scorer="none", channels={g.name: tuple(range(g.num_units)) for g in structures.groups})
    target = Target(runtime="onnxruntime", batch_size=options.batch)
    file, template = folder / "dense.onnx", folder / "template.onnx"
    fp32 = export_onnx(dense, calib[:1], file, recipe.export, template=template)
    shipping = PrecisionRow(precision="fp32", file=fp32)
    if options.precision == "int8":
        made = to_int8(file, folder / "int8.onnx", calib, None, kernels_of(target), recipe.export)
        shipping = PrecisionRow(precision="int8", file=made.file, conversion=made)

    def plan_for(chosen: Allocation):  # type: ignore[no-untyped-def]
        return make_plan(structures, scores, chosen.widths, chosen.blocks, options.multiple)

    def measure(count: int, seed: int, repeat: int) -> TimedNetworks:
        os.environ["DEPLOYPIPE_CACHE"] = str(folder / f"cache{seed}{repeat}")
        candidates = CandidateFiles(
            dense=dense,
            dense_onnx=file,
            dense_opened=file,
            template=template,
            precision=shipping,
            calib=calib,
            target=target,
            builds_engines=False,
            export=recipe.export,
        )
        return time_networks(candidates, structures, levels, plan_for, folder, count=count, seed=seed)

    fitted = measure(options.timed, 0, 0)
    first, second = (measure(options.unseen + 2, 1, repeat) for repeat in (0, 1))
    started = time.perf_counter()
    model = LatencyModel(find_layer_widths(dense, structures, inputs), fitted.rows)
    seconds = time.perf_counter() - started
    unseen, again = first.rows[2:], second.rows[2:]  # the first two are among those fitted
    predicted = [model.predict(timed.cut) for timed in unseen]
    ratios = np.array([timed.ratio for timed in unseen])
    values = np.array([interval.value for interval in predicted])
    errors = 100 * np.abs(values / ratios - 1)
    inside = np.mean([p.low <= ratio <= p.high for p, ratio in zip(predicted, ratios, strict=True)])
    left_out = 100 * np.abs(model.held_out() / [timed.ratio for timed in fitted.rows] - 1)
    floor = 100 * np.abs(np.array([timed.ratio for timed in again]) / ratios - 1)
    return (
        f"| {name} | {len(structures.groups)} | {errors.mean():.1f} | {errors.max():.1f} | "
        f"{spearmanr(values, ratios)[0]:.3f} | {100 * inside:.0f} % | {left_out.mean():.1f} | {floor.mean():.1f} | "
        f"{fitted.seconds:.0f} | {seconds:.1f} | {sum(fitted.exported.values())} of {options.timed} |"
    )


if __name__ == "__main__":
    main()
