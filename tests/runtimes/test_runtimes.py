"""Every runtime in the table keeps the same contract; a missing one says what to do."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from deploypipe import runtimes
from deploypipe.errors import DataError, ModelError, RuntimeUnavailableError
from deploypipe.runtimes import RUNTIMES, Runtime, find_runtime
from deploypipe.runtimes.packing import feed, name_outputs, repack
from deploypipe.target import Target


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    """y = 2 x + b, for x (N, 3) and b (3,), and the running sum over all of y."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["double"]),
            helper.make_node("Add", ["double", "b"], ["y"]),
            helper.make_node("ReduceSum", ["y"], ["total"], keepdims=0),
        ],
        "affine",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, []),
        ],
    )
    path = tmp_path / "affine.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
class TestContract:
    def test_names_values_and_ownership(self, runtime: Runtime, affine: Path) -> None:
        x, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, dtype=np.float32)
        with runtime.open(affine, num_threads=2) as session:
            assert session.input_names == ("x", "b")
            assert session.output_names == ("y", "total")
            y, total = session.run({"b": b, "x": x})
            y_before = y.copy()
            session.run({"x": x * 7, "b": b})
            one_row = session.run({"x": x[:1], "b": b})[0]
        np.testing.assert_allclose(y, 2 * x + 1)
        np.testing.assert_array_equal(y, y_before)  # a later run leaves earlier outputs alone
        assert float(total) == pytest.approx(float((2 * x + 1).sum()))
        assert one_row.shape == (1, 3)

    def test_inputs_that_do_not_fit(self, runtime: Runtime, affine: Path) -> None:
        b = np.ones(3, dtype=np.float32)
        wrong: list[dict[str, np.ndarray]] = [
            {"b": b},
            {"x": np.ones((2, 4), dtype=np.float32), "b": b},
            {"x": np.ones((2, 3), dtype=np.int64), "b": b},
        ]
        with runtime.open(affine, num_threads=1) as session:
            for inputs in wrong:
                with pytest.raises(DataError, match=r"affine\.onnx.*it takes x .*, b "):
                    session.run(inputs)

    def test_files_that_cannot_be_loaded(self, runtime: Runtime, affine: Path) -> None:
        broken = affine.with_name("broken.onnx")
        broken.write_bytes(affine.read_bytes()[:40])
        for path in (broken, affine.with_name("absent.onnx")):
            with pytest.raises(ModelError, match=path.name), runtime.open(path, num_threads=1):
                pass


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")])
def test_missing_runtime_names_the_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(runtime=name, name="orin")  # type: ignore[arg-type]
    monkeypatch.setattr(runtimes, "is_installed", lambda *modules: False)
    with pytest.raises(RuntimeUnavailableError, match=rf"orin.*not installed.*deploypipe\[{extra}\]"):
        find_runtime(target)
    monkeypatch.setattr(runtimes, "is_installed", lambda *modules: True)
    with pytest.raises(RuntimeUnavailableError, match="is installed, but this version"):
        find_runtime(target)


def test_packing_goes_both_ways() -> None:
    a, b = torch.ones(2, 3), torch.zeros(2)
    for outputs in (a, (a, b), (a,), {"logits": a, "aux": b}):
        named = name_outputs(outputs)
        again = repack(list(named), [tensor.numpy() for tensor in named.values()])
        assert type(again) is type(outputs)
        assert list(name_outputs(again)) == list(named)
    with pytest.raises(ModelError, match="flat tuple"):
        name_outputs([a, [b]])


def test_feed_by_name_and_by_position() -> None:
    ids, mask = torch.ones(2, dtype=torch.int64), torch.zeros(2)
    assert list(feed({"mask": mask, "ids": ids, "unused": mask}, ["ids", "mask"])) == ["ids", "mask"]
    assert feed((ids, mask), ["a", "b"])["b"].dtype == np.float32
    with pytest.raises(DataError, match="has no mask"):
        feed({"ids": ids}, ["ids", "mask"])
