"""8 bits: each runtime's recipe, ranges chosen by measured errors, and float for layers that are too sensitive."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny_pipeline as tiny
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.benchmark.accuracy import evaluate_file
from deploypipe.errors import DataError, DeploypipeError, ModelError, ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.int8 import MeasureAccuracy, to_int8
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.recipe import Export, Int8
from deploypipe.runtimes.int8_arithmetic import Int8Kernels
from deploypipe.runtimes.named_arrays import feed
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import Batch

INT8, INT32, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.INT32, onnx.TensorProto.UINT8
CPU, WITHOUT_VNNI = (Int8Kernels(runtime="onnxruntime", saturate=saturate) for saturate in (False, True))
FAST = Export(int8=Int8(methods=("minmax", "mse")))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(36, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.relu(self.middle(F.relu(self.first(x.flatten(1))))))
        return logits


class Attention(nn.Module):
    """A post-norm encoder layer, whose norm's output feeds both a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).flatten(1) @ x.flatten(1).T


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "dense.onnx"
    export_onnx(tiny.build_model(), list(tiny.load_data().calib), path, Export())
    return path


def accuracy_on(batches: list[Batch]) -> MeasureAccuracy:
    reader = OnnxRuntime(is_plain=CPU.are_emulated_here)
    return lambda path: float(evaluate_file(path, batches, tiny.task(), reader, 1).mean())


def weights_of(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {weight.name: weight for weight in proto.graph.initializer}


def test_a_trained_network(dense: Path, tmp_path: Path) -> None:
    splits = tiny.load_data()
    made = to_int8(dense, tmp_path / "int8.onnx", splits.calib, accuracy_on(list(splits.val)), CPU, Export())

    proto = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(proto, full_check=True)
    weights = weights_of(proto)
    activations = [weights[n.input[2]] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert {zero.data_type for zero in activations} == {UINT8}
    scales = [w for name, w in weights.items() if name.endswith("weight_scale")]
    assert {w.data_type for name, w in weights.items() if name.endswith("weight_quantized")} == {INT8}
    assert all(len(scale.dims) == 1 and scale.dims[0] > 1 for scale in scales) and len(scales) == 6
    assert made.kept_float == () and made.num_converted == made.num_layers == 6
    assert [c.method for c in made.calibrations] == ["minmax", "percentile", "entropy", "mse"]
    assert made.method in {c.method for c in made.calibrations}
    assert made.accuracy is not None and made.accuracy_fp32 is not None
    assert made.accuracy > 0.8 and made.accuracy_fp32 - made.accuracy <= 0.005
    assert made.file.parity is not None and made.file.parity.top1_agreement is not None
    assert made.file.parity.top1_agreement > 0.95 and made.file.max_abs_error < 0.1
    assert made.num_calib_samples == 96 and "96 samples" in made.notes[0]
    assert made.runtime == "onnxruntime" and made.int8_arithmetic == "exact" and made.file.precision == "int8"
    assert made.file.size_bytes < dense.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


def test_the_same_bytes_again(dense: Path, tmp_path: Path) -> None:
    splits = tiny.load_data()
    made = [to_int8(dense, tmp_path / n, splits.calib, None, CPU, FAST) for n in ("one.onnx", "two.onnx")]
    assert made[0].file.sha256 == made[1].file.sha256


class Layers(nn.Module):
    """Each kind of layer that has an 8-bit kernel of its own, on large inputs: two products of 8 bits leave 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.middle, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pointwise(F.relu(self.depthwise(F.relu(self.stem(x))))))
        logits: Tensor = self.head(F.relu(self.middle(x.flatten(2).transpose(1, 2)))[:, 0])
        return logits


def test_without_vnni_every_kernel_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers()
    with torch.no_grad():
        for weight in model.parameters():
            weight.abs_()  # every sum of products is as large as it can be
    batches = [(torch.rand(20, 4, 6, 6) + 1, None)]
    export_onnx(model.eval(), batches, tmp_path / "dense.onnx", Export())
    made = to_int8(tmp_path / "dense.onnx", tmp_path / "int8.onnx", batches, None, WITHOUT_VNNI, FAST)

    assert made.int8_arithmetic == "any" and made.num_converted == 5
    proto = onnx.load(tmp_path / "int8.onnx")
    assert {"deploypipe.int8_arithmetic": "any"}.items() <= {p.key: p.value for p in proto.metadata_props}.items()
    weights = [numpy_helper.to_array(w) for n, w in weights_of(proto).items() if n.endswith("weight_quantized")]
    weights = weights or [numpy_helper.to_array(w) for w in proto.graph.initializer if w.data_type == INT8 and w.dims]
    largest = max(int(abs(weight.astype(int)).max()) for weight in weights)
    assert largest > 32 and 2 * 255 * largest < 2**15
    # This machine's own kernels, of whatever kind, against float between the same roundings.
    outputs = []
    for is_plain in (False, True):
        with OnnxRuntime(is_plain=is_plain).open(tmp_path / "int8.onnx", num_threads=1) as session:
            (logits,) = session.run(feed(batches[0][0], session.input_names))
            outputs.append(logits)
    assert abs(outputs[0] - outputs[1]).max() < 0.02 * abs(outputs[1]).max()


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_symmetric_for_tensorrt(dense: Path, tmp_path: Path, runtime: str) -> None:
    made = to_int8(dense, tmp_path / "int8.onnx", tiny.load_data().calib, None, Int8Kernels(runtime=runtime), FAST)

    before, after = onnx.load(dense), onnx.load(tmp_path / "int8.onnx")
    weights = weights_of(after)
    pairs = [n for n in after.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 12
    for node in pairs:
        zero = weights[node.input[2]]
        assert zero.data_type == INT8 and not numpy_helper.to_array(zero).any()
    assert all(w.data_type != INT32 for w in weights.values()), "a bias is not float"
    # onnxruntime #11660: symmetric activations must not cost a Relu.
    for operator in ("Relu", "Add", "Conv", "Gemm"):
        assert (
            Counter(n.op_type for n in after.graph.node)[operator]
            == (Counter(n.op_type for n in before.graph.node)[operator])
        )
    assert made.file.max_abs_error < 0.1
    assert made.accuracy is None and all(c.accuracy is None for c in made.calibrations)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network of which one hidden channel is 10,000 times as large as the others and read as much less."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(150):
            x, y = tiny.images(64, seed=2000 + step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        # The channel that is active most: one that never is would hurt nobody.
        x, _ = tiny.images(64, seed=1)
        channel = int(F.relu(model.first(x.flatten(1))).mean(0).argmax())
        model.first.weight[channel] *= 1e4
        model.first.bias[channel] *= 1e4
        model.middle.weight[:, channel] /= 1e4
    path = tmp_path_factory.mktemp("lopsided") / "dense.onnx"
    export_onnx(model.eval(), list(tiny.load_data().calib), path, Export())
    return path


def test_a_sensitive_layer_stays_float(lopsided: Path, tmp_path: Path) -> None:
    splits = tiny.load_data()
    measure_accuracy = accuracy_on(list(splits.val))
    made = to_int8(lopsided, tmp_path / "int8.onnx", splits.calib, measure_accuracy, CPU, Export())

    assert [kept.layer for kept in made.kept_float] == ["middle/Gemm"]
    assert "mean error of the outputs" in made.kept_float[0].reason
    assert made.num_converted == 2
    assert made.accuracy is not None and made.accuracy_fp32 is not None
    assert made.accuracy_fp32 > 0.8 and made.accuracy_fp32 - made.accuracy <= 0.005
    # With all layers in 8 bits no choice of ranges would have done.
    assert all(c.accuracy is not None and c.accuracy < made.accuracy - 0.02 for c in made.calibrations)
    names = weights_of(onnx.load(tmp_path / "int8.onnx"))
    assert "middle.weight" in names and "first.weight_quantized" in names


def test_errors_alone_decide_without_an_accuracy(lopsided: Path, tmp_path: Path) -> None:
    made = to_int8(lopsided, tmp_path / "int8.onnx", tiny.load_data().calib, None, CPU, FAST)
    assert [kept.layer for kept in made.kept_float] == ["middle/Gemm"]
    assert made.file.max_abs_error < FAST.max_abs_error_int8


def test_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(40, 5, 16), None)]
    export_onnx(with_slim_attention(Attention()).eval(), batches, tmp_path / "dense.onnx", Export())
    made = to_int8(tmp_path / "dense.onnx", tmp_path / "int8.onnx", batches, None, CPU, FAST)

    # Query, key and value share one weight, split where they are used; output, two of the MLP, and the head.
    assert made.num_converted == 7
    assert [kept.reason.partition(",")[0] for kept in made.kept_float] == ["a product of two activations"] * 2
    assert made.file.max_abs_error < 0.1
    proto = onnx.load(tmp_path / "int8.onnx")
    rounded = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    readers = {n.op_type for n in proto.graph.node if rounded.intersection(n.input)}
    assert readers <= {"MatMul", "Gemm"}, "the sum after the norm reads 8 bits without need"


def test_biases_compensate_for_rounded_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4))
    batches = [(torch.rand(120, 4, 4, 4) + 3, None)]  # far from zero, so that lost weight shifts the mean
    export_onnx(model, batches, tmp_path / "dense.onnx", Export())
    plain = replace(FAST, int8=Int8(methods=("minmax",), correct_biases=False))
    corrected = replace(FAST, int8=Int8(methods=("minmax",)))
    files = [
        to_int8(
            tmp_path / "dense.onnx", tmp_path / "int8.onnx", batches, None, Int8Kernels(runtime="tensorrt"), settings
        )
        for settings in (plain, corrected)
    ]
    assert [made.is_bias_corrected for made in files] == [False, True]
    before, after = (made.file.parity for made in files)
    assert before is not None and after is not None
    assert after.mean_abs_error < 0.8 * before.mean_abs_error


def test_refusals_leave_the_old_file(dense: Path, tmp_path: Path) -> None:
    calib = list(tiny.load_data().calib)
    out = tmp_path / "int8.onnx"
    to_int8(dense, tmp_path / "already.onnx", calib, None, CPU, FAST)
    (tmp_path / "cut.onnx").write_bytes(dense.read_bytes()[:-100])
    export_onnx(Weightless(), [(torch.randn(3, 4), None)], tmp_path / "weightless.onnx", Export())
    out.write_bytes(b"the last good file")
    odd = (torch.randn(4, 1, 6), None)
    exact = replace(FAST, max_abs_error_int8=0)
    coreml = Int8Kernels(runtime="coreml")
    cases: list[tuple[Path, Any, Int8Kernels, Export, type[DeploypipeError], str]] = [
        (tmp_path / "cut.onnx", calib, CPU, FAST, ModelError, "cut.onnx"),
        (tmp_path / "already.onnx", calib, CPU, FAST, ModelError, "quantised already"),
        (tmp_path / "weightless.onnx", [(torch.randn(3, 4), None)], CPU, FAST, ModelError, "no layer of it"),
        (dense, [odd], CPU, FAST, DataError, r"cannot run on x float32\[\d, 1, 6\]"),
        (dense, [odd, *calib], CPU, FAST, DataError, r"cannot run on x float32\[1, 1, 6\]"),
        (dense, [], CPU, FAST, DataError, "no samples"),
        (dense, calib, CPU, exact, ParityError, "raise export.max_abs_error_int8"),
        (dense, calib, coreml, FAST, ModelError, "those with one are onnxruntime, tensorrt, tensorrt-rtx"),
    ]
    for source, batches, kernels, settings, error, message in cases:
        with pytest.raises(error, match=message):
            to_int8(source, out, batches, None, kernels, settings)
        assert out.read_bytes() == b"the last good file"
    assert {p.name for p in tmp_path.iterdir()} == {"int8.onnx", "already.onnx", "cut.onnx", "weightless.onnx"}


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="methods must not be empty"):
        Int8(methods=())
    with pytest.raises(ValueError, match="num_calib_samples must be >= 1, got 0"):
        Int8(num_calib_samples=0)
