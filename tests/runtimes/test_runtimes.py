"""Every runtime keeps the same contract, and raises if it is not available or would run elsewhere than requested."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from deploypipe.errors import DataError, ModelError, RuntimeUnavailableError
from deploypipe.runtimes import RUNTIMES, Runtime, find_runtime, make_runtime
from deploypipe.runtimes.gpu_memory import peak_increase
from deploypipe.runtimes.named_arrays import feed, name_outputs, repack
from deploypipe.runtimes.onnxruntime import PROVIDERS, OnnxRuntime, Provider, bind_buffers, missing_provider
from deploypipe.runtimes.torch_program import EagerRuntime
from deploypipe.target import Target

OPENVINO = pytest.mark.skipif(bool(missing_provider(PROVIDERS["openvino"])), reason="needs onnxruntime-openvino")
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Affine(nn.Module):
    def forward(self, x: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = x + x + b
        return {"y": y, "total": y.sum()}


def write_onnx(folder: Path) -> Path:
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
    path = folder / "affine.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def write_program(folder: Path) -> Path:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Affine(), (torch.ones(2, 3), torch.ones(3)), dynamic_shapes={"x": {0: batch}, "b": None}
    )
    torch.export.save(program, folder / "affine.pt2")
    return folder / "affine.pt2"


def write_engine(folder: Path) -> Path:
    from deploypipe.export.tensorrt_engine.build_engine import build_engine

    return folder / build_engine(write_onnx(folder), Target(runtime="tensorrt"), folder).path


def onnxruntime_with(provider: str, **fields: object) -> Runtime:
    return make_runtime(Target(runtime="onnxruntime", provider=provider, **fields))  # type: ignore[arg-type]


def tensorrt() -> Runtime:
    return make_runtime(Target(runtime="tensorrt"))


@pytest.mark.parametrize(
    ("make", "write"),
    [
        pytest.param(OnnxRuntime, write_onnx, id="onnxruntime"),
        pytest.param(
            # It leaves a reduction to a scalar to the CPU.
            lambda: onnxruntime_with("openvino", allow_cpu_fallback=True),
            write_onnx,
            id="openvino",
            marks=OPENVINO,
        ),
        pytest.param(lambda: onnxruntime_with("cuda"), write_onnx, id="cuda", marks=CUDA),
        pytest.param(lambda: EagerRuntime(is_trusted=True), write_program, id="eager"),
        pytest.param(
            lambda: EagerRuntime(device="cuda", is_trusted=True), write_program, id="eager on cuda", marks=CUDA
        ),
        pytest.param(tensorrt, write_engine, id="tensorrt", marks=CUDA),
        pytest.param(lambda: onnxruntime_with("cuda", cuda_graph=True), write_onnx, id="cuda graph", marks=CUDA),
        pytest.param(
            lambda: make_runtime(Target(runtime="tensorrt", cuda_graph=True)),
            write_engine,
            id="tensorrt graph",
            marks=CUDA,
        ),
    ],
)
class TestContract:
    def test_names_values_and_ownership(
        self, make: Callable[[], Runtime], write: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        x, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, dtype=np.float32)
        with make().open(write(tmp_path), num_threads=2) as session:
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

    def test_a_bound_batch_gives_what_a_run_gives_and_leaves_other_runs_alone(
        self, make: Callable[[], Runtime], write: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        batch = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.float32)}
        with make().open(write(tmp_path), num_threads=1) as session:
            bound = session.bind(batch)
            for _ in range(3):  # a CUDA graph is captured in the first and replayed later
                bound.run()
            np.testing.assert_allclose(bound.outputs()[0], 2 * batch["x"] + 1)
            if parts := bound.time_parts():  # on a GPU
                assert 0 < parts.enqueue_ms < parts.end_to_end_ms and parts.compute_ms > 0
            other = {"x": np.full((2, 3), 7, dtype=np.float32), "b": batch["b"]}
            np.testing.assert_allclose(session.run(other)[0], np.full((2, 3), 15))

    def test_inputs_that_do_not_fit(
        self, make: Callable[[], Runtime], write: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        b = np.ones(3, dtype=np.float32)
        wrong: list[dict[str, np.ndarray]] = [
            {"b": b},
            {"x": np.ones((2, 4), dtype=np.float32), "b": b},
            {"x": np.ones((2, 3), dtype=np.int64), "b": b},
        ]
        with make().open(write(tmp_path), num_threads=1) as session:
            for inputs in wrong:
                with pytest.raises(DataError, match=r"affine\.\w+.*it takes x .*, b "):
                    session.run(inputs)

    def test_files_that_cannot_be_loaded(
        self, make: Callable[[], Runtime], write: Callable[[Path], Path], tmp_path: Path
    ) -> None:
        whole = write(tmp_path)
        broken = whole.with_stem("broken")
        broken.write_bytes(whole.read_bytes()[:40])
        for path in (broken, whole.with_stem("absent")):
            with pytest.raises(ModelError, match=path.name), make().open(path, num_threads=1):
                pass


def test_threads_of_eager_torch_are_restored(tmp_path: Path) -> None:
    path, before = write_program(tmp_path), torch.get_num_threads()
    with EagerRuntime(is_trusted=True).open(path, num_threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_eager_takes_named_inputs_and_gives_tuples(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a - b, a

    program = torch.export.export(Two(), (), {"b": torch.ones(2), "a": torch.ones(2)})
    torch.export.save(program, tmp_path / "two.pt2")
    with EagerRuntime(is_trusted=True).open(tmp_path / "two.pt2", num_threads=1) as session:
        assert (sorted(session.input_names), session.output_names) == (["a", "b"], ("output_0", "output_1"))
        outputs = session.run({"a": np.full(2, 3, np.float32), "b": np.ones(2, np.float32)})
    assert [array.tolist() for array in outputs] == [[2, 2], [3, 3]]


# --- execution providers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        ("cuda", "onnxruntime-gpu"),
        ("tensorrt", "onnxruntime-gpu"),
        ("openvino", "onnxruntime-openvino"),
        ("qnn", "onnxruntime-qnn"),
        ("coreml", "macOS wheel"),
    ],
)
def test_a_missing_provider_names_its_package(provider: str, package: str, tmp_path: Path) -> None:
    if not missing_provider(PROVIDERS[provider]):
        pytest.skip(f"{provider} is installed here")
    runtime = onnxruntime_with(provider)
    with (
        pytest.raises(RuntimeUnavailableError, match=rf"(?s)not in the installed onnxruntime.*pip install.*{package}"),
        runtime.open(write_onnx(tmp_path), num_threads=1),
    ):
        pass


AZURE = Provider(names=("AzureExecutionProvider",), package="onnxruntime")  # in every wheel; takes no ordinary node


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs a provider beside the CPU's"
)
class TestFallback:
    """With a real provider that leaves everything to the CPU."""

    def test_it_is_refused(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        runtime = OnnxRuntime(provider=AZURE)
        refusal = r"AzureExecutionProvider leaves 3 nodes to the CPU: Add '', .*ReduceSum.*allow_cpu_fallback = true"
        with (
            pytest.raises(RuntimeUnavailableError, match=refusal),
            runtime.open(write_onnx(tmp_path), num_threads=1),
        ):
            pass
        assert capfd.readouterr() == ("", "")

    def test_it_is_allowed(self, tmp_path: Path) -> None:
        runtime = OnnxRuntime(provider=AZURE, allow_cpu_fallback=True)
        x, b = np.ones((2, 3), np.float32), np.ones(3, np.float32)
        with runtime.open(write_onnx(tmp_path), num_threads=1) as session:
            assert session.run({"x": x, "b": b})[0].tolist() == [[3, 3, 3], [3, 3, 3]]


@OPENVINO
class TestOpenVino:
    """The one other provider that a machine without an accelerator can really run."""

    def test_nodes_it_leaves_to_the_cpu_are_named(self, tmp_path: Path) -> None:
        graph = helper.make_graph(
            [
                helper.make_node("Relu", ["x"], ["r"], name="relu"),
                helper.make_node("Unique", ["r"], ["u"], name="unique"),
            ],
            "mixed",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
            [
                helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N"]),
                helper.make_tensor_value_info("u", TensorProto.FLOAT, ["M"]),
            ],
        )
        path = tmp_path / "mixed.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        refusal = r"leaves 1 nodes to the CPU: Unique 'unique'; set allow_cpu_fallback"
        with (
            pytest.raises(RuntimeUnavailableError, match=refusal),
            onnxruntime_with("openvino").open(path, num_threads=1),
        ):
            pass
        with onnxruntime_with("openvino", allow_cpu_fallback=True).open(path, num_threads=1) as session:
            assert session.run({"x": np.array([1, -1, 1], np.float32)})[1].tolist() == [0, 1]

    def test_a_missing_device(self, tmp_path: Path) -> None:
        runtime = onnxruntime_with("openvino", provider_options={"device_type": "NPU"}, allow_cpu_fallback=True)
        with (
            pytest.raises(RuntimeUnavailableError, match="did not start on this machine"),
            runtime.open(write_onnx(tmp_path), num_threads=1),
        ):
            pass

    def test_an_unknown_option(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        runtime = onnxruntime_with("openvino", provider_options={"nonsense": "1"})
        with (
            pytest.raises(ModelError, match=r"nonsense.*correct provider_options"),
            runtime.open(write_onnx(tmp_path), num_threads=1),
        ):
            pass
        assert "Falling back" not in capfd.readouterr().out


# --- finding one ------------------------------------------------------------------------------------------------------


def test_the_runtime_is_made_as_the_target_says() -> None:
    target = Target(
        runtime="onnxruntime", provider="openvino", provider_options={"device_type": "CPU"}, allow_cpu_fallback=True
    )
    assert make_runtime(target) == OnnxRuntime(
        provider=PROVIDERS["openvino"], options={"device_type": "CPU"}, allow_cpu_fallback=True
    )
    assert make_runtime(Target(runtime="eager", provider="cuda")) == EagerRuntime(device="cuda")
    for name in RUNTIMES:
        make_runtime(Target(runtime=name))  # type: ignore[arg-type]


class Stream:
    """A torch.cuda.Stream that is somewhere in the driver's memory."""

    cuda_stream = 4711


def test_all_providers_on_a_gpu_compute_on_one_stream_and_the_first_one_has_the_options() -> None:
    target = Target(
        runtime="onnxruntime", provider="tensorrt", cuda_graph=True, provider_options={"trt_fp16_enable": "1"}
    )
    runtime = make_runtime(target)
    assert isinstance(runtime, OnnxRuntime)
    common = {"user_compute_stream": "4711"}
    assert runtime._providers(1, Stream()) == [
        ("TensorrtExecutionProvider", {**common, "trt_cuda_graph_enable": "1", "trt_fp16_enable": "1"}),
        ("CUDAExecutionProvider", common),
    ]


def test_no_runtime_for_another_device() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"target 'pi': this machine .* not Raspberry Pi"):
        find_runtime(Target(runtime="onnxruntime", name="pi", board="Raspberry Pi"))
    assert isinstance(find_runtime(Target(runtime="onnxruntime")), OnnxRuntime)


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_goes_both_ways() -> None:
    a, b = torch.ones(2, 3), torch.zeros(2)
    nested = {"logits": a, "text": {"hidden": b, "layers": (a, b)}}
    for outputs in (a, (a, b), (a,), {"logits": a, "aux": b}, (a, (b, a)), nested):
        named = name_outputs(outputs)
        again = repack(list(named), [tensor.numpy() for tensor in named.values()])
        assert isinstance(again, type(outputs))
        assert list(name_outputs(again)) == list(named)
    assert again.text.layers[1].shape == again["text"]["layers"][1].shape == b.shape
    assert list(name_outputs({"logits": a, "past": None, "all": (None, b)})) == ["logits", "all.1"]
    for unusable in ([a, ["text"]], {"logits": None}, "text"):
        with pytest.raises(ModelError, match="return a tensor, or tuples and dicts"):
            name_outputs(unusable)


def test_feed_by_name_and_by_position() -> None:
    ids, mask = torch.ones(2, dtype=torch.int64), torch.zeros(2)
    assert list(feed({"mask": mask, "ids": ids, "unused": mask}, ["ids", "mask"])) == ["ids", "mask"]
    assert feed((ids, mask), ["a", "b"])["b"].dtype == np.float32
    with pytest.raises(DataError, match="lacks mask"):
        feed({"ids": ids}, ["ids", "mask"])


def test_runs_in_buffers_give_what_plain_runs_give(tmp_path: Path) -> None:
    """I/O binding as on a GPU, here with the processor as the device."""
    draw = np.random.default_rng(0)
    batch = {"x": draw.random((5, 3), np.float32), "b": draw.random(3, np.float32)}
    with OnnxRuntime().open(write_onnx(tmp_path), num_threads=1) as session:
        expected, plain = session.run(batch), session.bind(batch)
        bound = bind_buffers(session, batch, device="cpu", stream=None)
        for run in (plain, bound):
            run.run()
            assert run.time_parts() is None
            for got, want in zip(run.outputs(), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        owned = bound.outputs()
        bound.buffers.host_inputs["x"].zero_()  # what the next request would bring
        bound.run()
        np.testing.assert_allclose(bound.outputs()[0], np.tile(batch["b"], (5, 1)))
        np.testing.assert_array_equal(owned[0], expected[0])


def test_the_peak_of_a_gpus_memory_is_an_increase() -> None:
    used = [100]

    def work() -> None:
        for amount in (150, 400, 120):
            used[0] = amount
            threading.Event().wait(0.02)

    assert peak_increase(lambda: used[0], work) == 300
    assert peak_increase(lambda: used[0], lambda: None) == 0
