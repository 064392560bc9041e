"""Bundles as servers and registries take them: read by Triton's own schema, pushed to a real container registry."""

import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import onnx
import pytest
from onnx import TensorProto, helper
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BundleError
from deploypipe.release.bundle import make_bundle
from deploypipe.release.oci_layout import write_oci
from deploypipe.release.triton_repository import triton_config, write_triton
from deploypipe.target import Target

RUNNER = CliRunner()
_STARTING_SECONDS = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_run(folder / "run")
    return make_bundle(folder / "run", folder / "bundles")


def parsed(config: str) -> Any:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is absent")
    from google.protobuf import text_format

    return text_format.Parse(config, schema.ModelConfig())


def test_triton_repository(bundle: Path, tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["layout", str(bundle), "--as", "triton", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "digits-x86_cpu"
    assert (folder / "1" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("digits-x86_cpu", "onnxruntime", 128)
    assert [(x.name, list(x.dims)) for x in config.input] == [("input", [4])]
    assert [(x.name, list(x.dims)) for x in config.output] == [("output", [3])]
    assert config.input[0].data_type == config.output[0].data_type == 11  # TYPE_FP32
    assert config.HasField("dynamic_batching")
    assert config.instance_group[0].kind == 2  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    with pytest.raises(BundleError, match="exists already"):
        write_triton(bundle, tmp_path)


def graph(inputs: dict[str, tuple[int, list[int | str]]], outputs: dict[str, tuple[int, list[int | str]]]) -> Any:
    values = [[helper.make_tensor_value_info(n, *about) for n, about in side.items()] for side in (inputs, outputs)]
    return helper.make_graph([], "any", *values)


def test_triton_config_follows_model_and_target() -> None:
    inputs = {'odd "name"': (TensorProto.INT64, ["batch", "sequence"]), "mask": (TensorProto.BOOL, ["batch", 7])}
    made = graph(inputs, {"score": (TensorProto.FLOAT16, ["batch"])})
    target = Target(runtime="onnxruntime", provider="tensorrt", batch_size=4, batch_range=(1, 4, 32))
    config = parsed(triton_config("m", made, target, has_engine=False))
    assert [(x.name, list(x.dims)) for x in config.input] == [('odd "name"', [-1]), ("mask", [7])]
    assert list(config.output[0].dims) == [1] and list(config.output[0].reshape.shape) == []
    assert config.output[0].HasField("reshape") and config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert config.optimization.execution_accelerators.gpu_execution_accelerator[0].name == "tensorrt"
    engine = parsed(triton_config("m", made, Target(runtime="tensorrt"), has_engine=True))
    assert engine.backend == "tensorrt" and not engine.parameters

    fixed = graph({"image": (TensorProto.FLOAT, [1, 3, 8, 8])}, {"class": (TensorProto.INT32, [1])})
    config = parsed(triton_config("m", fixed, Target(runtime="onnxruntime"), has_engine=False))
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [1, 3, 8, 8]
    assert not config.HasField("dynamic_batching")
    odd = graph({"x": (TensorProto.COMPLEX64, ["batch", 1])}, {})
    with pytest.raises(BundleError, match="no type for ONNX's COMPLEX64"):
        triton_config("m", odd, Target(runtime="onnxruntime"), has_engine=False)


def test_oci_layout(bundle: Path, tmp_path: Path) -> None:
    first, second = (write_oci(bundle, tmp_path / name) for name in ("a", "b"))
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (first, second)]
    assert contents[0] == contents[1]
    blobs = first / "blobs" / "sha256"
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs.iterdir())

    def read(descriptor: dict[str, Any]) -> bytes:
        content = (blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes()
        assert len(content) == descriptor["size"]
        return content

    [image] = json.loads((first / "index.json").read_bytes())["manifests"]
    manifest = json.loads(read(image))
    titles = {layer["annotations"]["org.opencontainers.image.title"]: read(layer) for layer in manifest["layers"]}
    assert titles == {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert read(manifest["config"]) == b"{}"
    assert len(list(blobs.iterdir())) == len({*titles.values()}) + 2
    with pytest.raises(BundleError, match="exists already"):
        write_oci(bundle, tmp_path / "a")


def test_a_changed_bundle_gets_no_layout(bundle: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(bundle, tmp_path / "changed")
    onnx.save(helper.make_model(graph({}, {})), changed / "model.onnx")
    for form in ("triton", "oci"):
        done = RUNNER.invoke(app, ["layout", str(changed), "--as", form, "--out", str(tmp_path / form)])
        assert done.exit_code == 2 and "was changed" in done.output
        assert not (tmp_path / form).exists()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of CNCF Distribution, as Debian's docker-registry packages it."""
    if not (shutil.which("docker-registry") and shutil.which("skopeo")):
        pytest.skip("docker-registry and skopeo (Debian packages) are absent")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(tmp_path / "stored")}}}
    (tmp_path / "registry.json").write_text(json.dumps({**config, "http": {"addr": address}}))
    process = subprocess.Popen(["docker-registry", "serve", str(tmp_path / "registry.json")], stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while time.monotonic() - begun < _STARTING_SECONDS:
        try:
            urlopen(f"http://{address}/v2/", timeout=2).close()
            break
        except (URLError, OSError):
            time.sleep(0.1)
    yield address
    process.kill()
    process.wait()


def test_a_container_registry_accepts_the_layout(registry: str, bundle: Path, tmp_path: Path) -> None:
    folder = write_oci(bundle, tmp_path / "oci")
    digest = json.loads((folder / "index.json").read_bytes())["manifests"][0]["digest"]
    tag = bundle.name.rpartition("-")[2]
    there = f"docker://{registry}/digits:{tag}"
    insecure = ["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    for source, out in ((f"oci:{folder}:{tag}", there), (there, f"oci:{tmp_path / 'back'}:{tag}")):
        done = subprocess.run(["skopeo", *insecure, source, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    back = json.loads((tmp_path / "back" / "index.json").read_bytes())["manifests"][0]["digest"]
    assert back == digest
