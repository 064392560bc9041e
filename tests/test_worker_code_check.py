"""A worker compares what it would execute with what the run executes, before it executes anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.cli.run_targets import RunArguments
from deploypipe.pipeline_sources import read_source
from deploypipe.user_pipeline import load_pipeline

PIPELINE = """
from pathlib import Path
Path("executed").write_text("")
from neighbour import *
SIZE = 3
"""
TARGET = 'runtime = "onnxruntime"\n[budget]\nmacs = "0.5x"\n'


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put a job into the study's database, as a run does, and start a worker; it never gets as far as the search."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    Path("pipe.py").write_text(PIPELINE)
    Path("neighbour.py").write_text("from tiny_pipeline import *\nfrom deeper import X\n")
    Path("deeper.py").write_text("X = 1\n")
    Path("cpu.toml").write_text(TARGET)
    address = f"sqlite:///{tmp_path}/study.db"
    asked = RunArguments("./pipe.py", ["./cpu.toml"], ["pipeline.SIZE=4"], None, address, "s", None, None, False)
    told = asked.storage_of(asked.devices[0])
    assert told and told.job
    Path("executed").unlink()

    def work(**changes: object) -> Any:
        study = optuna.create_study(storage=address, study_name="s", load_if_exists=True)
        study.set_user_attr("job", json.dumps({**told.job, **changes}))  # type: ignore[dict-item]
        study.set_user_attr("origin", json.dumps({"model": "another"}))
        return CliRunner().invoke(app, ["worker", "--storage", address, "--run", "s", "--wait", "5"])

    return work


@pytest.mark.parametrize("file", ["pipe.py", "neighbour.py", "deeper.py"])
def test_other_code_is_not_executed(file: str, job: Callable[..., Any]) -> None:
    Path(file).write_text(Path(file).read_text() + "# changed\n")
    done = job()
    assert done.exit_code == 2 and "another 'code of the pipeline'" in done.stderr, done.output
    assert "nothing was executed" in done.stderr and not Path("executed").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"constants": {"SIZE": "5"}}, "another 'code of the pipeline'"),
        ({"code": {}}, "another 'deploypipe'"),
        ({"pipeline": "./deeper.py"}, "another 'code of the pipeline'"),
        ({"pipeline": 3}, "pipeline: 3 does not fit"),
        ({"recipe": {"seed": -1}}, "recipe: seed must be >= 0, got -1"),
        (
            {"target": {"runtime": "onnxruntime", "num_threads": 10**9}},
            "target: num_threads must be <= 4096, got 1000000000",
        ),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_job_of_another_run_is_not_executed(changes: dict[str, Any], said: str, job: Callable[..., Any]) -> None:
    done = job(**changes)
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not Path("executed").exists() and done.stderr.count("\n") == 1


def test_the_same_code_is_executed_and_compared_further(job: Callable[..., Any]) -> None:
    done = job()
    assert Path("executed").exists() and "made with another" in done.stderr, done.output


def test_source_is_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "pipe.py").write_text("from mine.parts import x\nfrom . import others\nimport json\n")
    (package / "parts.py").write_text("x = 1\n")
    (package / "others.py").write_text("import mine.last as last\n")
    (package / "last.py").write_text("(\n")
    text = read_source(package / "pipe.py")
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# last.py",
        "# others.py",
        "# parts.py",
        "# pipe.py",
    ]


def test_a_loaded_pipeline_has_that_source(job: Callable[..., Any]) -> None:
    loaded = load_pipeline("./pipe.py", {"SIZE": "4"})
    assert loaded.source == read_source(Path("pipe.py").resolve()) + "SIZE = 4\n"
