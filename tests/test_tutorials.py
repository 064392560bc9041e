"""The tutorials' pipelines: ready to run as they stand, and brought through by the commands of their pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deploypipe
from deploypipe.data import as_pair
from deploypipe.preflight import check_inputs
from deploypipe.task import forward
from deploypipe.user_pipeline import load_pipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = {
    "digits_cnn": "cnn",
    "hf_text": "huggingface",
    "segmentation": "segmentation",
    "two_inputs": "two-inputs",
    "from_torch_pruning": "torch-pruning",
}
PIPELINES = [name for name in PAGES if name != "from_torch_pruning"]


def untrained(name: str) -> dict[str, str]:
    """The constant that says how long the dense network is trained, set to nothing."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    (constant,) = re.findall(r"^(NUM_(?:EPOCHS|STEPS)) = ", source, re.M)
    return {constant: "0"}


def test_every_tutorial_shows_its_file_and_its_command() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PAGES)
    for name, page in PAGES.items():
        text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
        assert f"```{{literalinclude}} ../examples/{name}.py" in text
        command = f"deploypipe run docs/examples/{name}.py x86_cpu" if name in PIPELINES else f"python {name}.py"
        assert command in text


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_a_tutorial_is_ready(name: str) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pipeline = load_pipeline(str(EXAMPLES / f"{name}.py"), untrained(name))
    target = deploypipe.load_target(ROOT / "targets" / "x86_cpu.toml")
    check_inputs(pipeline.build_model(), pipeline.load_data(), pipeline.task(), pipeline.recipe(), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_the_dense_network_of_a_tutorial_is_trained(name: str) -> None:
    """Far above chance: a tutorial about a network that knows nothing would show nothing."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pipeline = load_pipeline(str(EXAMPLES / f"{name}.py"))
    model, metric = pipeline.build_model(), pipeline.task().metric
    with torch.no_grad():
        pairs = [as_pair(batch, "test") for batch in pipeline.load_data().test]
        values = torch.cat([metric(forward(model, inputs), target) for inputs, target in pairs])
    assert values.mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    """Every stage, with as little as possible of everything. Such a run ends in HOLD whatever it finds."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    constants = [f"pipeline.{key}=1" for key in untrained(name)]
    settings = [word for constant in constants for word in ("--set", constant)]
    target = str(ROOT / "targets" / "x86_cpu.toml")
    command = [
        sys.executable,
        "-m",
        "deploypipe",
        "run",
        str(EXAMPLES / f"{name}.py"),
        target,
        "--fast-dev-run",
        *settings,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert deploypipe.load_result(tmp_path / "runs" / f"{name}-x86_cpu-fast-dev-run").search is not None


@pytest.mark.slow
def test_the_script_of_those_who_come_from_torch_pruning(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    command = [sys.executable, str(EXAMPLES / "from_torch_pruning.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"([\d,]+) parameters +([\d.]+) %", done.stdout)
    sizes, accuracies = zip(*((int(size.replace(",", "")), float(share)) for size, share in rows), strict=True)
    assert sizes[1] < 0.5 * sizes[0] and sizes[2] < sizes[0]
    assert accuracies[2] > accuracies[1]  # repaired


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
