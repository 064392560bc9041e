"""Write files of candidates in the precision that ships, and measure their latency and peak memory."""

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
from deploypipe.errors import DeploypipeError
from deploypipe.export.graph_slicing.resize_graph import UnfitError
from deploypipe.export.graph_slicing.sliced_files import slice_file, slice_or_raise
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
from deploypipe.search.evaluation.latency_store import KnownLatency, LatencyStore, LocalLatencyStore
from deploypipe.target import Target
from deploypipe.task import Batch, take_calib
from deploypipe.untrusted_files.onnx_file_check import size_with_data

NUM_LATENCY_SAMPLES = 200  # of one candidate
_NUM_CHECKED = 2  # samples that a file is compared with its network on
_MAX_INTERVAL_WIDTH = 0.1  # of a latency ratio, relative; later runs do not use a ratio that is less certain
_NUM_RANGED = 16  # samples that 8-bit ranges are taken from: the latency does not depend on them


@dataclass(kw_only=True)
class CandidateFiles:
    """Candidate files for one dense network and one target."""

    dense: nn.Module
    dense_onnx: Path
    dense_opened: Path  # what the runtime opens: the ONNX file, or an engine built from it
    template: Path  # if the file is absent, every candidate is exported
    precision: PrecisionRow  # of the dense network's file; layers that it left in float stay in float
    calib: Sequence[Batch]
    target: Target
    timed_on: Sequence[Batch] = ()  # its first batch; (): that of `calib`
    builds_engines: bool  # the device runs engines, and this machine can build them
    export: Export
    latency_store: LatencyStore = field(default_factory=LocalLatencyStore)
    ratios: dict[str, KnownLatency] = field(default_factory=dict)  # by shape and device
    exported: Counter[str] = field(default_factory=Counter)  # why candidates were exported, not cut from the template

    def write(self, pruned: nn.Module, plan: PruningPlan, path: Path) -> Path:
        """Write the file of `pruned`, which `plan` made of the dense network, whatever its weights are now."""
        plain = _in_fp32(path)
        batches = take_calib(self.calib, _NUM_CHECKED)
        if self._template:
            file = slice_file(self._template, self.dense, pruned, plan, batches, plain, self.export)
            if file.reason:
                self.exported[file.reason] += 1
        else:
            export_onnx(pruned, batches, plain, self.export)
        self._convert(plain, path)
        return path

    def fp32_of(self, path: Path) -> Path:
        """The file in fp32 that `write` left, of the same weights as `path`."""
        return path if self.precision.precision == "fp32" else _in_fp32(path)

    def slice_fp32(self, pruned: nn.Module, plan: PruningPlan, path: Path) -> str:
        """Write the file of `pruned` in fp32, from the template. Return "", or why that is not possible."""
        if self._template is None:
            return "the dense network has no template to cut files from"
        batches = take_calib(self.calib, _NUM_CHECKED)
        try:
            slice_or_raise(self._template, self.dense, pruned, plan, batches, path, self.export)
        except (UnfitError, DeploypipeError) as error:
            return str(error)
        return ""

    def size_mib(self, path: Path) -> float:
        """Size of what the runtime opens."""
        return size_with_data(self._opened(path)) / 2**20

    def peak_memory_mib(self, path: Path) -> float | None:
        """Measure the peak memory in processes of its own, which takes seconds; None if this machine cannot."""
        opened = self._opened(path)
        return measure_peak_memory(opened, self._feed(opened), self.target)[0]

    def least_peak_memory_mib(self, plans: Sequence[PruningPlan], work: Path) -> float | None:
        """Measure the smallest peak memory of the plans' networks, which does not depend on the weights' values.

        None if none can be measured.
        """
        peaks = []
        for plan in plans:
            with self._unrepaired(plan, work) as file:
                peaks.append(self.peak_memory_mib(file))
        return min((peak for peak in peaks if peak is not None), default=None)

    def latency_ratios(self, paths: Sequence[Path], num_samples: int) -> list[float]:
        """Return each file's latency, as a share of the dense fp32 file's.

        All files are timed interleaved, so that a drifting clock cancels. A shape is timed once on a device: later
        calls reuse the ratio, and later runs too if its interval was narrow.
        """
        keys = [self._key(path) for path in paths]
        missing = {key: self._opened(path) for key, path in zip(keys, paths, strict=True) if not self._is_known(key)}
        if missing:
            with self.latency_store.exclusive() as was_alone:
                still = {key: file for key, file in missing.items() if not self._is_known(key)}  # others measure too
                self._measure(still, num_samples, was_alone)
        return [self.ratios[key].ratio for key in keys]

    def measured_by(self, path: Path) -> str:
        """The process that timed a file, when, and the machine's state; "" if no other process could have done it."""
        return self.ratios[self._key(path)].measured_by

    def ratio_of(self, plan: PruningPlan, work: Path) -> float:
        """The latency of a plan's network as in `latency_ratios`. It does not depend on the weights' values."""
        with self._unrepaired(plan, work) as file:
            return self.latency_ratios([file], NUM_LATENCY_SAMPLES)[0]

    def time_again(self, plan: PruningPlan, work: Path) -> float:
        """Time a plan's network again, with as many runs as the target asks for. Return its ratio's upper end."""
        with self._unrepaired(plan, work) as file:
            files, runtime = (self._opened(file), self.dense_opened), find_runtime(self.target)
            with self.latency_store.exclusive():
                timings = time_interleaved(files, self._feed(self.dense_opened), runtime, self.target)
        return interval_of_median_ratio(*timings.samples, block=timings.block).high

    def _is_known(self, key: str) -> bool:
        if key not in self.ratios:
            found = self.latency_store.find(key)
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
            is_precise = is_steady and ratio.high - ratio.low <= _MAX_INTERVAL_WIDTH * ratio.value
            self.ratios[key] = self.latency_store.publish(key, ratio.value, is_precise=is_precise)

    @contextmanager
    def _unrepaired(self, plan: PruningPlan, work: Path) -> Iterator[Path]:
        with TemporaryDirectory(dir=work, prefix=".timed.") as folder:
            yield self.write(apply_plan(self.dense, plan), plan, Path(folder) / "candidate.onnx")

    @cached_property
    def _template(self) -> Template | None:
        if not self.template.is_file():
            return None
        names = [value.name for value in onnx.load(self.template, load_external_data=False).graph.input]
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

    def _opened(self, path: Path) -> Path:
        return runnable(path, self.target) if self.builds_engines else path

    def _key(self, path: Path) -> str:
        device = describe_environment(self.target.num_threads).device_fingerprint
        target = self.target
        made_with = [target.runtime, target.provider, target.provider_options, target.batch_size, target.batches]
        made_with += [target.cuda_graph] if target.cuda_graph else []  # keys of other targets stay
        return digest([device, made_with, shape_signature(self.dense_onnx), shape_signature(path)])

    def _feed(self, file: Path) -> dict[str, Array]:
        with find_runtime(self.target).open(file, num_threads=1) as session:
            return first_batch(self.timed_on or self.calib, session.input_names, self.target.batch_size)


def _in_fp32(path: Path) -> Path:
    return path.with_suffix(".fp32.onnx")


def shape_signature(path: Path) -> str:
    """Digest of what decides a file's latency: operators, attributes, edges and weight shapes, not weights' values."""
    graph = onnx.load(path, load_external_data=False).graph
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.INT64:  # those are shapes and axes
            for name in ("raw_data", "float_data", "int32_data", "external_data", "data_location"):
                initializer.ClearField(name)
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:16]
