import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipeline as tiny
from finished_runs import finished_run, untouched_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BudgetError
from deploypipe.files.json_records import to_json
from deploypipe.records import Cached, Edit, Finished, GroupCut, Progress, PruningPlan, Started, Warned
from deploypipe.report.plan_tables import ranges
from deploypipe.runs.result import save_result

TOY = """
from torch import nn
from deploypipe.recipe import Recipe
from deploypipe.task import Splits, classification
WIDTH = 4
DATA = TOKEN = ""
def build_model(): return nn.Linear(2, WIDTH)
def load_data(): return Splits(calib=[], train=[], val=[], test=[])
def task(): return classification()
def recipe(): return Recipe()
"""
TARGET = 'runtime = "onnxruntime"\n[budget]\nlatency_p50 = "0.7x"\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one pipeline and one target."""
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "cpu.toml").write_text(TARGET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`compress` replaced: each call is kept; it shows two stages and returns `result`, or raises it."""
    kept: list[dict[str, Any]] = []

    def compress(*args: Any, notify: Any, **options: Any) -> Any:
        kept.append({"args": args, **options})
        for event in (
            Started(stage="baseline"),
            Cached(stage="baseline"),
            Started(stage="search"),
            Progress(stage="search", done=1, total=4),
            Warned(stage="search", text="[damaged] file"),
            Finished(stage="search"),
        ):
            notify(event)
        outcome = next(stand_in.outcome) if isinstance(stand_in.outcome, Iterator) else stand_in.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    stand_in = SimpleNamespace(compress=compress, outcome=finished_run())
    monkeypatch.setitem(sys.modules, "deploypipe.pipeline", stand_in)
    return kept


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_run_passes_on_what_was_asked_and_ends_with_the_paths(home: Path, calls: list[dict[str, Any]]) -> None:
    settings = ["search.num_trials=3", "pipeline.WIDTH=7", "target.num_threads=2", "target.budget.latency_p50=0.5x"]
    flags = [part for setting in settings for part in ("--set", setting)]
    done = invoke("run", "./toy.py", "cpu", *flags)
    assert done.exit_code == 0, done.output
    (call,) = calls
    model, _, _, recipe, target, out = call["args"]
    assert model.out_features == 7 and recipe.search.num_trials == 3
    assert (target.name, target.num_threads, target.budget.latency_p50) == ("cpu", 2, "0.5x")
    assert out == Path("runs/toy-cpu") and call["name"] == "toy" and "WIDTH = 7" in call["source"]
    assert "baseline        cached" in done.output and "warning: [damaged] file" in done.output
    assert "SHIP: all checks passed" in done.output and "\x1b" not in done.output
    assert "ONNX    runs/toy-cpu/model.onnx" in done.output


def test_trials_and_minutes_are_fields_of_the_recipe(home: Path, calls: list[dict[str, Any]]) -> None:
    assert invoke("run", "./toy.py", "cpu", "--trials", "3", "--minutes", "1.5").exit_code == 0
    search = calls[0]["args"][3].search
    assert (search.num_trials, search.max_minutes) == (3, 1.5)
    assert calls[0]["command"].endswith("--set=search.num_trials=3 --set=search.max_minutes=1.5")
    twice = invoke("run", "./toy.py", "cpu", "--trials", "3", "--set", "search.num_trials=4")
    assert twice.exit_code == 2 and "--trials: is given together with --set search.num_trials" in twice.stderr
    assert invoke("run", "./toy.py", "cpu", "--minutes", "0").exit_code == 2


def test_a_trial_to_ship_has_its_folder_and_its_command(home: Path, calls: list[dict[str, Any]]) -> None:
    done = invoke("run", "./toy.py", "cpu", "--ship-trial", "3", "--storage", "sqlite:///x.db")
    assert done.exit_code == 0 and "ONNX    runs/toy-cpu-trial-3/model.onnx" in done.output
    assert (calls[0]["ship_trial"], calls[0]["storage"], calls[0]["args"][5]) == (3, None, Path("runs/toy-cpu"))
    assert calls[0]["command"].startswith("deploypipe run ./toy.py cpu --ship-trial=3")
    (home / "targets" / "other.toml").write_text(TARGET, encoding="utf-8")
    both = invoke("run", "./toy.py", "cpu", "other", "--ship-trial", "3")
    assert both.exit_code == 2 and "--ship-trial: is about the search of one target" in both.stderr


def test_the_command_to_run_again_is_kept_without_passwords(home: Path, calls: list[dict[str, Any]]) -> None:
    invoke("run", "./toy.py", "cpu", "--set", "search.num_trials=3", "--set", "pipeline.WIDTH=7", "--remeasure")
    assert calls[0]["remeasure"] is True
    assert calls[0]["command"] == "deploypipe run ./toy.py cpu --set=search.num_trials=3 --set=pipeline.WIDTH=7"
    invoke("run", "./toy.py", "cpu", "--out", "mine", "--storage", "postgresql://me:secret@db/x")
    assert calls[1]["remeasure"] is False and "secret" not in calls[1]["command"]
    assert calls[1]["command"].startswith("deploypipe run ./toy.py cpu --out=mine --storage=")
    invoke("run", "./toy.py", "cpu", "--set", "pipeline.DATA=s3://me:secret@store/7", "--set", "pipeline.TOKEN=secret")
    assert (
        calls[2]["command"] == "deploypipe run ./toy.py cpu --set=pipeline.DATA=s3://store/7 '--set=pipeline.TOKEN=***'"
    )


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((finished_run(), finished_run()), 0),
        ((finished_run(), untouched_run()), 1),
        ((BudgetError("out of reach"), finished_run()), 2),
        ((untouched_run(), BudgetError("out of reach")), 2),
    ],
)
def test_several_targets_end_with_a_table_and_the_worst_exit_code(
    outcomes: tuple[Any, ...], code: int, home: Path, calls: list[dict[str, Any]]
) -> None:
    (home / "targets" / "other.toml").write_text(TARGET, encoding="utf-8")
    sys.modules["deploypipe.pipeline"].outcome = iter(outcomes)  # type: ignore[attr-defined]
    done = invoke("run", "./toy.py", "cpu", "other", "--set", "target.num_threads=2")
    assert done.exit_code == code, done.output
    assert [(call["args"][4].name, call["args"][4].num_threads) for call in calls] == [("cpu", 2), ("other", 2)]
    assert [call["args"][5] for call in calls] == [Path("runs/toy/cpu"), Path("runs/toy/other")]
    assert {call["shared"] for call in calls} == {Path("runs/toy/shared")}
    assert calls[0]["args"][0] is calls[1]["args"][0]  # one network, built once
    table = done.output[done.output.index("toy, target by target") :]
    page = Path("runs/toy/report.html").read_text(encoding="utf-8")
    for name, outcome in zip(("cpu", "other"), outcomes, strict=True):
        shown = "ERROR" if isinstance(outcome, Exception) else outcome.decision.verdict.value
        assert re.search(rf"{name} +{shown}", table)
        assert (f'href="./{name}/report.html"' in page) == (shown != "ERROR")
    assert ("out of reach" in table) == (code == 2)


def test_several_at_a_time_are_not_for_torchrun(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = SimpleNamespace(count=2, is_first=True)
    monkeypatch.setattr("deploypipe.cli.terminal.joined_ranks", lambda: nullcontext(ranks))
    (home / "targets" / "other.toml").write_text(TARGET, encoding="utf-8")
    done = invoke("run", "./toy.py", "cpu", "other", "--jobs", "2")
    assert done.exit_code == 2 and "--jobs: does not work with torchrun" in done.output


def test_targets_of_one_name_are_refused(home: Path, calls: list[dict[str, Any]]) -> None:
    done = invoke("run", "./toy.py", "cpu", "targets/cpu.toml")
    assert done.exit_code == 2 and "'cpu' is given twice" in done.output and not calls
    (home / "shared.toml").write_text(TARGET, encoding="utf-8")
    assert "'shared' is the folder of the shared results" in invoke("run", "./toy.py", "cpu", "shared.toml").output


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (untouched_run(), 1, "HOLD"),
        (BudgetError("nearest miss: 0.52x; raise latency_p50"), 2, "error: nearest miss"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes"),
        (PermissionError(13, "Permission denied", "runs"), 2, "error: runs: Permission denied"),
        (RuntimeError("ours"), 2, "bug in deploypipe"),
    ],
)
def test_outcome_decides_the_exit_code(
    outcome: Any, code: int, said: str, home: Path, calls: list[dict[str, Any]]
) -> None:
    sys.modules["deploypipe.pipeline"].outcome = outcome  # type: ignore[attr-defined]
    done = invoke("run", "./toy.py", "cpu")
    assert done.exit_code == code and said in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "./toy.py", "no_such"], ["no target of this name", "cpu"]),
        (["run", "./toy.py", "no/such.toml"], ["cannot be read"]),
        (["run", "no_such", "cpu"], ["no pipeline of this name", "digits"]),
        (["run", "no/such.py", "cpu"], ["no such pipeline file"]),
        (["run", "./toy.py", "cpu", "--set", "search.num_trails=3"], ["search.num_trails", "num_trials"]),
        (["run", "./toy.py", "cpu", "--set", "search.num_trials=few"], ["search.num_trials", "few"]),
        (["run", "./toy.py", "cpu", "--set", "search"], ["is not KEY=VALUE"]),
        (["run", "./toy.py", "cpu", "--set", "target.bugdet.macs=0.5x"], ["bugdet"]),
        (["run", "./toy.py", "cpu", "--set", "target.budget.macs=half"], ["'half' is not a number with a unit"]),
        (["run", "./toy.py", "cpu", "--set", "pipeline.WITDH=3"], ["pipeline.WITDH", "WIDTH"]),
        (["gate", "no_run"], ["no_run", "deploypipe run"]),
        (["report", "no_run"], ["no_run", "deploypipe run"]),
        (["plan", "show", "targets"], ["targets", "holds no finished run"]),
        (
            ["plan", "show", "targets/cpu.toml"],
            ["is not JSON (Expecting value: line 1 column 1"],
        ),
        (["plan", "diff", "no.json", "no.json"], ["no.json", "is not a file; give a plan.json"]),
        (["doctor", "no_such"], ["no target of this name"]),
        (["init", "not-a-name"], ["not a Python identifier"]),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], said: list[str], home: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deploypipe.doctor", SimpleNamespace(examine=lambda target: ()))
    before = sorted(path for path in home.rglob("*") if "__pycache__" not in path.parts)
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ") and all(text in line for text in said), line
    assert calls == []
    assert before == sorted(path for path in home.rglob("*") if "__pycache__" not in path.parts)


def test_targets_file_with_a_misspelt_key_is_named(home: Path) -> None:
    (home / "bad.toml").write_text(TARGET.replace("latency_p50", "latency"), encoding="utf-8")
    done = invoke("run", "./toy.py", "./bad.toml")
    assert done.exit_code == 2 and "bad.toml: budget.latency: unknown key" in done.output


def test_gate_decides_anew_from_the_measurements(tmp_path: Path) -> None:
    held = replace(finished_run(), decision=untouched_run().decision)
    for name, run, code, verdict in (("ship", held, 0, "SHIP"), ("hold", untouched_run(), 1, "HOLD")):
        (tmp_path / name).mkdir()
        save_result(tmp_path / name, run)
        plain, as_json = invoke("gate", str(tmp_path / name)), invoke("gate", str(tmp_path / name), "--json")
        assert plain.exit_code == as_json.exit_code == code, plain.output
        assert verdict in plain.output and json.loads(as_json.output)["verdict"] == verdict


def test_report_writes_beside_the_run_or_where_told(tmp_path: Path) -> None:
    save_result(tmp_path, finished_run())
    assert invoke("report", str(tmp_path)).output.strip() == str(tmp_path / "report.html")
    assert invoke("report", str(tmp_path), "--out", str(tmp_path / "x.html")).exit_code == 0
    assert "SHIP" in (tmp_path / "x.html").read_text(encoding="utf-8")


def plan(removed: tuple[int, ...], blocks: tuple[str, ...] = (), **changes: Any) -> PruningPlan:
    cut = GroupCut(group="conv1", asked=5, removed=removed, num_units=16, reason="brought to a multiple of 4")
    edits = (Edit(module="conv1", side="out", removed=removed), Edit(module="conv2", side="in", removed=removed))
    whole = PruningPlan(model_fingerprint="aa-bb", cuts=(cut,), edits=edits, blocks=blocks)
    return replace(whole, **changes)


def test_plan_show_finds_the_plan_of_a_run_and_of_a_folder_and_a_file(tmp_path: Path) -> None:
    save_result(tmp_path, finished_run())
    done = invoke("plan", "show", str(tmp_path))
    assert done.exit_code == 0 and "removed blocks: layer1.1" in done.output
    (tmp_path / "plan.json").write_text(to_json(plan((0, 1, 2, 5))), encoding="utf-8")
    for path in (tmp_path, tmp_path / "plan.json"):
        done = invoke("plan", "show", str(path))
        assert done.exit_code == 0, done.output
        for said in ("conv1  16 -> 12  5", "brought to a multiple of 4", "removed blocks: none", "edited modules: 2"):
            assert said in done.output


def test_a_run_that_removed_nothing_has_no_plan(tmp_path: Path) -> None:
    save_result(tmp_path, untouched_run())
    done = invoke("plan", "show", str(tmp_path))
    assert done.exit_code == 2 and "removed nothing" in done.output


FIRST = plan((0, 1, 2, 5), ("a", "b"))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (FIRST, []),
        (replace(FIRST, cuts=(replace(FIRST.cuts[0], asked=12, reason=""),)), []),
        (plan((0, 2, 3, 4, 5, 9), ("a", "b")), ["conv1  12 of 16  10 of 16  removes 3-4, 9; keeps 1"]),
        (plan((), ("a", "b")), ["conv1  12 of 16  whole   keeps 0-2, 5"]),
        (plan((0, 1, 2, 5), ("b", "c")), ["block a  removed  stays", "block c  stays    removed"]),
        (replace(FIRST, model_fingerprint="cc-bb"), ["model structure  aa     cc"]),
        (replace(FIRST, model_fingerprint="aa-cc"), ["model weights  bb     cc"]),
        (replace(FIRST, edits=FIRST.edits[:1]), ["conv2 in  4 removed  0 removed  keeps 0-2, 5"]),
    ],
    ids=["equal", "asked otherwise", "units", "whole", "blocks", "structure", "weights", "edits alone"],
)
def test_plan_diff_says_what_differs_and_exits_by_it(second: PruningPlan, said: list[str], tmp_path: Path) -> None:
    for name, each in (("first", FIRST), ("second", second)):
        (tmp_path / name).write_text(to_json(each), encoding="utf-8")
    done = invoke("plan", "diff", str(tmp_path / "first"), str(tmp_path / "second"))
    assert done.exit_code == (1 if said else 0), done.output
    lines = [line for line in done.output.splitlines() if line]
    assert lines[0] == ("Differences" if said else "equal")
    assert [line.rstrip() for line in lines[2:]] == said


def test_many_indices_are_shortened() -> None:
    assert ranges((7, 0, 1, 2)) == "0-2, 7"
    assert ranges(range(0, 20, 2)) == "0, 2, 4, 6, 8, 10, 4 more"
    assert ranges(()) == ""


@pytest.mark.parametrize("kind", ["mipp", "taylor", "label_mi"])  # from moments, derivatives and labels
def test_score_shows_a_table_and_writes_the_figures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("score", tiny.__file__, "--set", f"score.kind={kind}")
    assert done.exit_code == 0, done.output
    assert f"Redundant units in tiny_pipeline, by {kind}" in done.output and "blocks.0.conv1" in done.output
    assert "figures runs/tiny_pipeline-scores.html" in done.output
    assert kind in (tmp_path / "runs" / "tiny_pipeline-scores.html").read_text(encoding="utf-8")


def test_score_has_no_target(home: Path) -> None:
    done = invoke("score", "./toy.py", "--set", "target.num_threads=2")
    assert done.exit_code == 2
    assert done.output.startswith("error: --set: target.num_threads: there is no target here")


def test_targets_lists_own_and_shipped_ones(home: Path) -> None:
    done = invoke("targets")
    assert done.exit_code == 0 and all(word in done.output for word in ("cpu", "x86_cpu", "run"))
    assert max(map(len, done.output.splitlines())) <= 100 and "latency_p50" not in done.output
    assert "latency_p50 0.7x" in invoke("targets", "--verbose").output


def test_targets_names_the_files_that_cannot_be_read_and_lists_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "targets" / "bad.toml").write_text(TARGET.replace("latency_p50", "latency"), encoding="utf-8")
    done = invoke("targets")
    assert done.exit_code == 0 and "x86_cpu" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("cannot be read: targets/bad.toml: budget.latency: unknown key")
    monkeypatch.setattr("deploypipe.target_files.named_targets", lambda: {"bad": home / "targets" / "bad.toml"})
    assert invoke("targets").exit_code == 2


def test_every_command_explains_itself() -> None:
    said = invoke("--help").output
    groups = ("Compress", "Look and measure", "Release", "Large and distributed", "Help a developer")
    places = [said.index(f"─ {group} ─") for group in groups]
    assert "Exit codes" in said and places == sorted(places) and "─ Commands ─" not in said
    for command in ("run", "gate", "report", "doctor", "init"):
        assert "Example" in invoke(command, "--help").output
    for command in ("show", "diff"):
        assert "Example" in invoke("plan", command, "--help").output
    assert "0 equal, 1 different" in invoke("plan", "diff", "--help").output


@pytest.mark.parametrize(("name", "code"), [("target cpu", 2), ("extra mlflow", 0)])
def test_doctor_fails_only_for_the_target_asked_about(
    name: str, code: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "pip install it " + "and what it needs " * 9
    finding = SimpleNamespace(name=name, status="missing", detail="long", brief="not installed", remedy=remedy)
    monkeypatch.setitem(sys.modules, "deploypipe.doctor", SimpleNamespace(examine=lambda target: (finding,)))
    done = invoke("doctor", "cpu")
    assert done.exit_code == code and "not installed" in done.output and f"{name}: pip install it" in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    assert "long" in invoke("doctor", "cpu", "--verbose").output


def test_compare_shows_what_two_runs_ship(tmp_path: Path) -> None:
    first = finished_run()
    folders = [tmp_path / name for name in ("a", "b")]
    report = replace(first.benchmark, test_data="digits")
    faster = replace(report.compressed, per_sample_metric=(1.0,) * 480 + (0.0,) * 20, num_params=200_000)
    second = replace(first, benchmark=replace(report, compressed=faster))
    for folder, result in zip(folders, (replace(first, benchmark=report), second), strict=True):
        folder.mkdir()
        save_result(folder, result)
    told = invoke("compare", *map(str, folders))
    assert told.exit_code == 0, told.output
    assert "-2.00 pp (" in told.output and "0.500x" in told.output and "timed apart" in told.output
    assert "their plans are equal" in told.output
    assert invoke("compare", str(folders[0]), str(tmp_path)).exit_code == 2
