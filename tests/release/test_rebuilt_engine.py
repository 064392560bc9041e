"""An engine is built again from the ONNX file of a bundle or run, and compared with the golden outputs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from releasable_run import MODEL, write_model, write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BundleError, ConfigError, RuntimeUnavailableError
from deploypipe.files.hashing import file_sha256
from deploypipe.release.bundle import make_bundle
from deploypipe.release.rebuilt_engine import RebuiltEngine, rebuild_engine, replay_golden
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.runtimes.tensorrt_libraries import load_library
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.target import Target
from deploypipe.verification.golden_json import read_golden

RTX = Target(runtime="tensorrt-rtx", name="rtx", compute_capabilities=("8.6", "8.9"))
HAS_GPU = bool(this_machine().gpus)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_run(folder / "run")
    return make_bundle(folder / "run", folder / "bundles")


def needs_rtx() -> None:
    try:
        load_library("tensorrt-rtx")
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_an_engine_is_built_for_a_device_that_is_not_here(bundle: Path, tmp_path: Path) -> None:
    needs_rtx()
    before = sorted(bundle.iterdir())
    (tmp_path / "rtx.toml").write_text('runtime = "tensorrt-rtx"\ncompute_capabilities = ["8.6"]\n', encoding="utf-8")
    words = ["engine", str(bundle), str(tmp_path / "rtx.toml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "not run: no NVIDIA GPU is usable here" in done.output, done.output
    built = load_record(tmp_path / "out" / "model.engine")
    assert built.key.compute_capabilities == ("8.6",) and built.onnx_sha256 == file_sha256(bundle / MODEL)
    assert sorted(bundle.iterdir()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_gives_what_the_onnx_file_gave(bundle: Path, tmp_path: Path) -> None:
    needs_rtx()
    assert rebuild_engine(bundle, tmp_path / "out", replace(RTX, compute_capabilities=())).is_same


def test_another_file_than_the_golden_ones_differs(bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime stands in for the engine: the same weights, and others."""
    (model,) = read_golden(bundle).models
    same = replay_golden(bundle, model, bundle / MODEL, OnnxRuntime())
    write_model(tmp_path / "other.onnx", seed=1)
    other = replay_golden(bundle, model, tmp_path / "other.onnx", OnnxRuntime())
    built = RebuiltEngine(path=bundle, engine=None, parity=same, max_abs_error=1e-2)  # type: ignore[arg-type]
    assert built.is_same and not replace(built, parity=other).is_same


def test_what_cannot_be_built_is_refused_first(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"opens ONNX files, so there is no engine to build; name a target"):
        rebuild_engine(bundle, tmp_path / "out")
    changed = shutil.copytree(bundle, tmp_path / bundle.name)
    (changed / MODEL).write_bytes(b"exchanged")
    with pytest.raises(BundleError):
        rebuild_engine(changed, tmp_path / "out", RTX)
    assert not (tmp_path / "out").exists()
