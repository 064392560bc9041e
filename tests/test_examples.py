"""Files that other machines read: they fit their schemas, and the story they tell can be played."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploypipe.runs.result import load_result

ROOT = Path(__file__).parents[1]
TARGET = 'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "0.5x"\naccuracy_drop_pp = 10.0\n'
SMALL = """
from dataclasses import replace

import tiny_pipeline
from tiny_pipeline import *


def recipe():
    small = tiny_pipeline.recipe()
    return replace(small, search=replace(small.search, num_trials=20))
"""


@pytest.mark.parametrize(
    "path",
    [
        "examples/release_story.sh",
        "examples/ci/job.sh",
        "examples/fleet/slurm.sh",
        ".ci/run",
        ".ci/check",
    ],
)
def test_scripts_are_bash(path: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / path)]).returncode == 0
    assert os.access(ROOT / path, os.X_OK)


def test_kubernetes_takes_the_manifest() -> None:
    checker = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate, which holds the schemas, is absent"
    )
    manifest = ROOT / "examples/fleet/kubernetes.yaml"
    resources = list(yaml.safe_load_all(manifest.read_text()))
    assert [resource["kind"] for resource in resources] == ["Secret", "Job", "PersistentVolumeClaim", "Deployment"]
    for resource in resources:
        checker.validate(resource, "1.31", strict=True)
    with pytest.raises(checker.ValidationError):
        checker.validate({**resources[3], "spec": {"replicas": "seven"}}, "1.31", strict=True)


@pytest.mark.slow
def test_the_slurm_script_runs_a_search_with_a_worker(tmp_path: Path) -> None:
    """Two tasks of its array, as Slurm would start them, with trials enough for both."""
    for folder in ("pipelines", "targets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pipelines" / "small.py").write_text(SMALL, encoding="utf-8")
    (tmp_path / "targets" / "cpu.toml").write_text(TARGET, encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "DEPLOYPIPE_STORAGE": f"sqlite:///{tmp_path}/searches.db",
        "DEPLOYPIPE_CACHE": str(tmp_path / "cache"),
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }
    command = ["bash", str(ROOT / "examples/fleet/slurm.sh"), "small", "cpu"]
    tasks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "SLURM_ARRAY_TASK_ID": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in "01"
    ]
    told = [task.communicate(timeout=600)[0] for task in tasks]
    assert tasks[0].returncode in (0, 1) and "Gate" in told[0], told[0]
    assert tasks[1].returncode == 0 and "trials are done" in told[1], told[1]
    result = load_result(tmp_path / "runs" / "small-cpu-17")
    assert result.search and {trial.evaluated_by for trial in result.search.trials} != {""}


@pytest.mark.slow
@pytest.mark.alone
def test_the_release_story(tmp_path: Path) -> None:
    """Release, hold, mend, release, verify, tamper: the script fails where one ends otherwise."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    story = [str(ROOT / "examples/release_story.sh"), str(tmp_path)]
    done = subprocess.run(story, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "HOLD" in (tmp_path / "comment.md").read_text()
    aliases = json.loads((tmp_path / "registry/digits-x86_cpu/aliases.json").read_text())
    assert aliases == {"production": 2}
