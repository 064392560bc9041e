"""What a search is told of one plan: surgery, repair, accuracy on val, the exported file on the target's runtime."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from torch import nn

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import time_interleaved
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.export.engine import runnable
from deploypipe.export.onnx_file import export_onnx
from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.pruning.apply import apply_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.structures import count_macs
from deploypipe.recipe import Recipe
from deploypipe.records import Candidate, PruningPlan
from deploypipe.runs import cache_folder, digest, write_atomically
from deploypipe.runtimes import Array, find_runtime
from deploypipe.search.looks import Results, evaluate_growing
from deploypipe.search.trials import IsSettled
from deploypipe.target import Target
from deploypipe.task import Batch, Task, take, take_calib

_NUM_LATENCY_SAMPLES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """An `Evaluate` for `search`: call it with a plan."""

    dense: nn.Module
    dense_onnx: Path
    dense_file: Path  # what the runtime opens: the ONNX file, or an engine built from it
    dense_p50_ms: float | None  # None: the target cannot be measured here, and no candidate is
    builds_engines: bool  # they are what the device runs, and this machine can build them
    calib: list[Batch]
    parts: Sequence[Sequence[Batch]]  # of val, as `draw_parts` drew them
    task: Task
    recipe: Recipe
    target: Target
    work: Path

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]:
        pruned = apply_plan(self.dense, plan)
        num_params, num_macs = count_macs(pruned, take(self.calib[0][0], 2))
        quick = replace(self.recipe.repair, num_samples=self.recipe.search.num_repair_samples)
        real_tokens, seed = self.task.real_tokens, self.recipe.seed
        network, _ = repair(self.dense, pruned, plan, self.calib, quick, real_tokens=real_tokens, seed=seed)
        with TemporaryDirectory(dir=self.work, prefix=".candidate.") as folder:
            file = Path(folder) / "candidate.onnx"
            size = export_onnx(network, take_calib(self.calib, 2), file, self.recipe.export).size_bytes
            if self.builds_engines:
                size = runnable(file, self.target).stat().st_size
            costs = Candidate(
                accuracy=0.0,
                latency_p50_ms=None if self.dense_p50_ms is None else self.dense_p50_ms * self._latency_ratio(file),
                peak_memory_mib=None if self.dense_p50_ms is None else self._peak_memory(file),
                file_size_mib=size / 2**20,
                num_params=num_params,
                num_macs=num_macs,
            )

        def with_accuracy(seen: Results) -> Candidate:
            return replace(costs, accuracy=float(seen.mean()))

        seen = evaluate_growing(network, self.parts, self.task, lambda seen: is_settled(with_accuracy(seen), seen))
        return with_accuracy(seen), seen

    def _latency_ratio(self, file: Path) -> float:
        """Candidate / dense, interleaved so that a drifting clock cancels; measured once for a shape and device."""
        device = describe_environment(self.target.num_threads).device_fingerprint
        target = replace(self.target, num_latency_samples=_NUM_LATENCY_SAMPLES)
        made_with = [target.runtime, target.provider, target.provider_options, target.batch_size, target.batches]
        key = digest([device, made_with, shape_signature(self.dense_onnx), shape_signature(file)])
        known = cache_folder() / "latency" / key
        if known.is_file():
            return float(known.read_text())
        runtime, opened = find_runtime(target), runnable(file, target)
        timings = time_interleaved((opened, self.dense_file), self._feed(opened), runtime, target)
        ratio = interval_of_median_ratio(*timings.samples, block=timings.block)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, repr(ratio.value).encode())
        return ratio.value

    def _peak_memory(self, file: Path) -> float | None:
        if "peak_memory" not in (*self.target.budget.limits(), *self.recipe.search.objectives):
            return None
        opened = runnable(file, self.target)
        return measure_peak_memory(opened, self._feed(opened), self.target)[0]

    def _feed(self, file: Path) -> dict[str, Array]:
        with find_runtime(self.target).open(file, num_threads=1) as session:
            return first_batch(self.calib, session.input_names, self.target.batch_size)


def shape_signature(path: Path) -> str:
    """What decides a file's latency: operators, attributes, edges and weight shapes, but not the weights' values."""
    graph = onnx.load(path).graph
    for initializer in graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:  # integers are shapes and axes
            initializer.ClearField("raw_data")
            initializer.ClearField("float_data")
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:16]
