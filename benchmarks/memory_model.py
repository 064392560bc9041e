"""How well is the peak memory of pruned networks predicted from three that were measured?

    python benchmarks/memory_model.py resnet56_cifar10 [--batch-sizes 1 16]

needs the environment variables of the pipeline (CIFAR10_DIR, RESNET56_WEIGHTS, ...). The dense network, six of uniform
widths and two that lack blocks are exported, and each is measured twice, as `measure_peak_memory` does it. Models are
fitted to the dense file alone, to it and the half-width one, and to these and one more (the narrowest, or one that
lacks blocks); each predicts the others. Which channels go does not matter: the last ones. Prints Markdown: the error in
percent, Spearman's rank correlation, how many files lie in the 95 % interval, and the noise: how far two measurements
of one file are apart.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from judging import Subject
from scipy.stats import spearmanr

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.records import ScoreTable
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.search.allocation.solver import uniform
from deploypipe.search.cost_models.memory_model import fit_memory
from deploypipe.search.cost_models.onnx_memory_plan import Footprint, footprint
from deploypipe.target import Target
from deploypipe.task import Batch
from deploypipe.user_pipeline import load_pipeline

WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
FITTED_TO = (("dense",), ("dense", "0.5"), ("dense", "0.5", "0.25"), ("dense", "0.5", "third"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(load_pipeline(options.pipeline), keep=())
    with TemporaryDirectory() as folder:
        files = export_all(subject, Path(folder))
        for batch_size in options.batch_sizes:
            print(f"\n### {options.pipeline}, batch {batch_size}\n")
            show(files, subject.calib, batch_size)


def export_all(subject: Subject, folder: Path) -> dict[str, Path]:
    structures = subject.structures
    table = ScoreTable(scorer="first", channels={g.name: tuple(range(g.num_units, 0, -1)) for g in structures.groups})
    blocks = [block.name for block in structures.blocks]
    wanted: dict[str, tuple[float, Sequence[str]]] = {"dense": (1.0, ()), **{f"{w:g}": (w, ()) for w in WIDTHS}}
    wanted |= {"third": (1.0, blocks[::3]), "half": (0.75, blocks[1::2])}  # of the blocks removed
    files = {}
    for name, (width, removed) in wanted.items():
        plan = make_plan(structures, table, uniform(structures, width, 1).widths, removed)
        files[name] = folder / f"{name}.onnx"
        batch = [(inputs[:8], target[:8]) for inputs, target in subject.calib[:1]]
        export_onnx(apply_plan(subject.dense, plan), batch, files[name], subject.recipe.export)
    return files


def show(files: Mapping[str, Path], calib: list[Batch], batch_size: int) -> None:
    started = time.perf_counter()
    held = {name: footprint(path, batch_size) for name, path in files.items()}
    milliseconds = 1e3 * (time.perf_counter() - started) / len(files)
    measured = {name: measure_twice(path, calib, batch_size) for name, path in files.items()}
    peaks = {name: (first + second) / 2 for name, (first, second) in measured.items()}
    noise = [200 * abs(a - b) / (a + b) for a, b in measured.values()]
    print("| file | weights, MiB | activations, MiB | peak, MiB | again |\n|---|---|---|---|---|")
    for name, held_by in held.items():
        weights, activations = held_by.weight_bytes / 2**20, held_by.activation_bytes / 2**20
        print(f"| {name} | {weights:.2f} | {activations:.2f} | {measured[name][0]:.2f} | {measured[name][1]:.2f} |")
    print(f"\n{milliseconds:.0f} ms a file; noise {np.mean(noise):.1f} % (at most {max(noise):.1f})\n")
    print("| fitted to | base | a | b | mean error, % | largest, % | Spearman | in the interval |\n" + "|---" * 8 + "|")
    for names in FITTED_TO:
        print(judge(names, held, peaks), flush=True)


def measure_twice(path: Path, calib: list[Batch], batch_size: int) -> tuple[float, float]:
    target = Target(runtime="onnxruntime", batch_size=batch_size)
    with OnnxRuntime().open(path, num_threads=1) as session:
        inputs = first_batch(calib, session.input_names, batch_size)
    first, second = (measure_peak_memory(path, inputs, target) for _ in range(2))
    if first[0] is None or second[0] is None:
        raise SystemExit(first[1])
    return first[0], second[0]


def judge(names: Sequence[str], held: Mapping[str, Footprint], peaks: Mapping[str, float]) -> str:
    model = fit_memory([held[name] for name in names], [peaks[name] for name in names])
    others = [name for name in held if name not in names]
    predicted = [model.predict(held[name]) for name in others]
    seen = np.array([peaks[name] for name in others])
    errors = 100 * np.abs(np.array([p.value for p in predicted]) / seen - 1)
    rank = spearmanr([p.value for p in predicted], seen).statistic
    inside = sum(p.low <= peak <= p.high for p, peak in zip(predicted, seen, strict=True))
    cells = [", ".join(names), *(f"{v:.2f}" for v in (model.base_mib, model.per_weight, model.per_activation))]
    cells += [f"{errors.mean():.1f}", f"{errors.max():.1f}", f"{rank:.2f}", f"{inside} of {len(others)}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
