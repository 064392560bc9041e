"""Engines: the real TensorRT-RTX parser and builder without a GPU, and the other libraries by a list of their names."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor, nn

from deploypipe.errors import ConfigError, ModelError, RuntimeUnavailableError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.tensorrt_engine import build_engine as module
from deploypipe.export.tensorrt_engine import engine_child
from deploypipe.export.tensorrt_engine.build_engine import (
    build_engine,
    make_profile,
    parse_layers,
    runnable,
    stored_precisions,
)
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import from_json
from deploypipe.recipe import Export
from deploypipe.records import EngineFile, EngineKey
from deploypipe.runtimes import engine_file, make_runtime
from deploypipe.runtimes.engine_file import find_mismatch, load_record, read_engine, record_path
from deploypipe.runtimes.tensorrt_libraries import LIBRARIES, load_library
from deploypipe.runtimes.this_machine import Gpu, Machine, this_machine
from deploypipe.target import Target

ALL = ("8.6", "8.9", "12.0")
TARGET = Target(runtime="tensorrt-rtx", name="rtx", compute_capabilities=ALL)

try:
    TRT, RTX = load_library("tensorrt-rtx")
except RuntimeUnavailableError as error:
    TRT, RTX, REASON = None, None, str(error)
else:
    REASON = ""
needs_rtx = pytest.mark.skipif(bool(REASON), reason=REASON or "installed")


# --- small networks ---------------------------------------------------------------------------------------------------


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        logits: Tensor = self.head(torch.relu(x + self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))
        return logits


class SmallVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.layer(tokens).mean(1))
        return logits


class SmallEncoder(nn.Module):
    """Token ids in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embed(ids)).mean(1))
        return logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (SmallResNet, lambda: torch.randn(4, 3, 32, 32)),
    "vit": (SmallVit, lambda: torch.randn(4, 3, 32, 32)),
    "encoder": (SmallEncoder, lambda: torch.randint(50, (4, 12))),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(network, precision) -> ONNX file."""
    folder, found = tmp_path_factory.mktemp("onnx"), {}
    for name, (make, inputs) in NETWORKS.items():
        torch.manual_seed(0)
        example = inputs()
        path = folder / f"{name}.onnx"
        export_onnx(make(), [(example, None)], path, Export())
        found[name, "fp32"] = path
        found[name, "fp16"] = to_half(path, folder / f"{name}_fp16.onnx")
        found[name, "int8"] = to_int8(path, folder / f"{name}_int8.onnx", example)
    return found


def to_half(source: Path, path: Path) -> Path:
    """All of it in half precision, inputs and outputs too."""
    proto = onnx.load(source)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    onnx.save(proto, path)
    return path


def to_int8(source: Path, path: Path, example: Tensor) -> Path:
    """The form that TensorRT takes: symmetric, biases left in float."""

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = onnx.load(source).graph.input[0].name
            self.batches: Iterator[dict[str, Any]] = iter([{name: example.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantize_static(
        source,
        path,
        Reader(),
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    return path


def one_node(folder: Path, op: str, shape: list[Any], name: str = "layer1.act", **attributes: Any) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"]), helper.make_node(op, ["r"], ["y"], name=name, **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    path = folder / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


# --- building, for real -----------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_build(
    network: str,
    precision: str,
    files: dict[tuple[str, str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = files[network, precision]
    engine = build_engine(source, replace(TARGET, batch_size=4, batch_range=(1, 4, 64)), tmp_path)
    path = tmp_path / engine.path
    assert (engine.sha256, engine.size_bytes) == (file_sha256(path), path.stat().st_size)
    assert engine.onnx_sha256 == file_sha256(source)
    assert engine.precision == precision
    assert engine.key.compute_capabilities == ALL
    assert (engine.key.library, engine.key.version, engine.key.driver) == ("tensorrt-rtx", TRT.__version__, "")
    ((name, shapes),) = engine.profile.items()
    assert [shape[0] for shape in shapes] == [1, 4, 64]
    assert name == onnx.load(source).graph.input[0].name
    assert engine.build_seconds > 0
    # The table comes from the real builder, and names the nodes of the file.
    assert engine.layers and "build log" in engine.layers_source
    nodes = {node for layer in engine.layers for node in layer.nodes}
    assert nodes & {node.name for node in onnx.load(source).graph.node}
    if precision == "fp16":
        assert any("Half" in layer.output_types for layer in engine.layers)
        assert not any("Float" in layer.output_types for layer in engine.layers[-1:])
    assert (precision == "int8") == any("Int8" in layer.output_types for layer in engine.layers)
    assert from_json(EngineFile, record_path(path).read_bytes(), "record") == engine == load_record(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [engine.path, f"{engine.path}.json", engine.log]
    assert "Engine generation completed" in (tmp_path / engine.log).read_text()
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_a_build_is_repeatable(files: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    built = [build_engine(files["resnet", "int8"], TARGET, tmp_path / name) for name in "ab"]
    assert built[0].sha256 == built[1].sha256


@needs_rtx
@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("Det", ["N", 3, 3], r"cannot build Det 'layer1\.act': it is not supported"),
        ("Unheard", ["N", 3], r"cannot build Unheard 'layer1\.act': .+; write that part of forward\(\)"),
    ],
)
def test_an_operator_that_is_not_supported(
    op: str, shape: list[Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = one_node(tmp_path, op, shape)
    with pytest.raises(ModelError, match=message) as caught:
        build_engine(source, TARGET, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one.engine.log"]  # kept: the error names it
    assert capfd.readouterr() == ("", "")


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


@needs_rtx
def test_the_layer_is_named(tmp_path: Path) -> None:
    """Nodes of an exported file are called after the modules they come from."""
    network = nn.Sequential()
    network.add_module("first", nn.ReLU())
    network.add_module("second", Determinant())
    export_onnx(network, [(torch.randn(4, 3, 3), None)], tmp_path / "m.onnx", Export())
    with pytest.raises(ModelError, match=r"cannot build Det 'second/\w+': it is not supported"):
        build_engine(tmp_path / "m.onnx", TARGET, tmp_path)


@needs_rtx
def test_a_build_that_fails_after_parsing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Activations that are quantised unsigned: the file parses, the builder refuses."""
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantise"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dequantise"),
        ],
        "asymmetric",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
            numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        ],
    )
    source = tmp_path / "asymmetric.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), source)
    with pytest.raises(ModelError, match=r"asymmetric\.onnx: tensorrt-rtx cannot .*log") as caught:
        build_engine(source, TARGET, tmp_path)
    assert "/_src/" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_a_failed_build_leaves_no_old_engine(tmp_path: Path) -> None:
    source = one_node(tmp_path, "Sigmoid", ["N", 3])
    engine = tmp_path / build_engine(source, TARGET, tmp_path).path
    assert engine.is_file()
    one_node(tmp_path, "Unheard", ["N", 3])
    with pytest.raises(ModelError):
        build_engine(source, TARGET, tmp_path)
    assert not engine.exists() and not record_path(engine).exists()


@needs_rtx
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\x08\x0a\x12\xff", "not an ONNX file|cannot build"), (b"", "cannot build")],
)
def test_files_that_are_not_onnx(content: bytes | None, message: str, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        build_engine(source, TARGET, tmp_path)


@needs_rtx
def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    source = one_node(tmp_path, "Sigmoid", ["N", 3])
    proto = onnx.load(source)
    tensor = proto.graph.initializer.add(
        name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../../etc/passwd")
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the file's folder"):
        build_engine(source, TARGET, tmp_path)


# --- what the target says ---------------------------------------------------------------------------------------------


@needs_rtx
def test_compute_capabilities_that_the_library_lacks(tmp_path: Path) -> None:
    source = one_node(tmp_path, "Sigmoid", ["N", 3])
    with pytest.raises(ConfigError, match=r"target 'rtx'.*cannot build for 9\.0; write some of 7\.5.*12\.1"):
        build_engine(source, replace(TARGET, compute_capabilities=("8.9", "9.0")), tmp_path)


@needs_rtx
@pytest.mark.skipif(bool(this_machine().gpus), reason="a GPU is here")
def test_no_gpu_and_no_compute_capability(tmp_path: Path) -> None:
    source = one_node(tmp_path, "Sigmoid", ["N", 3])
    with pytest.raises(RuntimeUnavailableError, match="name compute_capabilities in the target"):
        build_engine(source, replace(TARGET, compute_capabilities=()), tmp_path)


def test_profiles(tmp_path: Path) -> None:
    proto = onnx.load(one_node(tmp_path, "Sigmoid", ["batch", 3, "length"]))
    ranged = replace(TARGET, batch_size=2, batch_range=(1, 2, 8), dynamic_dims={"length": (4, 16, 32)})
    assert make_profile(proto, ranged) == {"x": ((1, 3, 4), (2, 3, 16), (8, 3, 32))}
    with pytest.raises(ConfigError, match=r"'x' has a dynamic axis 2 \(length\) and no profile.*add length = \["):
        make_profile(proto, TARGET)
    assert make_profile(onnx.load(one_node(tmp_path, "Sigmoid", [1, 3])), TARGET) == {}


@needs_rtx
def test_a_dynamic_length_builds(tmp_path: Path) -> None:
    source = one_node(tmp_path, "Softmax", ["batch", 3, "length"], axis=-1)
    engine = build_engine(source, replace(TARGET, dynamic_dims={"length": (4, 16, 32)}, workspace="64 MiB"), tmp_path)
    assert engine.profile["x"][2] == (128, 3, 32)


def test_stored_precisions(files: dict[tuple[str, str], Path]) -> None:
    for (_, precision), path in files.items():
        assert stored_precisions(onnx.load(path)) == (precision,)


def test_what_a_runtime_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "m.onnx"
    assert runnable(source, Target(runtime="onnxruntime")) == source
    (tmp_path / "m.engine").touch()
    assert runnable(source, TARGET) == tmp_path / "m.engine"


# --- the child --------------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "killed by SIGSEGV"),
        ("raise MemoryError('all gone')", "MemoryError: all gone"),
    ],
)
def test_a_builder_that_crashes(body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(body)
    monkeypatch.setattr(module, "_CHILD", child)
    with pytest.raises(ModelError, match=message):
        build_engine(one_node(tmp_path, "Sigmoid", ["N", 3]), TARGET, tmp_path)


class Recorder:
    """Stands for any object of the bindings: remembers calls as `name(arguments)`, and gives itself for every name."""

    def __init__(self, calls: list[str], name: str = "") -> None:
        self.calls, self.name = calls, name

    def __getattr__(self, name: str) -> "Recorder":
        return Recorder(self.calls, name)

    def __call__(self, *arguments: Any) -> Any:
        shown = [a.name if isinstance(a, Recorder) else a for a in arguments]
        self.calls.append(f"{self.name}({', '.join(map(str, shown))})")
        if self.name in ("build_serialized_network", "serialize"):
            return b"engine"
        return "" if self.name == "get_engine_information" else Recorder(self.calls, self.name)

    def __int__(self) -> int:
        return {"EXPLICIT_BATCH": 0}[self.name]

    def __lt__(self, other: int) -> bool:
        return False


def fake_tensorrt(major: int, calls: list[str]) -> Any:
    class Trt(Recorder):
        __version__ = f"{major}.3.0"

        class ILogger:
            pass

        class BuilderFlag:
            __members__: dict[str, Any] = {}  # noqa: RUF012
            FP16, INT8 = Recorder(calls, "FP16"), Recorder(calls, "INT8")

    return Trt(calls)


@pytest.mark.parametrize(
    ("major", "precisions", "network_flags", "flags"),
    [
        (10, ["fp32"], 1, set()),
        (10, ["fp16"], 1, {"set_flag(FP16)"}),
        (10, ["int8", "fp16"], 1, {"set_flag(INT8)", "set_flag(FP16)"}),
        (11, ["int8", "fp16"], 0, set()),
    ],
)
def test_settings_of_the_data_centre_builders(
    major: int,
    precisions: list[str],
    network_flags: int,
    flags: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No GPU is here for the real ones: this checks the calls, with names that the wheels have, and nothing more."""
    calls: list[str] = []
    row = next(row for row in LIBRARIES if (row.runtime, row.major) == ("tensorrt", major))
    monkeypatch.setattr(engine_child, "load_library", lambda _: (fake_tensorrt(major, calls), row))
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known")
    answer = engine_child.main(
        {
            "runtime": "tensorrt",
            "onnx": "m.onnx",
            "engine": str(tmp_path / "m.engine"),
            "profile": {"x": [[1, 3], [4, 3], [8, 3]]},
            "precisions": precisions,
            "compute_capabilities": ["8.7"],
            "workspace_bytes": 2**20,
            "timing_cache": str(cache),
        }
    )
    assert "error" not in answer and (tmp_path / "m.engine").read_bytes() == b"engine"
    assert f"create_network({network_flags})" in calls
    assert {call for call in calls if call.startswith("set_flag")} == flags
    assert f"set_memory_pool_limit(WORKSPACE, {2**20})" in calls
    assert "create_timing_cache(b'known')" in calls and cache.read_bytes() == b"engine"
    assert "set_shape(x, (1, 3), (4, 3), (8, 3))" in calls
    assert not any("compute_capabilit" in call for call in calls)
    assert answer["layers_source"] == "engine inspector"


def test_a_timing_cache_is_for_one_version_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "load_library", lambda _: (fake_tensorrt(10, []), LIBRARIES[0]))
    other_gpu = replace(HERE, gpus=(Gpu(name="NVIDIA L40S", compute_capability="8.9"),))
    paths = {module._timing_cache(LIBRARIES[0], here) for here in (HERE, other_gpu, replace(HERE, driver="1"))}
    assert len(paths) == 3 and all(path.parent == tmp_path / "timing" for path in paths)
    assert all("tensorrt-10.3.0-" in path.name for path in paths)


# --- loading ----------------------------------------------------------------------------------------------------------

HERE = Machine(
    system="Linux", architecture="x86_64", gpus=(Gpu(name="NVIDIA L4", compute_capability="8.9"),), driver="580.1"
)
KEY = EngineKey(
    library="tensorrt", version="10.3.0", compute_capabilities=("8.9",), driver="580.1", platform="Linux x86_64"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"version": "10.9.0"}, "was built by tensorrt 10.9.0, and tensorrt 10.3.0 is installed here"),
        ({"library": "tensorrt-rtx"}, "was built by tensorrt-rtx"),
        ({"platform": "Linux aarch64"}, "was built for Linux aarch64, and this machine is Linux x86_64"),
        ({"compute_capabilities": ("8.6", "8.7")}, "for compute capability 8.6, 8.7, and NVIDIA L4 has 8.9"),
        ({"driver": "570.2"}, "was built with driver 570.2, and this machine has 580.1"),
        ({"driver": ""}, ""),
    ],
)
def test_keys(changes: dict[str, Any], message: str) -> None:
    problem = find_mismatch(replace(KEY, **changes), "tensorrt", "10.3.0", HERE)
    assert message in problem if message else problem == ""


@needs_rtx
class TestLoading:
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Path:
        return tmp_path / build_engine(one_node(tmp_path, "Sigmoid", ["N", 3]), TARGET, tmp_path).path

    def open(self, path: Path) -> None:
        with make_runtime(TARGET).open(path, num_threads=1):
            pass

    @pytest.mark.skipif(bool(this_machine().gpus), reason="a GPU is here")
    def test_without_a_gpu(self, engine: Path) -> None:
        with pytest.raises(RuntimeUnavailableError, match="an engine runs on an NVIDIA GPU and none is usable here"):
            self.open(engine)

    def test_an_exchanged_engine(self, engine: Path) -> None:
        engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
        with pytest.raises(ModelError, match=r"sha256 differs.*rebuild the engine from the ONNX file"):
            self.open(engine)

    def test_without_its_record(self, engine: Path) -> None:
        record_path(engine).unlink()
        with pytest.raises(ModelError, match=r"one\.engine\.json: there is no such file.*rebuild"):
            self.open(engine)

    @pytest.mark.parametrize("content", ["", "{}", '{"path": 1'])
    def test_with_a_damaged_record(self, engine: Path, content: str) -> None:
        record_path(engine).write_text(content)
        with pytest.raises(ModelError, match=r"not the record of an engine.*rebuild"):
            self.open(engine)

    def test_of_another_version(self, engine: Path) -> None:
        stored = json.loads(record_path(engine).read_text())
        stored["key"]["version"] = "1.0.0"
        record_path(engine).write_text(json.dumps(stored))
        with pytest.raises(
            ModelError, match=r"was built by tensorrt-rtx 1\.0\.0.*rebuild the engine from the ONNX file"
        ):
            self.open(engine)

    def test_for_another_gpu(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hopper = replace(HERE, gpus=(Gpu(name="NVIDIA H100", compute_capability="9.0"),))
        monkeypatch.setattr(engine_file, "this_machine", lambda: hopper)
        with pytest.raises(ModelError, match=r"for compute capability 8\.6, 8\.9, 12\.0, and NVIDIA H100 has 9\.0"):
            read_engine(engine, "tensorrt-rtx", TRT.__version__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_rtx
def test_an_engine_runs(files: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    engine = build_engine(files["resnet", "fp32"], replace(TARGET, compute_capabilities=()), tmp_path)
    x = torch.randn(4, 3, 32, 32).numpy()
    with make_runtime(TARGET).open(tmp_path / engine.path, num_threads=1) as session:
        (got,) = session.run({session.input_names[0]: x})
    with make_runtime(Target(runtime="onnxruntime")).open(files["resnet", "fp32"], num_threads=1) as session:
        (want,) = session.run({session.input_names[0]: x})
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


# --- names of the bindings --------------------------------------------------------------------------------------------

# Attributes that our code reads from the bindings, by the object they belong to. Found as strings in
# tensorrt_bindings/tensorrt.so of these wheels from PyPI: tensorrt_cu12_bindings 10.3.0 (the version of JetPack 6.1)
# and 10.13.3.9, tensorrt_cu13_bindings 11.4.0.106. TensorRT-RTX is looked at below.
USED: dict[str, tuple[str, ...]] = {
    "": ("Builder", "OnnxParser", "ILogger", "Logger", "Runtime", "BuilderFlag", "MemoryPoolType", "ProfilingVerbosity",
         "NetworkDefinitionCreationFlag", "LayerInformationFormat", "TensorIOMode", "nptype"),
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "IBuilderConfig": ("profiling_verbosity", "set_flag", "get_flag", "set_memory_pool_limit", "create_timing_cache",
                       "set_timing_cache", "get_timing_cache", "add_optimization_profile"),
    "ITimingCache": ("serialize",),
    "IOptimizationProfile": ("set_shape",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_engine_inspector", "create_execution_context", "num_io_tensors", "get_tensor_name",
                    "get_tensor_mode", "get_tensor_dtype", "get_tensor_profile_shape"),
    "EngineInspector": ("get_engine_information",),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "infer_shapes", "get_tensor_shape",
                          "execute_async_v3"),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED",),
    "LayerInformationFormat": ("ONELINE",),
    "TensorIOMode": ("INPUT",),
    "Logger": ("ERROR",),
}  # fmt: skip
USED_OF_RTX: dict[str, tuple[str, ...]] = {
    "": ("ComputeCapability",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
}
# In the 10.x wheels and not in the 11.x one (INT8 is there as a DataType): docs.nvidia.com/deeplearning/tensorrt,
# migration from 10.x to 11.x, "networks are always strongly typed".
ONLY_OF_10 = {"EXPLICIT_BATCH", "FP16", "INT8"}


@needs_rtx
def test_the_names_used_exist() -> None:
    for used in (USED, USED_OF_RTX):
        for owner, names in used.items():
            holder = getattr(TRT, owner) if owner else TRT
            assert [name for name in names if not hasattr(holder, name)] == [], owner


def test_the_list_of_names_is_complete() -> None:
    """Whatever our code reads from the bindings is in the lists above."""
    listed = {name for used in (USED, USED_OF_RTX) for names in used.values() for name in names} | {"__version__"}
    sources = [Path(module.__file__).with_name("engine_child.py"), Path(engine_file.__file__).with_name("tensorrt.py")]
    owners = r"(?<![\w.])(?:self\.)?(?:trt|builder|parser|e|config|profile|runtime|engine|context)"
    read = {name for source in sources for name in re.findall(owners + r"\.(\w+)", source.read_text())}
    assert read - listed - {"_Job", "build_engine"} == set()  # those two in a docstring


def test_flags_of_10_are_asked_of_10_alone() -> None:
    for library in LIBRARIES:
        asked = {*library.network_flags, *(n for names in (library.precision_flags or {}).values() for n in names)}
        assert asked == (ONLY_OF_10 if library.major == 10 else set())


@needs_rtx
def test_rtx_has_no_flags_of_10_and_all_its_capabilities() -> None:
    assert ONLY_OF_10.isdisjoint({*TRT.BuilderFlag.__members__, *TRT.NetworkDefinitionCreationFlag.__members__})
    numbers = {name.removeprefix("SM") for name in TRT.ComputeCapability.__members__ if name.startswith("SM")}
    assert numbers == {capability.replace(".", "") for capability in RTX.ahead_of_time}


@pytest.mark.parametrize("wheel", ["tensorrt"])
def test_tensorrt_itself(wheel: str) -> None:
    """Where the data-centre library is installed, its names are looked at too."""
    try:
        trt, library = load_library(wheel)
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    for owner, names in USED.items():
        holder = getattr(trt, owner) if owner else trt
        assert [name for name in names if not hasattr(holder, name)] == [], owner
    flags = {*trt.BuilderFlag.__members__, *trt.NetworkDefinitionCreationFlag.__members__}
    assert ONLY_OF_10.issubset(flags) == (library.major == 10)


def test_layers_of_a_listing() -> None:
    listing = (
        "Layers:\nName: conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Datatype: Half } ], Constants: [], "
        "Outputs: [ { Name: y, Dimensions: [-1,8], Datatype: Half, Format: (NHWC) } ], TacticName: t, StreamId: 0, "
        "Metadata: [ONNX Layer: layer1.conv]\x1f[ONNX Layer: layer1.act]\n\nI/O Tensors:\n Name: x, IOMode: Input\n"
    )
    (layer,) = parse_layers(listing)
    assert (layer.name, layer.kind, layer.output_types) == ("conv_myl0_2", "correlation", ("Half",))
    assert layer.nodes == ("layer1.conv", "layer1.act")
    assert parse_layers("") == ()


# --- the real networks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("name", ["resnet56_cifar10", "vit_cifar10", "sst2_transformer"])
def test_real_networks_build(
    name: str,
    tmp_path: Path,
    cifar10_dir: Path,
    resnet_weights: Callable[[int], Path],
    vit_weights: Path,
    sst2_dir: Path,
) -> None:
    """FP32, FP16 and INT8, for three compute capabilities, from the user's own pipelines."""
    from deploypipe.pruning.surgery.slim_attention import with_slim_attention
    from deploypipe.task import take_calib
    from deploypipe.user_pipeline import load_pipeline
    from pipelines import sst2_transformer

    settings = {
        "resnet56_cifar10": {"CIFAR10_DIR": str(cifar10_dir), "WEIGHTS": str(resnet_weights(56))},
        "vit_cifar10": {"CIFAR10_DIR": str(cifar10_dir), "WEIGHTS": str(vit_weights)},
        "sst2_transformer": {"SST2_DIR": str(sst2_dir)},
    }[name]
    loaded = load_pipeline(name, settings)
    batches = take_calib(loaded.load_data().calib, 16)
    source = tmp_path / "model.onnx"
    # An engine is built from untrained weights alike, and SST-2's network would be trained first.
    model = sst2_transformer.SentenceNet() if name == "sst2_transformer" else loaded.build_model()
    export_onnx(with_slim_attention(model).cpu().eval(), batches, source, Export())
    example = batches[0][0]
    variants = {"fp32": source, "fp16": to_half(source, tmp_path / "fp16.onnx")}
    if isinstance(example, Tensor):
        variants["int8"] = to_int8(source, tmp_path / "int8.onnx", example)
    for precision, path in variants.items():
        engine = build_engine(path, TARGET, tmp_path)
        assert (engine.precision, engine.key.compute_capabilities) == (precision, ALL)
        sys.stdout.write(
            f"{name} {precision}: onnx {path.stat().st_size / 2**20:.2f} MiB, engine {engine.size_bytes / 2**20:.2f} "
            f"MiB, {engine.build_seconds:.1f} s, {len(engine.layers)} layers\n"
        )
        os.remove(tmp_path / engine.path)
