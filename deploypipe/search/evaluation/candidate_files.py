"""Files of candidates, in the precision that is to ship, and how long they take beside the dense network's."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from torch import nn

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import find_doubts, time_interleaved
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.errors import ModelError
from deploypipe.export.graph_slicing.resize_graph import UnfitError
from deploypipe.export.graph_slicing.sliced_files import slice_file
from deploypipe.export.graph_slicing.template import Template, open_template
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.fp16 import to_fp16
from deploypipe.export.quantization.int8 import quantize_for_timing
from deploypipe.export.tensorrt_engine.build_engine import runnable
from deploypipe.files.hashing import digest
from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.recipe import Export
from deploypipe.records import PrecisionRow, PruningPlan
from deploypipe.runtimes import Array, find_runtime
from deploypipe.runtimes.int8_arithmetic import kernels_of
from deploypipe.runtimes.named_arrays import feed
from deploypipe.search.cost_models.memory_model import fit_memory
from deploypipe.search.cost_models.onnx_memory_plan import Footprint, footprint
from deploypipe.search.evaluation.latency_store import Known, LocalLatencyStore, Measuring
from deploypipe.target import Target
from deploypipe.task import Batch, take_calib

NUM_LATENCY_SAMPLES = 200  # of one candidate
_NUM_CHECKED = 2  # samples that a file is compared with its network on
_TELLING = 0.1  # width of a latency's interval, relative: what other work on the machine blurs is not for later runs
_MIN_MEASURED = 3  # peaks, before others are predicted
_NUM_RANGED = 16  # samples that ranges of 8 bits are taken from: the times do not hang on them


@dataclass(kw_only=True)
class CandidateFiles:
    """For one dense network and one target."""

    dense: nn.Module
    dense_onnx: Path
    dense_opened: Path  # what the runtime opens: the ONNX file, or an engine built from it
    template: Path  # may be absent: then every candidate is exported
    precision: PrecisionRow  # of the dense network's file; its layers left in float stay so
    calib: Sequence[Batch]
    target: Target
    builds_engines: bool  # they are what the device runs, and this machine can build them
    export: Export
    measuring: Measuring = field(default_factory=LocalLatencyStore)
    ratios: dict[str, Known] = field(default_factory=dict)  # by shape and device: latencies known so far
    measured: list[tuple[Footprint, float]] = field(default_factory=list)  # files of candidates, and their peaks in MiB
    exported: Counter[str] = field(default_factory=Counter)  # why files could not be cut out of the dense one

    def write(self, pruned: nn.Module, plan: PruningPlan, path: Path) -> Path:
        """The file of a network that `plan` made, whatever its weights are by now."""
        plain = path.with_suffix(".fp32.onnx")
        batches = take_calib(self.calib, _NUM_CHECKED)
        if self._template:
            file = slice_file(self._template, self.dense, pruned, plan, batches, plain, self.export)
            if file.reason:
                self.exported[file.reason] += 1
        else:
            export_onnx(pruned, batches, plain, self.export)
        self._convert(plain, path)
        return path

    def size_mib(self, path: Path) -> float:
        """Of what the runtime opens."""
        return self._opened(path).stat().st_size / 2**20

    def peak_memory_mib(self, path: Path, limit_mib: float) -> float | None:
        """Predicted once a few files were measured, and it is plain on which side of the limit the file lies; measured
        otherwise, in processes of its own, which takes seconds."""
        known = self._footprint(path)
        if known and len(self.measured) >= _MIN_MEASURED and not self.measuring.is_shared:  # workers' would differ
            predicted = fit_memory([f for f, _ in self.measured], [mib for _, mib in self.measured]).predict(known)
            if not predicted.low <= limit_mib <= predicted.high:
                return predicted.value
        opened = self._opened(path)
        peak, _ = measure_peak_memory(opened, self._feed(opened), self.target)
        if known and peak is not None:
            self.measured.append((known, peak))
        return peak

    def least_peak_memory_mib(self, plans: Sequence[PruningPlan], work: Path) -> float | None:
        """Of the plans' networks, whose weights do not matter to it; None where none can be measured."""
        peaks = []
        for plan in plans:
            with self._unrepaired(plan, work) as file:
                opened = self._opened(file)
                peaks.append(measure_peak_memory(opened, self._feed(opened), self.target)[0])
        return min((peak for peak in peaks if peak is not None), default=None)

    def latency_ratios(self, paths: Sequence[Path], num_samples: int) -> list[float]:
        """Of each file's latency to that of the dense fp32 file, all interleaved so that a drifting clock cancels. What
        was measured once for a shape and device is not measured again; later runs find it if it was told well."""
        keys = [self._key(path) for path in paths]
        missing = {key: self._opened(path) for key, path in zip(keys, paths, strict=True) if not self._is_known(key)}
        if missing:
            with self.measuring.alone() as was_alone:
                still = {key: file for key, file in missing.items() if not self._is_known(key)}  # others measure too
                self._measure(still, num_samples, was_alone)
        return [self.ratios[key].ratio for key in keys]

    def measured_by(self, path: Path) -> str:
        """Who took the latency of a file, when and in what state of the machine; "" where nobody else could have."""
        return self.ratios[self._key(path)].told

    def ratio_of(self, plan: PruningPlan, work: Path) -> float:
        """The latency of a plan's network, which does not hang on its weights, as in `latency_ratios`."""
        with self._unrepaired(plan, work) as file:
            return self.latency_ratios([file], NUM_LATENCY_SAMPLES)[0]

    def ratio_anew(self, plan: PruningPlan, work: Path) -> float:
        """The upper end of its interval, whatever is known of it, from as many runs as the target asks for."""
        with self._unrepaired(plan, work) as file:
            files, runtime = (self._opened(file), self.dense_opened), find_runtime(self.target)
            with self.measuring.alone():
                timings = time_interleaved(files, self._feed(self.dense_opened), runtime, self.target)
        return interval_of_median_ratio(*timings.samples, block=timings.block).high

    def _is_known(self, key: str) -> bool:
        if key not in self.ratios:
            found = self.measuring.known(key)
            self.ratios |= {key: found} if found else {}
        return key in self.ratios

    def _measure(self, files: Mapping[str, Path], num_samples: int, was_alone: Callable[[], bool]) -> None:
        if not files:
            return
        paths, runtime = [self.dense_opened, *files.values()], find_runtime(self.target)
        inputs = self._feed(self.dense_opened)
        timings = time_interleaved(paths, inputs, runtime, self.target, num_samples=num_samples)
        while not was_alone():
            timings = time_interleaved(paths, inputs, runtime, self.target, num_samples=num_samples)
        is_steady = not find_doubts(timings, [path.name for path in paths], self.target.num_threads)
        for key, times in zip(files, timings.samples[1:], strict=True):
            ratio = interval_of_median_ratio(times, timings.samples[0], block=timings.block)
            is_telling = is_steady and ratio.high - ratio.low <= _TELLING * ratio.value
            self.ratios[key] = self.measuring.publish(key, ratio.value, is_telling=is_telling)

    @contextmanager
    def _unrepaired(self, plan: PruningPlan, work: Path) -> Iterator[Path]:
        with TemporaryDirectory(dir=work, prefix=".timed.") as folder:
            yield self.write(apply_plan(self.dense, plan), plan, Path(folder) / "candidate.onnx")

    @cached_property
    def _template(self) -> Template | None:
        if not self.template.is_file():
            return None
        names = [value.name for value in onnx.load(self.template).graph.input]
        try:
            return open_template(self.template, self.dense, feed(take_calib(self.calib, _NUM_CHECKED)[0][0], names))
        except UnfitError as error:
            self.exported[str(error)] += 1
            return None

    def _convert(self, plain: Path, path: Path) -> None:
        if self.precision.precision == "int8":
            kept = [row.layer for row in self.precision.conversion.kept_float] if self.precision.conversion else []
            quantize_for_timing(plain, path, take_calib(self.calib, _NUM_RANGED), kernels_of(self.target), kept)
        elif self.precision.precision == "fp16":
            to_fp16(plain, path, take_calib(self.calib, _NUM_RANGED), self.export)
        else:
            plain.replace(path)

    def _footprint(self, path: Path) -> Footprint | None:
        """None where it cannot be told from the file, as that of an engine."""
        if self.builds_engines:
            return None
        try:
            return footprint(path, self.target.batch_size)
        except ModelError:  # an axis that only the samples bind, or a graph within the graph
            return None

    def _opened(self, path: Path) -> Path:
        return runnable(path, self.target) if self.builds_engines else path

    def _key(self, path: Path) -> str:
        device = describe_environment(self.target.num_threads).device_fingerprint
        target = self.target
        made_with = [target.runtime, target.provider, target.provider_options, target.batch_size, target.batches]
        return digest([device, made_with, shape_signature(self.dense_onnx), shape_signature(path)])

    def _feed(self, file: Path) -> dict[str, Array]:
        with find_runtime(self.target).open(file, num_threads=1) as session:
            return first_batch(self.calib, session.input_names, self.target.batch_size)


def shape_signature(path: Path) -> str:
    """What decides a file's latency: operators, attributes, edges and weight shapes, but not the weights' values."""
    graph = onnx.load(path).graph
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.INT64:  # those are shapes and axes
            for name in ("raw_data", "float_data", "int32_data"):
                initializer.ClearField(name)
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:16]
