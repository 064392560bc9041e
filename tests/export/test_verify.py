"""Golden samples are written next to the files, replayed with numpy and onnxruntime alone, and resist tampering."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import deploypipe
from deploypipe.cli import app
from deploypipe.errors import DataError, ModelError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.golden_samples import write_golden
from deploypipe.files.hashing import file_sha256
from deploypipe.recipe import Export
from deploypipe.verification.golden_json import GOLDEN, TENSORS
from deploypipe.verify import main, verify

# Refuses every import that is neither the standard library nor numpy, onnxruntime or this package.
GUARD = """
import sys

ALLOWED = {"numpy", "onnxruntime", "deploypipe", "_deploypipe_guard", *sys.stdlib_module_names}

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is not on this machine", name=name)

sys.meta_path.insert(0, Guard())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models: one file, and a graph with its weights in a second file."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).eval()
    batches = [(torch.randn(16, 6), None), (torch.randn(3, 6), None)]
    files = {
        "one.onnx": export_onnx(model, batches, folder / "one.onnx", Export()),
        "two.onnx": export_onnx(model, batches, folder / "two.onnx", Export(single_file_mib=0)),
    }
    golden = write_golden(folder, files, batches)
    assert [entry.name for entry in golden.files] == ["one.onnx", "two.onnx", "two.onnx.data", TENSORS, GOLDEN]
    assert all(entry.sha256 == file_sha256(folder / entry.name) for entry in golden.files)
    assert (golden.models, golden.num_samples) == (("one.onnx", "two.onnx"), 4)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def on_a_bare_machine(folder: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    root = str(Path(deploypipe.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "deploypipe.verify", str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
    )


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / GOLDEN).read_bytes())
    change(content)
    (folder / GOLDEN).write_text(json.dumps(content))


def accept(folder: Path, name: str) -> None:
    """What someone does who changes a file and its entry in golden.json too."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["files"]:
            if entry["name"] == name:
                entry |= {"sha256": file_sha256(folder / name), "size_bytes": (folder / name).stat().st_size}

    rewrite(folder, change)


def test_with_numpy_and_onnxruntime_alone(folder: Path, tmp_path: Path) -> None:
    done = on_a_bare_machine(folder, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[-1]) for line in lines[1:]] == [("one.onnx", "same"), ("two.onnx", "same")]
    (folder / "golden.json").unlink()
    done = on_a_bare_machine(folder, tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "has no golden.json" in done.stderr


def test_the_import_guard_of_these_tests_works(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    for name in ("torch", "pydantic", "typer", "onnx", "safetensors"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 1 and b"is not on this machine" in done.stderr


def test_a_file_with_other_outputs(folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(folder / "one.onnx")
    bias = next(weight for weight in proto.graph.initializer if weight.name.endswith("2.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.5, bias.name))
    onnx.save(proto, folder / "one.onnx")
    accept(folder, "one.onnx")
    done = on_a_bare_machine(folder, tmp_path)
    assert done.returncode == 1
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["DIFFERENT", "same"]
    shown = CliRunner().invoke(app, ["verify", str(folder)])
    assert shown.exit_code == 1 and "DIFFERENT" in shown.output


def test_from_the_command_line(folder: Path) -> None:
    (folder / "stray.txt").write_bytes(b"whatever")
    shown = CliRunner().invoke(app, ["verify", str(folder)])
    assert shown.exit_code == 0 and "note: not listed, not checked: stray.txt" in shown.output
    (folder / "two.onnx.data").unlink()
    shown = CliRunner().invoke(app, ["verify", str(folder)])
    assert shown.exit_code == 2 and "two.onnx.data: is missing" in shown.output


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("name", ["one.onnx", "two.onnx", "two.onnx.data", TENSORS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes instead of"), (flip, "was changed"), (Path.unlink, "missing"), (link, "a link")],
)
def test_damage_is_found_before_anything_is_parsed(
    name: str, damage: Callable[[Path], None], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(folder / name)
    monkeypatch.setattr("deploypipe.verify.check_onnx_file", None)  # would raise TypeError
    with pytest.raises(ModelError, match=message) as caught:
        verify(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../one.onnx", "/etc/passwd", "sub/one.onnx", "..", "", "a\\b", "a\0b", "one.onnx\n", "-one.onnx"]
)
def test_names_that_leave_the_folder(name: str, folder: Path) -> None:
    rewrite(folder, lambda content: content["files"][0].update(name=name))
    with pytest.raises(ModelError, match=r"golden\.json: the file name .*; do not use it"):
        verify(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": "another"}',
        b"[" * 100_000,
        b'{"format": "deploypipe-golden-1", "files": [{}], "models": [], "num_cases": 1}',
        b'{"format": "deploypipe-golden-1", "files": [], "models": [], "num_cases": "1"}',
    ],
)
def test_an_invalid_golden_file(content: bytes, folder: Path) -> None:
    (folder / GOLDEN).write_bytes(content)
    with pytest.raises(ModelError, match=r"golden\.json: not understood"):
        verify(folder)


@pytest.mark.parametrize("odd", ["pipe", "link without end"])
def test_a_golden_file_that_is_no_file_is_not_read(odd: str, folder: Path) -> None:
    (folder / GOLDEN).unlink()
    os.mkfifo(folder / GOLDEN) if odd == "pipe" else (folder / GOLDEN).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"golden\.json: not understood .*it is not a plain file"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", ""])
def test_a_model_elsewhere_is_not_opened(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, lambda content: content["models"][0].update(file=name))
    monkeypatch.setattr("deploypipe.verify.check_onnx_file", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(ModelError, match=rf"golden\.json: lists no hash of {re.escape(name)}; copy"):
        verify(folder)


def test_files_that_are_not_listed_are_not_used(folder: Path) -> None:
    rewrite(folder, lambda content: content["files"].pop(2))  # the weights of two.onnx
    with pytest.raises(ModelError, match=r"needs two\.onnx\.data, which golden\.json does not list"):
        verify(folder)


ENTRY = {"name": "one.onnx", "sha256": "0" * 64, "size_bytes": 1}
SAYS_TOO_LITTLE_OR_TOO_MUCH: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no models": (lambda c: c["models"].clear(), "models is empty"),
    "no files": (lambda c: c["files"].clear(), "files is empty"),
    "neither": (lambda c: (c["files"].clear(), c["models"].clear()), "is empty"),
    "no cases": (lambda c: c.update(num_cases=0), "num_cases must be >= 1, got 0"),
    "cases below none": (lambda c: c.update(num_cases=-1), "num_cases must be >= 1"),
    "infinite tolerance": (lambda c: c["models"][0].update(max_abs_error=float("inf")), "Infinity is not a number"),
    "NaN": (lambda c: c["models"][0].update(max_abs_error=float("nan")), "NaN is not a number"),
    "huge tolerance": (lambda c: c["models"][0].update(max_abs_error=1e30), "must be from 0 to 0.001 in fp32"),
    "loose tolerance": (lambda c: c["models"][0].update(max_abs_error=0.0011), "must be from 0 to 0.001 in fp32"),
    "negative tolerance": (lambda c: c["models"][0].update(max_abs_error=-1e-3), "must be from 0"),
    "unknown precision": (lambda c: c["models"][0].update(precision="fp31"), "precision must be one of fp32"),
    "a model twice": (lambda c: c["models"].append(c["models"][0]), "lists one.onnx more than once"),
    "a file twice": (lambda c: c["files"].append(ENTRY), "lists one.onnx more than once"),
    "no hash": (lambda c: c["files"][0].update(sha256="0"), "is not the sha256 of a file"),
    "unknown key": (lambda c: c.update(skip=True), "unknown key skip"),
    "unknown key of a model": (lambda c: c["models"][1].update(note=""), "unknown key note"),
}


@pytest.mark.parametrize("case", SAYS_TOO_LITTLE_OR_TOO_MUCH)
def test_a_golden_file_that_would_check_nothing_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, told = SAYS_TOO_LITTLE_OR_TOO_MUCH[case]
    rewrite(folder, change)
    with pytest.raises(ModelError, match=rf"golden\.json: not understood .*{told}"):
        verify(folder)
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 2


def test_a_key_given_twice_and_an_overflowing_number_are_refused(folder: Path) -> None:
    text = (folder / GOLDEN).read_text()
    for old, new, told in (
        ('"num_cases": 1', '"num_cases": 1, "num_cases": 1', "key 'num_cases' occurs more than once"),
        ('"max_abs_error": 0.001', '"max_abs_error": 1e999', "must be from 0"),
    ):
        assert old in text
        (folder / GOLDEN).write_text(text.replace(old, new))
        with pytest.raises(ModelError, match=told):
            verify(folder)


def test_an_empty_or_partial_folder_is_unusable(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    partial = Path(shutil.copytree(folder, tmp_path / "partial"))
    (partial / TENSORS).unlink()
    for place in (tmp_path / "empty", tmp_path / "absent", partial, folder / GOLDEN):
        assert CliRunner().invoke(app, ["verify", str(place)]).exit_code == 2
        assert main([str(place)]) == 2


@pytest.mark.parametrize("name", ["stray.onnx", "STRAY.ONNX", "stray.ort"])
def test_an_unlisted_model_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"whatever")
    with pytest.raises(ModelError, match=f"golden.json has no outputs for the model {name}"):
        verify(folder)
    (folder / name).unlink()
    rewrite(folder, lambda content: content["models"].pop())  # still one of the files
    with pytest.raises(ModelError, match=r"golden\.json has no outputs for the model two\.onnx"):
        verify(folder)


def answers(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    arrays = load_file(folder / TENSORS)
    change(arrays)
    save_file(arrays, folder / TENSORS)
    accept(folder, TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_stored_outputs_that_are_not_numbers_are_refused(value: float, folder: Path) -> None:
    answers(folder, lambda arrays: arrays["one.onnx/0/output"].fill(value))
    with pytest.raises(ModelError, match=r"one\.onnx: its outputs in golden\.safetensors hold NaN or infinity"):
        verify(folder)


def test_every_stored_tensor_is_used(folder: Path) -> None:
    answers(folder, lambda arrays: arrays.update({"one.onnx/1/output": arrays["one.onnx/0/output"]}))
    with pytest.raises(ModelError, match=r"holds one\.onnx/1/output, which no model reads or returns"):
        verify(folder)


def test_no_outputs_is_an_error(folder: Path) -> None:
    answers(folder, lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}))
    with pytest.raises(ModelError, match="has no output values"):
        verify(folder)


def test_a_model_that_returns_nan_differs(folder: Path) -> None:
    proto = onnx.load(folder / "one.onnx")
    bias = next(weight for weight in proto.graph.initializer if weight.name.endswith("2.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32("nan"), bias.name))
    onnx.save(proto, folder / "one.onnx")
    accept(folder, "one.onnx")
    assert [replay.is_same for replay in verify(folder).replays] == [False, True]


def test_hostile_tensors(folder: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}
    for text in (json.dumps(header).encode(), b"{}" * 9, b"\xff"):
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        accept(folder, TENSORS)
        with pytest.raises(ModelError, match="is not a safetensors file"):
            verify(folder)


def test_a_model_without_samples_and_a_hostile_model(folder: Path) -> None:
    arrays = load_file(folder / TENSORS)
    save_file({name: array for name, array in arrays.items() if not name.startswith("one.onnx")}, folder / TENSORS)
    accept(folder, TENSORS)
    with pytest.raises(ModelError, match=r"golden\.safetensors has no 'one\.onnx/0/output'"):
        verify(folder)
    cut(folder / "one.onnx")
    accept(folder, "one.onnx")
    with pytest.raises(ModelError, match="cut off"):
        verify(folder)


def test_samples_of_each_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    batches = [(torch.randn(n, length, 6), None) for n, length in ((5, 4), (5, 4), (2, 7))]
    file = export_onnx(model, batches, tmp_path / "m.onnx", Export())
    assert write_golden(tmp_path, {"m.onnx": file}, batches).num_samples == 4 + 2
    arrays = load_file(tmp_path / TENSORS)
    assert {name: array.shape for name, array in arrays.items() if name.startswith("input/")} == {
        "input/0/input": (4, 4, 6),
        "input/1/input": (2, 7, 6),
    }
    np.testing.assert_allclose(arrays["m.onnx/1/output"], model(batches[2][0]).detach(), atol=1e-5)
    assert verify(tmp_path).is_same
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_golden(tmp_path, {"m.onnx": file}, batches)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="none with a sample"):
        write_golden(tmp_path, {"m.onnx": file}, [])
    cut(tmp_path / "m.onnx")
    with pytest.raises(ModelError):
        write_golden(tmp_path, {"m.onnx": file}, batches)
