"""Convert an fp32 ONNX file to 8-bit integers, by the recipe of its runtime; within the limits of error, or not at all.

Errors measured on samples that were not used for calibration decide on layers, ranges and biases.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import onnx

from deploypipe.errors import ModelError, ParityError
from deploypipe.export.quantization.activation_ranges import Histogram, observe_tensors, ranges_by
from deploypipe.export.quantization.bias_correction import with_corrected_biases
from deploypipe.export.quantization.qdq import LAYERS, Recipe, channel_axes, find_recipe, quantise, why_not
from deploypipe.export.quantization.run_and_compare_graphs import (
    Feed,
    Outputs,
    compare_file,
    feeds_of,
    fewest,
    load_float,
    num_samples_of,
    opset_of,
    place,
    run_file,
    take_feeds,
    write,
)
from deploypipe.files.atomic import scratch_folder
from deploypipe.numerics.int8_range import ClippingMethod
from deploypipe.recipe import Export
from deploypipe.records import Calibration, Converted, FloatLayer, Parity
from deploypipe.runtimes.int8_arithmetic import Int8Kernels
from deploypipe.task import Batch

MeasureAccuracy: TypeAlias = Callable[[Path], float]
Name = TypeVar("Name", bound=str)
Compare: TypeAlias = Callable[[Path, Sequence[Feed], Outputs], Parity]
Quantise: TypeAlias = Callable[[Sequence[str]], onnx.ModelProto]  # layers in 8 bits -> the graph

_MIN_OPSET = 13  # QuantizeLinear with a scale per channel
_ENOUGH_SAMPLES = 500  # for ranges; with fewer the record has a note
_NUM_HELD_OUT = 128  # samples that errors are measured on
_NUM_RANKED_ON = 32  # samples that one layer's error is measured on
_TINY = 1e-9


def to_int8(
    source: Path,
    out: Path,
    batches: Iterable[Batch],
    measure_accuracy: MeasureAccuracy | None,
    kernels: Int8Kernels,
    settings: Export,
) -> Converted:
    """Write `source`, an fp32 file, to `out` with convolutions and products in 8 bits, for `kernels`.

    Errors are measured with this machine's own 8-bit kernels, or in float between the roundings if these kernels
    compute something else than `kernels`. `measure_accuracy` must do the same.

    batches: the first `settings.int8.num_calib_samples` samples give the ranges. The next 128 measure errors (a quarter
    of all samples if there are fewer). `measure_accuracy(path)` returns a file's mean metric on other samples, higher =
    better; without it, errors alone decide.

    Every range method is tried. Methods within half of `max_drop_pp` of the best accuracy count as equal; the smallest
    error decides among them. If the limits of `settings` are still exceeded, layers return to float in the order of the
    error that each causes alone, as few as are needed. The same inputs give the same bytes.

    Raises ModelError for a file that is broken, of another precision, or without a layer for 8 bits; DataError for
    samples that do not fit it; ParityError where the limits cannot be held. Nothing is left at `out` then that was not
    there before.
    """
    started = time.perf_counter()
    recipe = find_recipe(kernels)
    proto = load_float(source)
    refused = {node.name: reason for node in proto.graph.node if (reason := why_not(node, proto))}
    layers = [node.name for node in proto.graph.node if node.op_type in LAYERS and node.name not in refused]
    _require_layers(proto, layers, refused, source)
    inputs, held_out = _split(feeds_of(batches, proto), settings.int8.num_calib_samples)
    expected = run_file(source, held_out)
    histograms = observe_tensors(proto, channel_axes(proto, layers, recipe), inputs, source)
    with scratch_folder(out) as scratch:
        compare = partial(compare_file, is_plain=kernels.are_emulated_here)
        trials = _Trials(scratch / out.name, held_out, expected, measure_accuracy, source, settings, compare)
        method, tried = _choose_method(proto, layers, histograms, recipe, trials)
        ranges = ranges_by(method, histograms)
        graph = proto
        if settings.int8.correct_biases:
            rounded = quantise(proto, layers, ranges, recipe)
            moved = with_corrected_biases(proto, rounded, layers, histograms)
            trial = trials.measure(quantise(moved, layers, ranges, recipe))
            if trials.best({"unchanged": tried[method], "corrected": trial}) == "corrected":
                graph = moved

        def build(chosen: Sequence[str]) -> onnx.ModelProto:
            return quantise(graph, chosen, ranges, recipe)

        kept = _find_sensitive(layers, build, trials)
        final = build([name for name in layers if name not in kept])
        seen = trials.measure(final)
        file = place(trials.path, out, final, "int8", seen.parity)
    count = num_samples_of(inputs)
    few = f"calibrated with {count} samples; ranges need at least {_ENOUGH_SAMPLES}: return more as `calib`"
    return Converted(
        file=file,
        num_layers=len(layers) + len(refused),
        num_converted=len(layers) - len(kept),
        kept_float=tuple(
            FloatLayer(layer=node.name, reason=reason)
            for node in proto.graph.node
            if (reason := kept.get(node.name, refused.get(node.name, "")))
        ),
        runtime=kernels.runtime,
        int8_arithmetic="any" if kernels.saturate else "exact",
        num_calib_samples=count,
        method=method,
        calibrations=tuple(
            Calibration(method=name, mean_abs_error=trial.parity.mean_abs_error, accuracy=trial.accuracy)
            for name, trial in tried.items()
        ),
        is_bias_corrected=graph is not proto,
        accuracy_fp32=trials.accuracy_fp32,
        accuracy=seen.accuracy,
        seconds=time.perf_counter() - started,
        notes=(few,) if count < _ENOUGH_SAMPLES else (),
    )


def quantize_for_timing(
    source: Path, out: Path, batches: Iterable[Batch], kernels: Int8Kernels, kept_float: Collection[str]
) -> None:
    """Write an int8 file for timing only: fast, and its outputs are not checked.

    It runs as long as the file of `to_int8` with the layers `kept_float` in float. A search times many such files.
    Raises as `to_int8`.
    """
    recipe = find_recipe(kernels)
    proto = load_float(source)
    refused = {node.name for node in proto.graph.node if why_not(node, proto)}
    layers = [n.name for n in proto.graph.node if n.op_type in LAYERS and n.name not in refused | set(kept_float)]
    histograms = observe_tensors(proto, channel_axes(proto, layers, recipe), feeds_of(batches, proto), source)
    write(quantise(proto, layers, ranges_by("minmax", histograms), recipe), out, "int8")


def _require_layers(proto: onnx.ModelProto, layers: Sequence[str], refused: Mapping[str, str], source: Path) -> None:
    if opset_of(proto) < _MIN_OPSET:
        raise ModelError(
            f"{source}: opset {opset_of(proto)} has no 8-bit scales per channel; export it with export.opset = "
            f"{_MIN_OPSET} or more"
        )
    if not layers:
        reasons = "; ".join(sorted(set(refused.values()))) or f"it has no {', '.join(LAYERS)}"
        raise ModelError(f"{source}: no layer of it can be in 8 bits ({reasons}); use fp16 or fp32")


def _split(inputs: list[Feed], num_calib: int) -> tuple[list[Feed], list[Feed]]:
    """Samples to calibrate with, and others to measure errors on; the same one twice if there is only one."""
    total = num_samples_of(inputs)
    if total <= num_calib:
        num_calib = max(1, total - max(1, total // 4))
    held_out = take_feeds(inputs, _NUM_HELD_OUT, start=num_calib)
    return take_feeds(inputs, num_calib), held_out or take_feeds(inputs, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    parity: Parity
    accuracy: float | None

    @property
    def error(self) -> float:
        return self.parity.mean_abs_error if np.isfinite(self.parity.mean_abs_error) else np.inf


class _Trials:
    """Measures candidates, one after another, at one path."""

    def __init__(
        self,
        path: Path,
        held_out: list[Feed],
        expected: Outputs,
        measure_accuracy: MeasureAccuracy | None,
        source: Path,
        settings: Export,
        compare: Compare,
    ) -> None:
        self.path, self.held_out, self.expected = path, held_out, expected
        self.measure_accuracy, self.source = measure_accuracy, source
        self.settings, self.compare = settings, compare
        self.accuracy_fp32 = measure_accuracy(source) if measure_accuracy else None

    def measure(self, graph: onnx.ModelProto) -> _Seen:
        write(graph, self.path, "int8")
        parity = self.compare(self.path, self.held_out, self.expected)
        is_finite = bool(np.isfinite(parity.max_abs_error))  # the metric may refuse what is not
        accuracy = self.measure_accuracy(self.path) if self.measure_accuracy and is_finite else None
        return _Seen(parity=parity, accuracy=accuracy)

    def best(self, tried: Mapping[Name, _Seen]) -> Name:
        """The candidate of smallest error, among those whose accuracy equals the best one's within the noise."""
        accuracies = {name: -np.inf if seen.accuracy is None else seen.accuracy for name, seen in tried.items()}
        noise = self.settings.int8.max_drop_pp / 200
        good = [name for name in tried if accuracies[name] >= max(accuracies.values()) - noise]
        return min(good, key=lambda name: tried[name].error)

    def holds(self, seen: _Seen) -> bool:
        parity, settings = seen.parity, self.settings
        agreement = 1.0 if parity.top1_agreement is None else parity.top1_agreement
        if not parity.max_abs_error <= settings.max_abs_error_int8 or agreement < settings.min_agreement:
            return False
        if seen.accuracy is None or self.accuracy_fp32 is None:
            return True
        return 100 * (self.accuracy_fp32 - seen.accuracy) <= settings.int8.max_drop_pp + _TINY

    def error_alone(self, graph: onnx.ModelProto) -> float:
        """The mean error of a graph's outputs on a few samples."""
        write(graph, self.path, "int8")
        samples = take_feeds(self.held_out, _NUM_RANKED_ON)
        pairs = zip(samples, self.expected, strict=False)
        expected = [[array[: num_samples_of([batch])] for array in outputs] for batch, outputs in pairs]
        error = self.compare(self.path, samples, expected).mean_abs_error
        return error if np.isfinite(error) else np.inf


def _choose_method(
    proto: onnx.ModelProto,
    layers: Sequence[str],
    histograms: Mapping[str, Histogram],
    recipe: Recipe,
    trials: _Trials,
) -> tuple[ClippingMethod, dict[ClippingMethod, _Seen]]:
    """The best method to choose ranges, and the result of each, with all layers in 8 bits."""
    tried = {
        method: trials.measure(quantise(proto, layers, ranges_by(method, histograms), recipe))
        for method in trials.settings.int8.methods
    }
    return trials.best(tried), tried


def _find_sensitive(layers: Sequence[str], build: Quantise, trials: _Trials) -> dict[str, str]:
    """The layers that must stay float to meet the limits, with reasons; ParityError if all must."""
    everything = trials.measure(build(layers))
    if trials.holds(everything):
        return {}
    errors = {layer: trials.error_alone(build([layer])) for layer in layers}

    def holds(floats: frozenset[str]) -> bool:
        chosen = [layer for layer in layers if layer not in floats]
        return bool(chosen) and trials.holds(trials.measure(build(chosen)))

    kept = fewest(sorted(layers, key=lambda layer: -errors[layer]), holds)
    if len(kept) == len(layers):
        raise ParityError(_missed(everything, trials))
    return {layer: f"mean error of the outputs {errors[layer]:.3g} with it alone in 8 bits" for layer in kept}


def _missed(seen: _Seen, trials: _Trials) -> str:
    settings, drop = trials.settings, ""
    if seen.accuracy is not None and trials.accuracy_fp32 is not None:
        drop = f" and the metric {100 * (trials.accuracy_fp32 - seen.accuracy):.2f} pp lower"
    return (
        f"{trials.source}: no layer of it can be in 8 bits within the limits; with all of them the largest error is "
        f"{seen.parity.max_abs_error:.3g}{drop}, and the limits are {settings.max_abs_error_int8:.3g} and "
        f"{settings.int8.max_drop_pp:g} pp; use fp16 or fp32, or raise export.max_abs_error_int8 or "
        "export.int8.max_drop_pp"
    )
