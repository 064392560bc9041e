"""The built wheel is enough: installed alone, in an empty folder, without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder / "dist"), str(ROOT)], check=True, timeout=600)
    (wheel,) = (folder / "dist").glob("deploypipe-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def deploypipe(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """-S: what this environment's .pth files add, such as the checkout, is not on the path."""
    packages = Path(torch.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{packages}"}
    command = [sys.executable, "-S", "-P", "-m", "deploypipe", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_targets_and_init(installed: Path, tmp_path: Path) -> None:
    (installed / "deploypipe" / "py.typed").read_text()
    done = deploypipe(installed, tmp_path, "targets", "--verbose")
    assert done.returncode == 0, done.stderr
    assert str(installed / "deploypipe" / "examples" / "targets" / "x86_cpu.toml") in done.stdout
    assert str(ROOT) not in done.stdout
    done = deploypipe(installed, tmp_path, "init", "mine")
    assert done.returncode == 0, done.stderr
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {"pipelines/mine.py", "targets/mine.toml"}
    (tmp_path / "targets" / "x86_cpu.toml").write_text("[budget]\nunknown = 1\n")  # hides the one that came along
    done = deploypipe(installed, tmp_path, "doctor", "x86_cpu")
    assert done.returncode == 2 and "targets/x86_cpu.toml" in done.stderr


def test_an_example_runs(installed: Path, tmp_path: Path) -> None:
    changes = ("search.num_trials=1", "search.num_timed=8", "search.num_finalists=1", "finetune.num_epochs=0")
    arguments = [text for change in changes for text in ("--set", change)]
    done = deploypipe(installed, tmp_path, "run", "digits", "x86_cpu", *arguments)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "runs" / "digits-x86_cpu").iterdir()} >= {"result.json", "model.onnx"}
    assert not (tmp_path / "pipelines").exists()
