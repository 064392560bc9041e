"""Half precision: measured errors decide what stays float, and any file converts completely."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError, DeploypipeError, ModelError, ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.fp16 import to_fp16
from deploypipe.files.hashing import file_sha256
from deploypipe.recipe import Export
from deploypipe.runtimes.onnxruntime import OnnxRuntime

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Overflowing(nn.Module):
    """Computes with numbers that half precision does not have, between two layers that it serves well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.first(x)) * 1e6 / 1e6)
        return logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "dense.onnx"
    export_onnx(tiny.build_model(), list(tiny.load_data().calib), path, Export())
    return path


def run(path: Path, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    with OnnxRuntime().open(path, num_threads=1) as session:
        return session.run(inputs)


def test_a_trained_network(dense: Path, tmp_path: Path) -> None:
    splits = tiny.load_data()
    made = to_fp16(dense, tmp_path / "half.onnx", splits.calib, Export())

    proto = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {FLOAT}
    assert all(w.data_type != FLOAT for w in proto.graph.initializer)
    assert made.kept_float == () and made.num_converted == made.num_layers > 10
    assert made.file.parity is not None and made.file.parity.top1_agreement == 1
    assert 1e-5 < made.file.max_abs_error < 5e-3
    assert (made.file.precision, made.file.path) == ("fp16", "half.onnx")
    assert {p.key: p.value for p in proto.metadata_props}["deploypipe.precision"] == "fp16"
    assert made.file.size_bytes == (tmp_path / "half.onnx").stat().st_size < 0.7 * dense.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["half.onnx"]
    x, _ = tiny.images(50, seed=9)
    want, got = (run(path, {"x": x.numpy()})[0] for path in (dense, tmp_path / "half.onnx"))
    np.testing.assert_allclose(got, want, atol=5e-3 * np.abs(want).max())


def test_the_same_bytes_again(dense: Path, tmp_path: Path) -> None:
    calib = tiny.load_data().calib
    made = [to_fp16(dense, tmp_path / name, calib, Export()) for name in ("one.onnx", "two.onnx")]
    assert made[0].file.sha256 == made[1].file.sha256 == file_sha256(tmp_path / "two.onnx")


def test_only_what_overflows_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(32, 6), None)]
    export_onnx(Overflowing(), batches, tmp_path / "dense.onnx", Export())
    made = to_fp16(tmp_path / "dense.onnx", tmp_path / "half.onnx", batches, Export())

    assert [kept.layer for kept in made.kept_float] == ["/Mul", "/Div"]
    assert all("error inf of its own output" in kept.reason for kept in made.kept_float)
    assert made.file.max_abs_error < 1e-2
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    product = next(node.output[0] for node in proto.graph.node if node.op_type == "Mul")
    # The large numbers go from one to the other as they are.
    assert types[product] == FLOAT
    assert [node.op_type for node in proto.graph.node if product in node.input] == ["Div"]
    assert {types[node.output[0]] for node in proto.graph.node if node.op_type == "Relu"} == {HALF}


BRANCHES = """
<ir_version: 9, opset_import: ["" : 20]>
agraph (float[N, 1, 4, 4] x, int64[N] count) => (float[N, 1, 8, 8] y, int64[N] z)
<float[4] scales = {1, 1, 2, 2}, float[1] half = {0.5}, float zero = {0}, float one = {1}, int64[1] all = {0}>
{
   a = Mul (x, half)
   up = Resize <mode = "nearest"> (a, , scales)
   total = ReduceSum <keepdims = 0> (a)
   is_large = Greater (total, zero)
   b = If (is_large) <
      then_branch = yes () => (float[N, 1, 8, 8] t) { t = Mul (up, half) },
      else_branch = no () => (float[N, 1, 8, 8] e) { one_more = Add (up, half) e = Neg (one_more) }
   >
   size = Shape (a)
   batch = Gather (size, all)
   fraction = Cast <to = 1> (count)
   more = Add (fraction, half)
   z = Cast <to = 7> (more)
   steps = Range (zero, one, one)
   c = Add (b, steps)
   y = Relu (c)
}
"""


def test_branches_casts_scales_and_operators_without_half(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(BRANCHES), tmp_path / "dense.onnx")
    generator = torch.Generator().manual_seed(0)
    x, count = torch.randn(6, 1, 4, 4, generator=generator), torch.arange(6)
    made = to_fp16(tmp_path / "dense.onnx", tmp_path / "half.onnx", [({"x": x, "count": count}, None)], Export())

    assert {kept.layer: kept.reason for kept in made.kept_float}["If"] == "If: its subgraphs stay float"
    onnx.checker.check_model(onnx.load(tmp_path / "half.onnx"), full_check=True)
    for sign in (1, -1):
        inputs = {"x": sign * np.abs(x.numpy()), "count": count.numpy()}
        (y, z), (half_y, half_z) = (run(tmp_path / name, inputs) for name in ("dense.onnx", "half.onnx"))
        np.testing.assert_allclose(half_y, y, atol=2e-3)
        np.testing.assert_array_equal(half_z, z)


def test_refusals_leave_the_old_file(dense: Path, tmp_path: Path) -> None:
    calib = list(tiny.load_data().calib)
    out = tmp_path / "half.onnx"
    to_fp16(dense, tmp_path / "already.onnx", calib, Export())
    (tmp_path / "cut.onnx").write_bytes(dense.read_bytes()[:-100])
    out.write_bytes(b"the last good file")
    cases: list[tuple[Path, Any, Export, type[DeploypipeError], str]] = [
        (tmp_path / "cut.onnx", calib, Export(), ModelError, "cut.onnx"),
        (tmp_path / "absent.onnx", calib, Export(), ModelError, "absent.onnx"),
        (tmp_path / "already.onnx", calib, Export(), ModelError, "half-precision weights already"),
        (dense, [(torch.randn(4, 1, 5), None)], Export(), DataError, r"cannot run on x float32\[4, 1, 5\]"),
        (dense, [], Export(), DataError, "no samples"),
        (dense, calib, Export(max_abs_error_fp16=0), ParityError, "raise export.max_abs_error_fp16"),
    ]
    for source, batches, settings, error, message in cases:
        with pytest.raises(error, match=message):
            to_fp16(source, out, batches, settings)
        assert out.read_bytes() == b"the last good file"
    assert {p.name for p in tmp_path.iterdir()} == {"half.onnx", "already.onnx", "cut.onnx"}
