"""What are the costs and gains of fp16 and int8? Size, error, accuracy and latency of one network's files.

    python benchmarks/precision.py digits resnet56_cifar10 [--test 10000] [--samples 400] [--threads 1]

Needs the environment variables of the pipelines (CIFAR10_DIR, RESNET56_WEIGHTS, ...). Each dense network is exported
and converted to fp16, to int8 by the recipe for onnxruntime, and to int8 by the recipe for TensorRT (which onnxruntime
runs here for comparison). If TensorRT-RTX is installed, it builds engines from the fp32, the fp16 and TensorRT's int8
file for compute capabilities 8.6, 8.9 and 12.0; only a GPU can run them. All ONNX files are timed in turns in
onnxruntime on the CPU, which computes fp16 in float32. The error of fp16 is that of a graph that rounds each tensor,
run in float32; the error of int8 is that of the file. Both are relative to the largest output of the fp32 file, on
samples that were not used for calibration. Prints Markdown.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.accuracy import evaluate_file
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import time_interleaved
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.fp16 import to_fp16
from deploypipe.export.quantization.int8 import to_int8
from deploypipe.export.tensorrt_engine.build_engine import build_engine
from deploypipe.numerics.intervals import interval_of_drop_pp, interval_of_median_ratio
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.records import Converted, Interval
from deploypipe.runtimes import is_installed
from deploypipe.runtimes.int8_arithmetic import Int8Kernels, saturates_here
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.target import Target
from deploypipe.task import Batch, take_calib
from deploypipe.user_pipeline import UserPipeline, load_pipeline

BATCH_SIZES = (1, 16)
KERNELS = {
    "int8 for onnxruntime": Int8Kernels(runtime="onnxruntime"),
    "int8 without VNNI": Int8Kernels(runtime="onnxruntime", saturate=True),
    "int8 for tensorrt": Int8Kernels(runtime="tensorrt"),
}
RTX = Target(
    runtime="tensorrt-rtx", compute_capabilities=("8.6", "8.9", "12.0"), dynamic_dims={"sequence": (1, 48, 512)}
)
NUM_PARITY, NUM_JUDGED = 64, 1000  # samples: of calib, to check the export; of val, to judge candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    name: str
    path: Path
    converted: Converted | None  # None: fp32
    is_plain: bool = False  # evaluated in float between its roundings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+")
    parser.add_argument("--test", type=int, default=10_000, help="samples of the test split")
    parser.add_argument("--samples", type=int, default=400, help="timed runs of each file and batch size")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(describe_conditions(options.threads))
    for name in options.pipelines:
        pipeline = load_pipeline(name)
        with TemporaryDirectory() as folder:
            entrants = convert(pipeline, Path(folder), options.threads)
            print(f"\n### {name}\n")
            show_choices(entrants)
            show_figures(entrants, pipeline, options.test, options.samples, options.threads)
            show_engines(entrants, Path(folder))


def convert(pipeline: UserPipeline, folder: Path, num_threads: int) -> list[Entrant]:
    model, splits, settings = (
        with_slim_attention(pipeline.build_model()),
        pipeline.load_data(),
        pipeline.recipe().export,
    )
    dense = folder / "fp32.onnx"
    export_onnx(model.eval(), take_calib(splits.calib, NUM_PARITY), dense, settings)
    task, judged = pipeline.task(), take_calib(splits.val, NUM_JUDGED)

    entrants = [Entrant(name="fp32", path=dense, converted=None)]
    half = folder / "fp16.onnx"
    entrants.append(Entrant(name="fp16", path=half, converted=to_fp16(dense, half, splits.calib, settings)))
    for name, kernels in KERNELS.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        reader = OnnxRuntime(is_plain=kernels.are_emulated_here)

        def judge(path: Path, reader: OnnxRuntime = reader) -> float:
            return float(np.mean(evaluate_file(path, judged, task, reader, num_threads)))

        converted = to_int8(dense, path, splits.calib, judge, kernels, settings)
        entrants.append(Entrant(name=name, path=path, converted=converted, is_plain=kernels.are_emulated_here))
    return entrants


def describe_conditions(num_threads: int) -> str:
    environment = describe_environment(num_threads)
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    sums = "saturating" if saturates_here() else "exact"
    return (
        f"{environment.cpu}, {sums} 8-bit sums, {environment.num_cpus} processors, {num_threads} thread(s) and "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}, load before {environment.load_before:.1f}; "
        f"{versions}"
    )


def show_choices(entrants: list[Entrant]) -> None:
    for entrant in entrants:
        if (made := entrant.converted) is None:
            continue
        kept = f"{made.num_layers - made.num_converted} of {made.num_layers} nodes in float"
        ranges = "; ".join(f"{c.method} {c.mean_abs_error:.4f}" for c in made.calibrations)
        method = f", ranges by {made.method} (mean errors: {ranges})" if ranges else ""
        biases = ", biases corrected" if made.is_bias_corrected else ""
        print(f"- {entrant.name}: {kept}{method}{biases}, {made.num_calib_samples or 64} samples, {made.seconds:.0f} s")
        for note in made.notes:
            print(f"  - {note}")


def show_figures(
    entrants: list[Entrant], pipeline: UserPipeline, num_test: int, num_samples: int, num_threads: int
) -> None:
    test, task = pipeline.load_data().test, pipeline.task()
    batches = take_calib(test, num_test)
    metrics = [evaluate_file(e.path, batches, task, OnnxRuntime(is_plain=e.is_plain), num_threads) for e in entrants]
    latencies = [time_files(entrants, batches, size, num_samples, num_threads) for size in BATCH_SIZES]
    columns = "".join(f" p50 ms, batch {n} | of fp32 |" for n in BATCH_SIZES)
    print(f"\n| file | MiB | max error | top-1 kept | {task.name}, % | drop, pp |{columns}")
    print("|---|---|---|---|---|---|" + "---|---|" * len(BATCH_SIZES))
    for i, entrant in enumerate(entrants):
        parity = entrant.converted.file.parity if entrant.converted else None
        error = f"{parity.max_abs_error:.4f}" if parity else "-"
        agreement = "-" if parity is None or parity.top1_agreement is None else f"{parity.top1_agreement:.1%}"
        drop = with_interval(interval_of_drop_pp(metrics[0], metrics[i]), 2) if i else "-"
        cells = [
            entrant.name,
            f"{entrant.path.stat().st_size / 2**20:.2f}",
            error,
            agreement,
            f"{100 * metrics[i].mean():.2f}",
            drop,
        ]
        for p50s, ratios in latencies:
            cells += [f"{p50s[i]:.3f}", with_interval(ratios[i], 3) if i else "1"]
        print("| " + " | ".join(cells) + " |")


def show_engines(entrants: list[Entrant], folder: Path) -> None:
    if not is_installed("tensorrt_rtx", "tensorrt_rtx_bindings"):
        print("\nNo engines: pip install 'deploypipe[tensorrt-rtx]'")
        return
    print("\n| TensorRT-RTX engine of | ONNX, MiB | engine, MiB | layers | s to build |\n|---|---|---|---|---|")
    for entrant in entrants:
        if entrant.name == "int8 for onnxruntime":
            continue
        engine = build_engine(entrant.path, RTX, folder / "engines")
        sizes = [entrant.path.stat().st_size / 2**20, engine.size_bytes / 2**20]
        cells = [f"{size:.2f}" for size in sizes] + [str(len(engine.layers)), f"{engine.build_seconds:.1f}"]
        print(f"| {entrant.name} | {' | '.join(cells)} |")


def time_files(
    entrants: list[Entrant], batches: Iterable[Batch], batch_size: int, num_samples: int, num_threads: int
) -> tuple[NDArray[np.float64], list[Interval]]:
    """Medians in ms, and their ratios to the first file's, all files timed interleaved."""
    target = Target(runtime="onnxruntime", batch_size=batch_size, num_threads=num_threads)
    with OnnxRuntime().open(entrants[0].path, num_threads=num_threads) as session:
        inputs = first_batch(batches, session.input_names, batch_size)
    paths = [entrant.path for entrant in entrants]
    timings = time_interleaved(paths, inputs, OnnxRuntime(), target, num_samples=num_samples)
    p50s = np.array([np.median(samples) for samples in timings.samples])
    return p50s, [interval_of_median_ratio(s, timings.samples[0], block=timings.block) for s in timings.samples]


def with_interval(interval: Interval, digits: int) -> str:
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


if __name__ == "__main__":
    main()
