"""An fp32 ONNX file to 8-bit integers, by the recipe that the runtime it is for wants, as good as is asked or not at all.

Static QuantizeLinear/DequantizeLinear pairs, written by onnxruntime's quantiser; which layers, which ranges and which
biases are chosen here, by what they measure on samples that were not calibrated with.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from deploypipe.errors import ModelError, ParityError
from deploypipe.export.calibration import Histogram, Range, observe_tensors, ranges_by
from deploypipe.export.precision import (
    FLOAT,
    Feed,
    Outputs,
    compare_file,
    copy_of,
    feeds_of,
    fewest,
    load_float,
    num_samples_of,
    opset_of,
    place,
    run_file,
    scratch_beside,
    subgraphs,
    take_feeds,
    types_of,
    write,
)
from deploypipe.recipe import Export
from deploypipe.records import Calibration, Converted, FloatLayer, Parity
from deploypipe.task import Batch

Judge: TypeAlias = Callable[[Path], float]

_LEAST_OPSET = 13  # per-channel QuantizeLinear
_ENOUGH_SAMPLES = 500  # for ranges; with fewer a note says so
_NUM_HELD_OUT = 128  # samples that errors are measured on
_NUM_RANKED_ON = 32  # samples that one layer's error is measured on
_LAYERS = ("Conv", "Gemm", "MatMul")
_DEQUANTISED = "_DequantizeLinear_Output"  # onnxruntime's suffixes
_QUANTISED, _SCALE = "_quantized", "_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What one runtime turns into integer kernels. Weights are signed, symmetric, with one scale per output channel."""

    is_symmetric: bool  # activations: signed with zero point 0; else unsigned with any zero point
    has_integer_bias: bool
    rounds_outputs_of: tuple[str, ...]  # layers whose outputs are 8 bits too, whoever reads them
    followers: tuple[str, ...]  # run in 8 bits where all they read is held so
    leaves_others: bool  # whether readers that are not in 8 bits get the float tensor, where there is one


# onnxruntime: measured on an AVX-512 VNNI CPU (EPYC), one thread, against fp32. Conv needs its output in 8 bits for an
# integer kernel; products (Gemm, MatMul) run faster without (ViT 0.97 to 0.88 at batch 1, SST-2 encoder 0.79 to 0.78),
# and products of two activations slower than in float (ViT 2.8 at batch 1). The followers bring ResNet-56 from 0.53 to
# 0.43. Symmetric activations have no fast kernel there: ResNet-56 1.5, a ViT 3.2.
# TensorRT: symmetric only, biases float, and pairs before layers only, so that it can fuse what follows one; all
# readers of a tensor get the rounded one, as an Add that shall be fused with the Conv before it must (NVIDIA, "Working
# with Quantized Types").
_TENSORRT = Recipe(
    is_symmetric=True, has_integer_bias=False, rounds_outputs_of=(), followers=(), leaves_others=False
)
RECIPES: dict[str, Recipe] = {
    "onnxruntime": Recipe(
        is_symmetric=False,
        has_integer_bias=True,
        rounds_outputs_of=("Conv",),
        followers=(
            *("Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Pad", "Slice"),
            *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
        ),
        leaves_others=True,
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}


def to_int8(
    source: Path,
    out: Path,
    batches: Iterable[Batch],
    judge: Judge | None,
    runtime: str,
    settings: Export,
) -> Converted:
    """Write `source`, an fp32 file, to `out` with convolutions and products in 8 bits, for `runtime`.

    `batches`: the first `settings.int8.num_calib_samples` samples give the ranges, the 128 after them (or a quarter of
    all, where there are not so many) measure errors. `judge(path)` is a file's mean metric, higher better, on yet
    others. Without one, errors alone decide. Of the methods, the one with the best accuracy is taken (of equals, the
    one of least error). If the file is then worse than the limits of `settings` allow, layers go back to float in order
    of the error each causes alone, the fewest that do. The same inputs give the same bytes.

    Raises ModelError for a file that is broken, of another precision, or without a layer for 8 bits; DataError for
    samples that do not fit it; ParityError where the limits cannot be met. Nothing is left at `out` then that was not
    there before.
    """
    started = time.perf_counter()
    recipe = _find_recipe(runtime)
    proto = load_float(source)
    _require_opset(proto, source)
    why_not = {node.name: reason for node in proto.graph.node if (reason := _why_not(node, proto))}
    layers = [n.name for n in proto.graph.node if n.op_type in _LAYERS and n.name not in why_not]
    if not layers:
        reasons = "; ".join(sorted(set(why_not.values()))) or f"it has no {', '.join(_LAYERS)}"
        raise ModelError(f"{source}: no layer of it can be in 8 bits ({reasons}); use fp16 or fp32")
    inputs, held_out = _split(feeds_of(batches, proto), settings.int8.num_calib_samples)
    expected = run_file(source, held_out)
    histograms = observe_tensors(proto, _channel_axes(proto, _chosen(proto, layers, recipe)), inputs, source)
    with scratch_beside(out) as scratch:
        bench = _Bench(scratch / out.name, held_out, expected, judge, source, settings)
        tried = {}
        for method in settings.int8.methods:
            graph = _quantise(proto, layers, ranges_by(method, histograms), recipe)
            tried[method] = bench.measure(graph)
        method = max(tried, key=lambda name: tried[name].rank)
        ranges = ranges_by(method, histograms)
        chosen, best, is_corrected = proto, tried[method], False
        if settings.int8.correct_biases:
            moved = _with_corrected_biases(proto, _quantise(proto, layers, ranges, recipe), layers, histograms)
            corrected = bench.measure(_quantise(moved, layers, ranges, recipe))
            if corrected.rank > best.rank:
                chosen, best, is_corrected = moved, corrected, True
        kept: frozenset[str] = frozenset()
        errors: dict[str, float] = {}
        if not bench.holds(best):
            errors = bench.errors_alone(layers, lambda alone: _quantise(chosen, alone, ranges, recipe))
            order = sorted(layers, key=lambda name: -errors[name])
            kept = fewest(
                order,
                lambda floats: bench.holds(bench.measure(_quantise(chosen, _without(layers, floats), ranges, recipe))),
            )
        if len(kept) == len(layers):
            raise ParityError(_missed(source, best, bench, settings))
        final = _quantise(chosen, _without(layers, kept), ranges, recipe)
        best = bench.measure(final)
        file = place(bench.path, out, final, "int8", best.parity)
    reasons_kept = {name: f"mean error {errors[name]:.3g} of the outputs when it alone is in 8 bits" for name in kept}
    count = num_samples_of(inputs)
    few = f"calibrated with {count} samples; ranges want {_ENOUGH_SAMPLES} or more: give more as `calib`"
    return Converted(
        file=file,
        num_layers=len(layers) + len(why_not),
        num_converted=len(layers) - len(kept),
        kept_float=tuple(
            FloatLayer(layer=node.name, reason=reason)
            for node in proto.graph.node
            if (reason := reasons_kept.get(node.name) or why_not.get(node.name))
        ),
        runtime=runtime,
        num_calib_samples=count,
        method=method,
        calibrations=tuple(
            Calibration(method=name, mean_abs_error=seen.parity.mean_abs_error, accuracy=seen.accuracy)
            for name, seen in tried.items()
        ),
        is_bias_corrected=is_corrected,
        accuracy_fp32=bench.accuracy_fp32,
        accuracy=best.accuracy,
        seconds=time.perf_counter() - started,
        notes=(few,) if count < _ENOUGH_SAMPLES else (),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    parity: Parity
    accuracy: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the accuracy, then the smaller error; what is not finite comes last."""
        error = self.parity.mean_abs_error
        return self.accuracy or 0.0, -error if np.isfinite(error) else -np.inf


class _Bench:
    """Where candidates are measured, one after another in one file."""

    def __init__(
        self, path: Path, held_out: list[Feed], expected: Outputs, judge: Judge | None, source: Path, settings: Export
    ) -> None:
        self.path, self.held_out, self.expected, self.judge, self.settings = path, held_out, expected, judge, settings
        self.accuracy_fp32 = judge(source) if judge else None

    def measure(self, graph: onnx.ModelProto) -> _Seen:
        write(graph, self.path, "int8")
        parity = compare_file(self.path, self.held_out, self.expected)
        is_finite = bool(np.isfinite(parity.max_abs_error))  # a judge may refuse what is not
        return _Seen(parity=parity, accuracy=self.judge(self.path) if self.judge and is_finite else None)

    def holds(self, seen: _Seen) -> bool:
        parity, settings = seen.parity, self.settings
        agreement = 1.0 if parity.top1_agreement is None else parity.top1_agreement
        if not parity.max_abs_error <= settings.max_abs_error_int8 or agreement < settings.min_agreement:
            return False
        if seen.accuracy is None or self.accuracy_fp32 is None:
            return True
        return 100 * (self.accuracy_fp32 - seen.accuracy) <= settings.int8.max_drop_pp + 1e-9

    def errors_alone(
        self, layers: Sequence[str], quantise: Callable[[Sequence[str]], onnx.ModelProto]
    ) -> dict[str, float]:
        """By layer: the mean error of the outputs with this one in 8 bits and all others in float."""
        samples = take_feeds(self.held_out, _NUM_RANKED_ON)
        expected = [
            [array[: num_samples_of([batch])] for array in outputs]
            for batch, outputs in zip(samples, self.expected, strict=False)
        ]
        errors = {}
        for layer in layers:
            write(quantise([layer]), self.path, "int8")
            error = compare_file(self.path, samples, expected).mean_abs_error
            errors[layer] = error if np.isfinite(error) else np.inf
        return errors


def _missed(source: Path, best: _Seen, bench: _Bench, settings: Export) -> str:
    drop = ""
    if best.accuracy is not None and bench.accuracy_fp32 is not None:
        drop = f", {100 * (bench.accuracy_fp32 - best.accuracy):.2f} pp below fp32 by the metric"
    return (
        f"{source}: not one layer of it can be in 8 bits within the limits; with all of them the largest error is "
        f"{best.parity.max_abs_error:.3g}{drop}, allowed are {settings.max_abs_error_int8:.3g} and "
        f"{settings.int8.max_drop_pp:g} pp; use fp16 or fp32, or raise export.max_abs_error_int8 or "
        "export.int8.max_drop_pp"
    )


def _find_recipe(runtime: str) -> Recipe:
    if runtime not in RECIPES:
        raise ModelError(f"there is no way to 8 bits for the runtime {runtime!r}; there is one for {', '.join(RECIPES)}")
    return RECIPES[runtime]


def _require_opset(proto: onnx.ModelProto, source: Path) -> None:
    if opset_of(proto) < _LEAST_OPSET:
        raise ModelError(
            f"{source}: opset {opset_of(proto)} has no 8 bits per channel; export it with export.opset = "
            f"{_LEAST_OPSET} or more"
        )


def _split(inputs: list[Feed], num_calib: int) -> tuple[list[Feed], list[Feed]]:
    """Samples to calibrate with, and others to measure errors on; the same one twice where there is only one."""
    total = num_samples_of(inputs)
    if total <= num_calib:
        num_calib = max(1, total - max(1, total // 4))
    held_out = take_feeds(inputs, _NUM_HELD_OUT, start=num_calib)
    return take_feeds(inputs, num_calib), held_out or take_feeds(inputs, 1)


# --- which nodes --------------------------------------------------------------------------------------------------------


def _why_not(node: onnx.NodeProto, proto: onnx.ModelProto) -> str:
    """Why a layer, or what a node runs inside, cannot be in 8 bits; empty for the others and for all other nodes."""
    if subgraphs(node):
        return f"{node.op_type}: what it runs stays float" if _holds_layers(node) else ""
    if node.op_type not in _LAYERS:
        return ""
    weights = {weight.name: weight for weight in proto.graph.initializer}
    if types_of(proto.graph).get(node.input[0]) != FLOAT:
        return f"{node.op_type} does not read fp32"
    weight = weights.get(node.input[1])
    if node.op_type == "MatMul":
        if weight is None:
            return "a product of two activations is slower in 8 bits"
        return "" if len(weight.dims) == 2 else f"MatMul with weights of {len(weight.dims)} axes"
    if weight is None or (len(node.input) > 2 and node.input[2] and node.input[2] not in weights):
        return f"{node.op_type} with weights that are computed"
    return ""


def _holds_layers(node: onnx.NodeProto) -> bool:
    return any(
        inner.op_type in _LAYERS or _holds_layers(inner) for graph in subgraphs(node) for inner in graph.node
    )


def _chosen(proto: onnx.ModelProto, layers: Iterable[str], recipe: Recipe) -> dict[str, bool]:
    """The nodes that run in 8 bits, and whether their outputs are held so: `layers`, and what follows them."""
    wanted, weights = set(layers), {weight.name for weight in proto.graph.initializer}
    types = types_of(proto.graph)
    held: set[str] = set()
    chosen: dict[str, bool] = {}
    for node in proto.graph.node:
        floats = [name for name in node.input if types.get(name) == FLOAT and name not in weights]
        is_follower = node.op_type in recipe.followers and bool(floats) and held.issuperset(floats)
        if node.name not in wanted and not is_follower:
            continue
        chosen[node.name] = is_follower or node.op_type in recipe.rounds_outputs_of
        if chosen[node.name]:
            held |= set(node.output)
    return chosen


def _channel_axes(proto: onnx.ModelProto, chosen: Mapping[str, bool]) -> dict[str, int]:
    """The tensors whose ranges are needed; 1 for what a convolution reads or gives, -1 for the others."""
    types, weights = types_of(proto.graph), {weight.name for weight in proto.graph.initializer}
    axes: dict[str, int] = {}
    for node in proto.graph.node:
        if node.name not in chosen:
            continue
        for name in (*node.input, *(node.output if chosen[node.name] else ())):
            if types.get(name) == FLOAT and name not in weights:
                axes[name] = max(1, axes.get(name, -1)) if node.op_type == "Conv" else axes.get(name, -1)
    return axes


# --- quantising ---------------------------------------------------------------------------------------------------------


def _quantise(
    proto: onnx.ModelProto, layers: Sequence[str], ranges: Mapping[str, Range], recipe: Recipe
) -> onnx.ModelProto:
    """The graph with `layers` in 8 bits, and what follows them."""
    chosen = _chosen(proto, layers, recipe)
    needed = _channel_axes(proto, chosen)
    data = {n: (np.array(ranges[n][0], np.float32), np.array(ranges[n][1], np.float32)) for n in sorted(needed)}
    activations = QuantType.QInt8 if recipe.is_symmetric else QuantType.QUInt8
    by_name = {node.name: node for node in proto.graph.node}
    with _quiet():
        quantizer = QDQQuantizer(
            copy_of(proto),
            True,  # per channel
            False,  # all 8 bits of weights
            QuantType.QInt8,
            activations,
            TensorsData(CalibrationMethod.MinMax, data),
            list(chosen),
            [],
            sorted({by_name[name].op_type for name in chosen}),
            {
                "ActivationSymmetric": recipe.is_symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": recipe.has_integer_bias,
                "OpTypesToExcludeOutputQuantization": [t for t in _LAYERS if t not in recipe.rounds_outputs_of],
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    quantised.producer_name, quantised.producer_version = proto.producer_name, proto.producer_version
    if recipe.leaves_others:
        _reconnect_floats(quantised, proto, chosen)
    return quantised


def _reconnect_floats(quantised: onnx.ModelProto, proto: onnx.ModelProto, chosen: Mapping[str, bool]) -> None:
    """Let nodes that are not in 8 bits read the tensors they read before, unless those exist in 8 bits only."""
    held = {name for node in proto.graph.node if chosen.get(node.name) for name in node.output}
    weights = {weight.name: weight for weight in proto.graph.initializer}
    present = {weight.name for weight in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.name in chosen or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            before = name.removesuffix(_DEQUANTISED)
            if before == name or before in held:
                continue
            node.input[i] = before
            if before in weights and before not in present:
                present.add(before)
                quantised.graph.initializer.append(weights[before])


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser logs to the root logger what it does to ranges; what matters of it is measured."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logging.disable(before)


# --- biases -------------------------------------------------------------------------------------------------------------


def _with_corrected_biases(
    proto: onnx.ModelProto, quantised: onnx.ModelProto, layers: Sequence[str], histograms: Mapping[str, Histogram]
) -> onnx.ModelProto:
    """`proto` with biases that undo the mean shift of the layers' outputs which rounding their weights causes.

    The shift is (W - rounded W) E[x], with E[x] the mean of each input channel (Nagel et al., arXiv:1906.04721,
    section 4.2); borders of padded convolutions, which see fewer inputs, are taken like the rest.
    """
    moved = copy_of(proto)
    weights = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
    rounded = _rounded_weights(quantised)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    added: dict[str, NDArray[Any]] = {}
    for node in proto.graph.node:
        if node.name not in layers or node.input[1] not in rounded:
            continue
        bias = _bias_of(node, readers, weights)
        if bias and len(readers[bias]) == 1:
            shift = _mean_shift(node, weights[node.input[1]] - rounded[node.input[1]], histograms[node.input[0]].means)
            added[bias] = shift
    for weight in moved.graph.initializer:
        if weight.name in added:
            weight.CopyFrom(
                numpy_helper.from_array((weights[weight.name] + added[weight.name]).astype(np.float32), weight.name)
            )
    return moved


def _rounded_weights(quantised: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """By the name it had before: each weight as the integers stand for it."""
    arrays = {weight.name: weight for weight in quantised.graph.initializer}
    rounded = {}
    for node in quantised.graph.node:
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(_QUANTISED):
            continue
        name = node.input[0].removesuffix(_QUANTISED)
        values, scale = (numpy_helper.to_array(arrays[i]) for i in node.input[:2])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if scale.ndim else []
        rounded[name] = values.astype(np.float64) * scale.reshape(shape)
    return rounded


def _bias_of(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], weights: Mapping[str, NDArray[Any]]
) -> str:
    """The name of the weights added to each output channel; empty where there are none."""
    if node.op_type != "MatMul":
        return node.input[2] if len(node.input) > 2 else ""
    after = readers.get(node.output[0], [])
    if len(after) != 1 or after[0].op_type != "Add":
        return ""
    names = [n for n in after[0].input if n in weights and weights[n].shape == weights[node.input[1]].shape[1:]]
    return names[0] if names else ""


def _mean_shift(node: onnx.NodeProto, lost: NDArray[Any], means: NDArray[np.float64]) -> NDArray[Any]:
    """(outputs,): what the rounding of weights takes from the mean of each output channel."""
    shift: NDArray[Any]
    if node.op_type == "Conv":
        taps = lost.reshape(*lost.shape[:2], -1).sum(axis=2)  # (outputs, inputs of a group)
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        parts = zip(np.split(taps, groups), np.split(means, groups), strict=True)
        return np.concatenate([part @ mean for part, mean in parts])
    flags = {a.name: a.f if a.type == onnx.AttributeProto.FLOAT else a.i for a in node.attribute}
    shift = (lost if flags.get("transB") else lost.T) @ means
    return shift * flags.get("alpha", 1.0) / (flags.get("beta", 1.0) or 1.0)


def _without(layers: Sequence[str], floats: frozenset[str]) -> list[str]:
    return [name for name in layers if name not in floats]
