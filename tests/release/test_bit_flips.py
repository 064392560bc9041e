"""A few of the flips that `benchmarks/bit_flips.py` makes by the hundred: none goes through."""

import shutil
from pathlib import Path

import pytest
from bit_flips import Group, flip_and_check, groups_of
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.records import Interval
from deploypipe.release.bundle import make_bundle
from deploypipe.runs import result, store
from deploypipe.runs.store import open_run
from deploypipe.verification.golden_json import GOLDEN

pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")


def write_stage(folder: Path) -> Interval:
    (folder / "weights.bin").write_bytes(b"weights")
    return Interval(value=1.0, low=0.25, high=1.75)


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    run, device = tmp_path / "run", tmp_path / "device"
    result = write_run(run)
    with open_run(run) as opened:
        opened.remember("score", {"seed": 1}, write_stage, Interval)
    bundle = make_bundle(run, tmp_path / "released")
    device.mkdir()
    for entry in result.golden.files if result.golden else ():
        shutil.copyfile(run / entry.name, device / entry.name)
    return groups_of(run, bundle, device)


def test_no_flip_goes_through(groups: list[Group]) -> None:
    rows = flip_and_check(groups, 3 * len(groups), seed=0)
    assert [row.name for row in rows][:3] == ["result.json", "stage records", "stage files"] and len(rows) == 8
    # golden.json alone, without the result of the run, is trusted: a flip there can only ask for more than before.
    through = [place for row in rows for place in row.through if "alone" not in row.name or GOLDEN not in place]
    assert through == []


def test_gate_decides_about_the_files_that_are_there(groups: list[Group]) -> None:
    model = next(group.files[0] for group in groups if group.name == "model.onnx")
    gate = ["gate", str(model.parent)]
    assert CliRunner().invoke(app, gate).exit_code == 0
    model.write_bytes(model.read_bytes()[:-1])
    refused = CliRunner().invoke(app, gate)
    assert refused.exit_code == 2 and "is not the file that was measured" in " ".join(refused.output.split())


def test_without_the_seals_flips_would_go_through(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (result, store):
        monkeypatch.setattr(module, "unseal", lambda content: content[: content.rindex(b', "content_sha256')] + b"}")
    assert all(row.through for row in flip_and_check(groups[:2], 24, seed=0))
