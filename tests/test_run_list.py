"""`deploypipe runs`: what it lists, and that it removes nothing else."""

import fcntl
import os
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import RunFolderError
from deploypipe.runs.result import load_result, save_result
from deploypipe.runs.run_about import RunAbout, write_about
from deploypipe.runs.run_list import Run, clean_run, list_runs, select_runs
from deploypipe.runs.store import open_run

STAGE = "03-curves-0123456789abcdef"


def add_run(folder: Path, *, is_finished: bool) -> Path:
    """A run folder as a run leaves it: one stage computed by the store, end products, a study."""
    with open_run(folder) as run:
        run.remember("curves", {}, lambda work: bool((work / "heavy.bin").write_bytes(bytes(50_000))) is None, bool)
        (folder / "data.hashes").write_text("{}", encoding="utf-8")
        (folder / "study-0123456789abcdef.db").write_bytes(bytes(10))
        (folder / "accuracies-0123456789abcdef").mkdir()
        if is_finished:
            for name in ("model.onnx", "golden.json", "golden.safetensors", "weights.safetensors", "report.html"):
                (folder / name).write_bytes(bytes(1000))
            save_result(folder, finished_run())
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_run(tmp_path / "runs" / "done", is_finished=True)
    add_run(tmp_path / "runs" / "several" / "cut", is_finished=False)
    with open_run(tmp_path / "runs" / "several" / "shared") as run:
        run.remember("score", {}, lambda _: True, bool)
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "result.json").write_text("{}", encoding="utf-8")  # no run: it has no lock
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "done")
    return tmp_path / "runs"


def by_name(root: Path) -> dict[str, Run]:
    return {str(run.folder.relative_to(root)): run for run in list_runs(root)}


def invoke(*arguments: str, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, ["runs", *arguments], input=answer)


def test_what_is_listed(root: Path) -> None:
    found = by_name(root)
    assert {name: run.state for name, run in found.items()} == {
        "done": "finished",
        "several/cut": "interrupted",
        "several/shared": "shared",
    }
    done, result = found["done"], finished_run()
    assert (done.pipeline, done.target, done.verdict) == (result.pipeline, result.target.name, "SHIP")
    assert result.benchmark.latency_ratio and done.latency_ratio == result.benchmark.latency_ratio.value
    assert 55_000 < done.size_bytes < 1_000_000
    (root / "done" / "result.json").write_text("{}", encoding="utf-8")
    assert by_name(root)["done"].state == "unreadable"


def test_a_run_at_work_is_seen_and_never_removed(root: Path) -> None:
    listed = by_name(root)["done"]
    with (root / "done" / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as the runs that share a folder hold it
        now = by_name(root)["done"]
        assert now.state == "running" and now not in select_runs(list_runs(root))
        with pytest.raises(RunFolderError, match="a run is at work here"):
            clean_run(listed)
    assert load_result(root / "done").decision


def test_results_are_kept_with_all_that_a_release_needs(root: Path) -> None:
    freed = clean_run(by_name(root)["done"], keep_results=True)
    left = sorted(path.name for path in (root / "done").iterdir())
    products = ["golden.json", "golden.safetensors", "model.onnx", "report.html", "result.json", "weights.safetensors"]
    assert left == sorted([*products, "data.hashes", "run.lock"]) and freed > 50_000
    assert by_name(root)["done"].state == "finished"


def test_a_removed_run_leaves_what_is_not_its_own(root: Path) -> None:
    clean_run(by_name(root)["done"])
    assert not (root / "done").exists()
    (root / "several" / "cut" / "notes.txt").write_text("mine", encoding="utf-8")
    clean_run(by_name(root)["several/cut"])
    assert [path.name for path in (root / "several" / "cut").iterdir()] == ["notes.txt"]
    other = Run(folder=root / "mine", state="finished", size_bytes=0, changed=datetime.now(UTC))
    with pytest.raises(RunFolderError, match="holds no run"):
        clean_run(other)
    (root / "mine" / "run.lock").touch()
    (root / "mine" / "result.json").unlink()
    with pytest.raises(RunFolderError, match="is not a run folder"):
        clean_run(other)
    with pytest.raises(RunFolderError, match="is not a folder"):
        list_runs(root / "absent")


def test_which_runs_are_selected(root: Path) -> None:
    runs = list_runs(root)
    names = lambda found: sorted(run.folder.name for run in found)  # noqa: E731
    assert names(select_runs(runs)) == ["cut", "done", "shared"]
    assert names(select_runs(runs, unfinished=True)) == ["cut"]
    assert names(select_runs(runs, keep_results=True)) == ["done", "shared"]
    later, age = datetime.now(UTC) + timedelta(days=31), timedelta(days=30)
    assert select_runs(runs, older_than=age) == () and len(select_runs(runs, older_than=age, now=later)) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clean"], "does not say which runs"),
        (["--clean", "--older-than", "30"], "write it like 12h, 30d or 8w"),
        (["--clean", "--unfinished", "--keep-results"], "these runs have no results"),
        (["--unfinished"], "add --clean"),
        (["--clean", "--unfinished"], "add --yes"),
    ],
)
def test_what_cannot_be_cleaned_is_one_line(arguments: list[str], said: str, root: Path) -> None:
    done = invoke(str(root), *arguments)
    assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(list_runs(root)) == 3


def test_the_command_lists_and_cleans(root: Path) -> None:
    os.utime(root / "done")
    table = invoke(str(root))
    assert table.exit_code == 0 and "finished" in table.output and "several/cut" in table.output
    assert max(map(len, table.output.splitlines())) <= 100
    done = invoke(str(root), "--clean", "--unfinished", "--yes")
    assert done.exit_code == 0 and "1 cleaned, " in done.output and "several/cut" not in by_name(root)
    assert "nothing to clean" in invoke(str(root), "--clean", "--older-than", "1d", "--yes").output
    assert "2 cleaned" in invoke(str(root), "--clean", "--keep-results", "--yes").output
    assert invoke(str(root / "mine")).output.endswith("no runs\n")


def test_runs_without_a_result_are_named_and_a_fast_one_is_marked(root: Path) -> None:
    write_about(root / "several" / "cut", RunAbout(pipeline="my_cnn", target="mine"))
    cut = by_name(root)["several/cut"]
    assert (cut.state, cut.pipeline, cut.target, cut.is_fast_dev_run) == ("interrupted", "my_cnn", "mine", False)
    run = finished_run()
    save_result(root / "done", replace(run, recipe=replace(run.recipe, fast_dev_run=True)))
    assert by_name(root)["done"].is_fast_dev_run and "fast run" in invoke(str(root)).output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_fewer_columns_and_breaks_no_word(
    width: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "done").rename(root / "my_cnn-mine-fast-dev-run")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = re.sub(r"\x1b\[[0-9;]*m", "", invoke(str(root)).output)
    assert max(map(len, said.splitlines())) <= width and ("on disk" in said) is (width >= 80)
    assert all(word in said.split() for word in ("my_cnn-mine-fast-dev-run", "finished", "interrupted", "SHIP"))
