"""Real kills, at random moments: what a run has finished stays, and the end is the same."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_pipeline as tiny
from safetensors.torch import save_file

from deploypipe.files.hashing import file_sha256
from deploypipe.runs.result import RunResult, load_result
from deploypipe.text.sealed_json import unseal

NUM_KILLS = 15  # `benchmarks/kills.py` does them by the hundred
LONGEST = 2.5  # seconds a child lives


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path, float], int]]:
    """(folder, seconds) -> exit code of a run in `folder` that is killed after `seconds`."""
    weights = tmp_path / "dense.safetensors"
    save_file(tiny.build_model().state_dict(), weights)
    here = Path(__file__).parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DEPLOYPIPE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    server = subprocess.Popen(
        [sys.executable, str(here / "killed_runs_server.py"), str(weights)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin and server.stdout and server.stdout.readline() == "ready\n"

    def run(folder: Path, seconds: float) -> int:
        assert server.stdin and server.stdout
        print(folder, seconds, file=server.stdin, flush=True)
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=60)


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


def test_a_run_killed_again_and_again_ends_in_the_same_plan(
    start: Callable[[Path, float], int], tmp_path: Path
) -> None:
    assert start(tmp_path / "whole", 300) == 0
    whole = load_result(tmp_path / "whole")
    rng = random.Random(2)
    killed, number = 0, 0
    while killed < NUM_KILLS:
        folder = tmp_path / f"killed{number}"
        code = start(folder, rng.uniform(0.02, LONGEST))
        assert code in (0, -signal.SIGKILL), code
        assert_whole(folder)
        killed += code != 0
        number += code == 0
    assert start(tmp_path / f"killed{number}", 300) == 0
    for folder in sorted(tmp_path.glob("killed*")):
        result = load_result(folder)
        assert choice(result) == choice(whole)
        assert result.benchmark.compressed.num_params == whole.benchmark.compressed.num_params
        assert file_sha256(folder / "model.onnx") == result.benchmark.compressed.file.sha256
        left = [p.relative_to(folder) for p in folder.rglob("*") if ".part" in p.name or p.name.startswith(".")]
        assert left == [], left
