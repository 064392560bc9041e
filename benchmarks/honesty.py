"""Are the intervals of `deploypipe bench` right on this machine, in its present state?

    python benchmarks/honesty.py digits resnet8_cifar10 [--repeats 100] [--samples 400] [--extra 6 12]

First a file is compared with itself: at least 95 of 100 repetitions must find "no difference". Then it is compared with
slightly slower copies, which begin with a few extra additions: how often is the difference detected? Without --samples,
a repetition times as many runs as `deploypipe bench`; a run's benchmark stage times 400. A pipeline needs its own
environment variables.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploypipe.benchmark import BenchResult, bench_file
from deploypipe.benchmark.bench_file import compare
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.numerics.intervals import interval_of_mean
from deploypipe.target import Target
from deploypipe.task import take_calib
from deploypipe.user_pipeline import load_pipeline

TARGET = Target(runtime="onnxruntime", name="one_thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--samples", type=int)
    parser.add_argument(
        "--extra", type=int, nargs="*", default=[6, 12], help="numbers of extra additions in the slower copies"
    )
    options = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for name in options.pipelines:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            loaded = load_pipeline(name)
            export_onnx(
                loaded.build_model().eval(), take_calib(loaded.load_data().calib, 8), path, loaded.recipe().export
            )
            show(name, "itself", repeat(path, path, options.repeats, options.samples))
            for count in options.extra:
                slower = Path(folder) / f"slower{count}.onnx"
                onnx.save(with_additions(onnx.load(path), count), slower)
                show(name, f"{count} more", repeat(slower, path, options.repeats, options.samples))


def repeat(path: Path, against: Path, repeats: int, num_samples: int | None) -> list[BenchResult]:
    return [bench_file(path, TARGET, against, parts=("latency",), num_samples=num_samples) for _ in range(repeats)]


HEADS = (
    "network",
    "p50, ms",
    "against",
    "runs of each",
    "no difference, of 100",
    "slower",
    "faster",
    "ratio, median",
    "interval, +- %",
    "others' processors",
    "verdicts",
)


def show(name: str, what: str, results: list[BenchResult]) -> None:
    ratios = [r.latency_ratio for r in results if r.latency_ratio]
    said = Counter(compare(ratio) for ratio in ratios)  # by the intervals alone, even if the machine was noisy
    share = interval_of_mean([float(compare(ratio) == "no difference") for ratio in ratios])
    latencies = [r.against.latency for r in results if r.against and r.against.latency]
    conditions = Counter(r.conditions.verdict for r in results)
    others = [r.conditions.other_cpus for r in results if r.conditions.other_cpus is not None]
    cells = (
        name,
        f"{np.median([latency.p50_ms.value for latency in latencies]):.3g}",
        what,
        str(len(latencies[0].samples_ms)),
        f"{100 * share.value:.3g} ({100 * share.low:.1f} to {100 * share.high:.1f})",
        str(said["slower"]),
        str(said["faster"]),
        f"{np.median([ratio.value for ratio in ratios]):.4f}",
        f"{np.median([50 * (ratio.high - ratio.low) for ratio in ratios]):.2f}",
        f"{np.mean(others):.2f} of {os.cpu_count()}" if others else f"? (load {os.getloadavg()[0]:.1f})",
        ", ".join(f"{count} {verdict}" for verdict, count in conditions.items()),
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def with_additions(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """The same network after `count` additions of a tiny number to its first input, which no optimizer merges."""
    graph = model.graph
    old = graph.input[0].name
    ranks = len(graph.input[0].type.tensor_type.shape.dim)
    names = [old, *(f"slower_{i}" for i in range(count))]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = names[-1]
    for i in range(count):
        value = np.full([1] * ranks, 1e-9 * (i + 1), dtype=np.float32)
        graph.initializer.append(numpy_helper.from_array(value, f"slower_value_{i}"))
        graph.node.insert(i, helper.make_node("Add", [names[i], f"slower_value_{i}"], [names[i + 1]]))
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    return model


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    print(f"\n{time.monotonic() - begun:.0f} s")
