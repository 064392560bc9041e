"""A name that becomes a folder, a tag or a model cannot lead elsewhere, whatever entrance it comes through."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from releasable_run import write_run
from torch import nn
from typer.testing import CliRunner

from deploypipe import compress
from deploypipe.cli import app
from deploypipe.errors import BundleError, ConfigError
from deploypipe.recipe import Recipe
from deploypipe.release.bundle import bundle_name
from deploypipe.release.registries.registry import promote, resolve
from deploypipe.target import Target
from deploypipe.task import Splits, classification
from deploypipe.text.safe_names import MAX_NAME_BYTES, name_problem

RUNNER = CliRunner()
USUAL = ["x86_cpu", "jetson-orin", "résumé", "v1.2+cu13", "模型", "7b", "_own", "model.onnx.data"]
ODD = ["../up", "/etc", "a/b", "a\\b", "..", ".", ".hidden", "-rf", "a\nb", "a\0b", "a\u202eb", "a@b", "a b", "ﬁ"]
ODD += ["e\u0301", "NUL", "com1.x", "a.", "a..b", "x" * 300, "é" * 51, "'; drop"]


@pytest.mark.parametrize("name", USUAL)
def test_usual_names(name: str) -> None:
    assert name_problem(name) == ""


@pytest.mark.parametrize("name", ["", *ODD])
def test_odd_names_are_refused_by_what_is_odd(name: str) -> None:
    told = name_problem(name)
    assert told.endswith("; use letters, digits and any of _ - . +, with a letter or digit first")
    assert told.isprintable() and len(told) < 400


@given(st.text(max_size=2 * MAX_NAME_BYTES))
def test_what_passes_is_one_file_in_its_folder(name: str) -> None:
    if not name_problem(name):
        assert Path("folder", name).resolve() == Path("folder").resolve() / name
        assert name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES
        assert name == name.strip("-.").strip() or name[-1] == "-"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pipe.py").write_text("from tiny_pipeline import *\n", encoding="utf-8")
    (tmp_path / "cpu.toml").write_text('runtime = "onnxruntime"\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["../up", "a\u202eb", "NUL"])
def test_no_command_takes_one(name: str, home: Path) -> None:
    (home / "odd.toml").write_text(f'runtime = "onnxruntime"\nname = {json.dumps(name)}\n', encoding="utf-8")
    before = sorted(home.rglob("*"))
    run = ["run", "./pipe.py"]
    for command in (
        [*run, "./odd.toml"],
        [*run, "./cpu.toml", "--set", f"target.name={json.dumps(name)}"],
        [*run, "./cpu.toml", "--storage", "sqlite:///s.db", f"--name={name}"],
        ["bench", "absent.onnx", "./odd.toml"],
        ["worker", "--storage", "sqlite:///s.db", f"--run={name}"],
        ["promote", "absent", f"--alias={name}"],
        ["layout", f"s3://nowhere/name@{name}", "--as", "oci", "--out", "out"],
        ["verify", f"models:/{name}@production"],
    ):
        done = RUNNER.invoke(app, command)
        [told] = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert done.exit_code == 2 and "; use letters, digits and any of" in told, (command, told)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("name", ["-x", "a b", "a\u202eb"])
def test_files_that_would_name_a_run(name: str, home: Path) -> None:
    for source, copy in (("pipe.py", f"{name}.py"), ("cpu.toml", f"{name}.toml")):
        (home / copy).write_bytes((home / source).read_bytes())
    for command in (["run", f"./{name}.py", "./cpu.toml"], ["run", "./pipe.py", f"./{name}.toml"]):
        done = RUNNER.invoke(app, command)
        assert done.exit_code == 2 and "is named after its file, but" in done.output.replace("\n", " ")
    assert not (home / "runs").exists()


def test_targets_that_a_file_system_may_take_for_one(home: Path) -> None:
    (home / "CPU.toml").write_bytes((home / "cpu.toml").read_bytes())
    done = RUNNER.invoke(app, ["run", "./pipe.py", "./cpu.toml", "./CPU.toml"])
    assert done.exit_code == 2 and "is given twice" in done.output


def test_names_in_results_aliases_and_calls(tmp_path: Path) -> None:
    result = write_run(tmp_path / "run")
    with pytest.raises(BundleError, match=r"pipeline has a name .*'\.\./\.\./x' holds '/'"):
        bundle_name(replace(result, pipeline="../../x"))
    for reference in ("registry/name@../../x", "s3://bucket/..@production", "models:/x' or '1@production"):
        with pytest.raises(BundleError, match=r"the (alias|bundle)'s name ['\"].*['\"] (holds|begins)"):
            resolve(reference)
    with pytest.raises(BundleError, match=r"the alias '-x' begins with '-'"):
        promote(tmp_path, str(tmp_path / "registry"), "-x")
    split = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]
    splits = Splits(calib=split, train=split, val=split, test=split)
    with pytest.raises(ConfigError, match=r"compress: name: '\.\./x' holds '/'"):
        target = Target(runtime="onnxruntime")
        compress(nn.Linear(4, 2), splits, classification(), Recipe(), target, tmp_path / "out", name="../x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
