"""A model file that never ends, or asks for terabytes, ends with one error: in `bench`, `verify` and the gate."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from releasable_run import write_run
from safetensors.numpy import save_file
from typer.testing import CliRunner
from warm_python import start

from deploypipe.benchmark.child_processes.run_child import try_file
from deploypipe.benchmark.input_batches import load_inputs, make_inputs, read_specs
from deploypipe.cli import app
from deploypipe.errors import DataError, ModelError, RunFolderError
from deploypipe.files.hashing import file_sha256
from deploypipe.release.baseline_comparison import compare_with_baseline
from deploypipe.release.bundle import MODEL, make_bundle
from deploypipe.runs.result import load_result
from deploypipe.target import Target
from deploypipe.untrusted_files.limited_process import ProcessLimits
from deploypipe.verification.golden_json import GOLDEN, TENSORS
from deploypipe.verification.read_safetensors import read_tensors
from deploypipe.verify import verify

RUNNER = CliRunner()
TARGET = Target(runtime="onnxruntime", name="here")
BATCH = {"input": np.zeros((1, 4), dtype=np.float32)}
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux only")


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def save(
    path: Path, nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto] | None = None, **values: Any
) -> Path:
    """A graph from input (N, 4) to output, with these constants."""
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(value), name) for name, value in values.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9, functions=functions or []), path)
    return path


def loop(count: str) -> onnx.NodeProto:
    """`count` times, what it carries doubled."""
    carried = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b")]
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("c", "d")]
    body = helper.make_graph(
        [node("Identity", "c", "d"), node("Add", "a a", "b")],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flags[0], carried[0]],
        [flags[1], carried[1]],
    )
    return node("Loop", f"{count} go input", "output", body=body)


def endless(path: Path) -> Path:
    return save(path, [loop("n")], n=2**62, go=True)


def endless_in_large_batches(path: Path) -> Path:
    """One round for one sample; 2 ** 60 rounds for two."""
    count = [node("Shape", "input", "s", end=1), node("Pow", "s e", "p"), node("Squeeze", "p", "n")]
    return save(path, [*count, loop("n")], e=np.array([60]), go=True)


def immense(path: Path) -> Path:
    """A tensor of 4 TiB that no inspection of the file tells."""
    tensor = [node("ConstantOfShape", "s", "t"), node("ReduceSum", "t", "r", keepdims=0)]
    return save(path, [*tensor, node("Add", "input r", "output")], s=np.array([2**40]))


def large(path: Path) -> Path:
    """512 MiB."""
    tensor = [node("ConstantOfShape", "s", "t"), node("ReduceSum", "t", "r", keepdims=0)]
    return save(path, [*tensor, node("Add", "input r", "output")], s=np.array([2**27]))


def laughs(path: Path) -> Path:
    """Functions that call one another: a billion nodes from a hundred."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "f0", ["x"], ["y"], [node("Neg", "x", "y")], imports)]
    for level in range(1, 10):
        calls = [node(f"f{level - 1}", f"v{i}" if i else "x", f"v{i + 1}", domain="own") for i in range(10)]
        functions.append(helper.make_function("own", f"f{level}", ["x"], ["v10"], calls, imports))
    return save(path, [node("f9", "input", "output", domain="own")], functions)


@pytest.mark.parametrize("make", [endless, pytest.param(immense, marks=linux_only), laughs])
def test_bench_ends_with_one_error(make: Any, tmp_path: Path) -> None:
    (tmp_path / "cpu.toml").write_text('runtime = "onnxruntime"\n', encoding="utf-8")
    path = make(tmp_path / "model.onnx")
    limits = ["--time-limit", "20" if make is immense else "1", "--memory-limit", "1000"]
    done = RUNNER.invoke(app, ["bench", str(path), str(tmp_path / "cpu.toml"), *limits])
    [error] = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2 and "model.onnx: cannot be loaded and run once: " in error
    assert ("the limit of 1,000 MiB" if make is immense else "took over 1 s") in error
    assert error.endswith("--time-limit and --memory-limit")


@linux_only
def test_memory_is_limited_to_what_is_asked(tmp_path: Path) -> None:
    path = large(tmp_path / "large.onnx")
    with pytest.raises(ModelError, match=r"large\.onnx: cannot be .* needs more memory than the limit of 300 MiB"):
        try_file(path, BATCH, TARGET, ProcessLimits(memory_mib=300))
    assert try_file(path, BATCH, TARGET, ProcessLimits(memory_mib=2000)) == {}


def test_batch_sizes_that_never_end_are_not_swept(tmp_path: Path) -> None:
    path = endless_in_large_batches(tmp_path / "model.onnx")
    assert try_file(path, BATCH, TARGET, ProcessLimits()) == {}
    refused = try_file(path, BATCH, TARGET, ProcessLimits(seconds=5), batch_sizes=[1, 2])
    assert sorted(refused) == [2] and "took over 5 s" in refused[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")
    folder = tmp_path_factory.mktemp("bundle")
    write_run(folder / "run")
    return make_bundle(folder / "run", folder)


def replaced(bundle: Path, folder: Path, name: str, content: bytes) -> Path:
    """A golden folder of one who changes a file and its entry too."""
    shutil.copytree(bundle, folder)
    for extra in set(os.listdir(folder)) - {MODEL, GOLDEN, TENSORS}:
        (folder / extra).unlink()
    (folder / name).write_bytes(content)
    golden = json.loads((folder / GOLDEN).read_bytes())
    for entry in golden["files"]:
        if entry["name"] == name:
            entry |= {"sha256": file_sha256(folder / name), "size_bytes": len(content)}
    (folder / GOLDEN).write_text(json.dumps(golden), encoding="utf-8")
    return folder


def test_verify_ends_with_one_error(bundle: Path, tmp_path: Path) -> None:
    hostile = endless(tmp_path / "hostile.onnx").read_bytes()
    folder = replaced(bundle, tmp_path / "golden", MODEL, hostile)
    command = [str(folder), "--time-limit", "1"]
    for done in (
        RUNNER.invoke(app, ["verify", *command]),
        subprocess.run([sys.executable, "-m", "deploypipe.verify", *command], capture_output=True, text=True),
    ):
        told = f"{done.stdout}{done.stderr}"
        assert "model.onnx: cannot be run here: took over 1 s" in told and "Traceback" not in told
        assert (done.exit_code if hasattr(done, "exit_code") else done.returncode) == 2


@linux_only
def test_verify_limits_memory(bundle: Path, tmp_path: Path) -> None:
    hostile = immense(tmp_path / "hostile.onnx").read_bytes()
    with pytest.raises(ModelError, match=r"model\.onnx: onnxruntime .* cannot run it here .*4398046511104"):
        verify(replaced(bundle, tmp_path / "golden", MODEL, hostile), ProcessLimits(memory_mib=500))


def test_a_baseline_that_never_ends_is_not_timed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("deploypipe.release.baseline_comparison")
    monkeypatch.setattr(module, "ProcessLimits", lambda: ProcessLimits(seconds=1))
    monkeypatch.setattr(module, "load_bundle", lambda _: result)
    result = write_run(tmp_path / "run")
    folder = replaced(bundle, tmp_path / "golden", MODEL, endless(tmp_path / "hostile.onnx").read_bytes())
    compared = compare_with_baseline(tmp_path / "run", result, folder)
    assert compared.latency_ratio is None and "took over 1 s" in " ".join(compared.notes)


def header(text: str, size: int | None = None, content: bytes = b"") -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text.encode() + content


ENTRY = '{"a": {"dtype": "F32", "shape": %s, "data_offsets": [%s]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header("", 2**63),
        header("{}", 2**30),
        header(ENTRY % ("[1152921504606846976]", "0, 4")),
        header(ENTRY % ("[1]", "0, 4611686018427387904")),
        header(ENTRY % ("[1e400]", "0, 4")),
        header("[" * 100_000),
        header('{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_samples_are_bounded_before_they_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(content)
    with pytest.raises(ModelError, match=r"golden\.safetensors: is not a safetensors file"):
        read_tensors(tmp_path / TENSORS)


@linux_only
def test_no_process_outlives_the_one_that_watches_it(tmp_path: Path) -> None:
    """Nobody would end it: a machine that cancels jobs would fill up with them."""
    (tmp_path / "cpu.toml").write_text('runtime = "onnxruntime"\n', encoding="utf-8")
    endless(tmp_path / "model.onnx")
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        parent = start(tmp_path, "-m", "deploypipe", "bench", "model.onnx", "./cpu.toml")
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not (found := children.read_text().split()) or "onnxruntime" not in told_of(found[0], "maps"):
            assert parent.poll() is None
            time.sleep(0.1)  # until it loads its runtime, having told the kernel whom it ends with
        parent.send_signal(number)
        said = parent.communicate(timeout=60)[1]
        assert parent.returncode == code and "Traceback" not in said
        until = time.monotonic() + 30
        while "try_child" in told_of(found[0], "cmdline"):
            assert time.monotonic() < until
            time.sleep(0.1)


def told_of(process: str, file: str) -> str:
    try:
        return Path(f"/proc/{process}/{file}").read_text()
    except OSError:  # it is gone
        return ""


def test_files_of_absurd_size_are_not_read(tmp_path: Path) -> None:
    for name in (TENSORS, "result.json"):
        with (tmp_path / name).open("wb") as stream:
            stream.write(header("{}"))
            stream.truncate(2**40)  # a hole: it takes no room
    with pytest.raises(ModelError, match="1099511627776 bytes with a header of 2 are not golden samples"):
        read_tensors(tmp_path / TENSORS)
    with pytest.raises(RunFolderError, match=r"result\.json: has 1,099,511,627,776 bytes"):
        load_result(tmp_path)


def test_inputs_of_absurd_size_are_not_made(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Neg", "input", "output")])
    with pytest.raises(DataError, match=r"inputs up to input of shape \[1099511627776, 4\] would have .* values"):
        make_inputs(path, read_specs(path), 2**40, {})
    declared = {"shape": (2**40,), "fortran_order": False, "descr": "<f4"}
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, declared)
        stream.write(bytes(2**20))
    with pytest.raises(DataError, match=r"bomb\.npz: holds no named arrays"):
        load_inputs(tmp_path / "bomb.npz")
    save_file({"input": np.zeros((1, 4), np.float32)}, tmp_path / "x.safetensors")
    assert load_inputs(tmp_path / "x.safetensors")["input"].shape == (1, 4)
