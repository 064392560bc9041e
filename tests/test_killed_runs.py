"""Real kills, at random moments: what a run has finished stays, and the end is the same."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipeline as tiny
from safetensors.torch import save_file
from warm_python import start

from deploypipe.files.hashing import file_sha256
from deploypipe.runs.result import RunResult, load_result
from deploypipe.text.sealed_json import unseal

NUM_KILLS = 5  # `benchmarks/kills.py` does them by the hundred
LONGEST = 2.5  # seconds a child lives


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Path, float], int]:
    """(folder, seconds) -> exit code of a run in `folder` that is killed after `seconds`."""
    weights = tmp_path / "dense.safetensors"
    save_file(tiny.build_model().state_dict(), weights)

    def run_in(folder: Path, seconds: float) -> int:
        child = start(tmp_path, str(Path(__file__).with_name("killed_run.py")), str(weights), str(folder))
        end = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        child.kill()
        child.communicate(60)
        assert child.returncode is not None
        return child.returncode

    return run_in


def choice(result: RunResult) -> object:
    """All that a search decided, without the clock's figures."""
    assert result.search
    trials = [(t.knobs, t.plan, t.candidate.accuracy, t.candidate.num_macs, t.feasible) for t in result.search.trials]
    return trials, result.search.best, result.prune, result.repair


def assert_whole(folder: Path) -> None:
    """Every record and every file that a record names is there and unbroken."""
    for path in folder.glob("*.json"):
        if path.name not in ("result.json", "golden.json"):
            stored = json.loads(unseal(path.read_bytes()))
            assert path.stem.endswith(stored["key"])
            assert all(file_sha256(folder / path.stem / f) == sha256 for f, sha256 in stored["files"].items())


def test_a_run_killed_again_and_again_ends_in_the_same_plan(run: Callable[[Path, float], int], tmp_path: Path) -> None:
    assert run(tmp_path / "whole", 300) == 0
    whole = load_result(tmp_path / "whole")
    rng = random.Random(2)
    killed, number = 0, 0
    while killed < NUM_KILLS:
        folder = tmp_path / f"killed{number}"
        code = run(folder, rng.uniform(0.02, LONGEST))
        assert code in (0, -signal.SIGKILL), code
        assert_whole(folder)
        killed += code != 0
        number += code == 0
    assert run(tmp_path / f"killed{number}", 300) == 0
    for folder in sorted(tmp_path.glob("killed*")):
        result = load_result(folder)
        assert choice(result) == choice(whole)
        assert result.benchmark.compressed.num_params == whole.benchmark.compressed.num_params
        assert file_sha256(folder / "model.onnx") == result.benchmark.compressed.file.sha256
        left = [p.relative_to(folder) for p in folder.rglob("*") if ".part" in p.name or p.name.startswith(".")]
        assert left == [], left
