"""`compress` from end to end, on a network that takes seconds."""

import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_pipeline as tiny
import torch
from finished_runs import conditions
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.benchmark import latency
from deploypipe.benchmark.latency import Timings
from deploypipe.cli.terminal import show_result
from deploypipe.errors import ConfigError, ModelError, RunFolderError
from deploypipe.files.hashing import digest, file_sha256
from deploypipe.files.json_records import to_json
from deploypipe.pipeline import compress
from deploypipe.recipe import Constraints
from deploypipe.records import (
    Cached,
    Event,
    Notify,
    Planned,
    Progress,
    Started,
    Status,
    Verdict,
    Warned,
    silent,
)
from deploypipe.records.stages import STAGES
from deploypipe.runs.load_network import load_pruned
from deploypipe.runs.result import RunResult, load_result
from deploypipe.runtimes import RUNTIMES, Session, ability_for_target
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.runtimes.this_machine import Gpu, this_machine
from deploypipe.target import Budget, Target
from deploypipe.task import Task
from deploypipe.verify import verify


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latencies are measured once for all runs of this file, with one thread, on a machine that others use too."""
    before, threads = os.environ.get("DEPLOYPIPE_CACHE"), torch.get_num_threads()
    os.environ["DEPLOYPIPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop("DEPLOYPIPE_CACHE")
    if before is not None:
        os.environ["DEPLOYPIPE_CACHE"] = before


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return tiny.build_model()


TARGET = tiny.target(latency_p50="4x", macs="0.9x")  # latency is looked at, and no clock can fail it

GPU = Target(
    runtime="tensorrt-rtx",
    name="gpu",
    compute_capabilities=("8.9",),
    budget=Budget(latency_p50="0.6x", peak_memory="0.5x", accuracy_drop_pp=5.0),
)


def run(dense: nn.Module, folder: Path, **changes: object) -> RunResult:
    recipe = replace(tiny.recipe(), **changes)  # type: ignore[arg-type]
    return compress(dense, tiny.load_data(), tiny.task(), recipe, TARGET, folder, source="tiny")


def ship(dense: nn.Module, folder: Path, number: int, notify: Notify = silent) -> RunResult:
    """The same call as `run`, for another trial, and with another training."""
    task, recipe = tiny.task(), tiny.recipe()
    recipe = replace(recipe, finetune=replace(recipe.finetune, weight_decay=0.01))  # trials may be of one network
    return compress(
        dense, tiny.load_data(), task, recipe, TARGET, folder, source="tiny", ship_trial=number, notify=notify
    )


@pytest.fixture(scope="module")
def first(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult, bool]:
    """A finished run: its folder, its result, and whether the dense network came out of it as it went in."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    dense.train()
    result = run(dense, folder)
    same = all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    return folder, result, same and all(module.training for module in dense.modules())


def plans(result: RunResult) -> list[object]:
    assert result.search
    return [(t.plan, t.knobs, t.candidate.accuracy) for t in result.search.trials] + [result.search.best]


def test_every_precision_of_the_target_is_made_and_one_ships(
    first: tuple[Path, RunResult, bool], dense: nn.Module, tmp_path: Path
) -> None:
    folder = tmp_path / "int8"
    shutil.copytree(first[0], folder)  # all stages before the search are the same
    recipe, target = tiny.recipe(), replace(TARGET, precisions=("int8",))
    recipe = replace(recipe, search=replace(recipe.search, num_trials=1))
    result = compress(dense, tiny.load_data(), tiny.task(), recipe, target, folder, source="tiny")
    assert {s.stage: s.was_cached for s in result.stages}["curves"]
    assert result.precision and [row.precision for row in result.precision.rows] == ["fp32", "int8"]
    shipped = result.benchmark.compressed.file
    assert shipped.precision == result.precision.chosen == "int8"
    assert shipped.sha256 == file_sha256(folder / "model.onnx")
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert verify(folder).is_same


def test_a_run_ends_in_a_decision(first: tuple[Path, RunResult, bool]) -> None:
    folder, result, is_untouched = first
    assert result.decision.verdict in (Verdict.SHIP, Verdict.HOLD)
    checks = {check.name: check.status.value for check in result.decision.checks}
    assert checks["macs"] == checks["accuracy_drop"] == checks["parity"] == "PASS"
    assert is_untouched
    report = result.benchmark
    assert report.compressed.num_macs <= 0.9 * report.dense.num_macs
    assert to_json(load_result(folder)) == to_json(result)
    order = [stage.name for stage in STAGES]
    first_times = [order.index(name) for name in dict.fromkeys(stage.stage for stage in result.stages)]
    assert first_times == sorted(first_times)  # the table of titles holds every stage, in the order of the run
    assert file_sha256(folder / "model.onnx") == report.compressed.file.sha256
    assert (folder / "report.html").stat().st_size > 100_000
    assert verify(folder).is_same and result.golden and result.golden.models == ("model.onnx",)
    metadata = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert metadata["deploypipe.recipe"] == digest(result.recipe)
    assert result.search and metadata["deploypipe.plan"] == digest(result.search.trials[result.search.best].plan)


def test_the_network_comes_back_as_a_module_that_trains(first: tuple[Path, RunResult, bool], tmp_path: Path) -> None:
    folder, result, _ = first
    module = result.load_model(tiny.build_model)
    inputs, _ = next(iter(tiny.load_data().test))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (shipped,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(module(inputs), torch.from_numpy(shipped), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(load_pruned(str(folder), tiny.build_model)(inputs), module(inputs))
    assert "result.load_model(build_model)" in repr(result)

    shutil.copy(folder / "result.json", tmp_path / "report.json")  # as in a bundle
    with pytest.raises(RunFolderError, match=r"weights\.safetensors: is absent"):
        load_pruned(tmp_path, tiny.build_model)
    shutil.copy(folder / "weights.safetensors", tmp_path)
    torch.testing.assert_close(load_pruned(tmp_path, tiny.build_model)(inputs), module(inputs))
    with pytest.raises(ModelError, match="give build_model"):
        load_pruned(tmp_path)
    module.train()(inputs).square().mean().backward()
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="is not the file that the run wrote"):
        load_pruned(tmp_path, tiny.build_model)


class TwoHeads(nn.Module):
    """Answers which quarter is bright, and where that is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.where = network, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"logits": logits, "where": self.where(logits)}


def test_several_outputs_of_other_kinds(dense: nn.Module, tmp_path: Path) -> None:
    def loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        places = torch.stack([target // 2, target % 2], 1).float()
        return F.cross_entropy(outputs["logits"], target) + F.mse_loss(outputs["where"], places)

    task = Task(loss=loss, metric=lambda outputs, target: (outputs["logits"].argmax(1) == target).float())
    torch.manual_seed(0)
    result = compress(
        TwoHeads(dense).eval(), tiny.load_data(), task, tiny.recipe(), tiny.target(), tmp_path, source="two heads"
    )
    assert result.decision.verdict is Verdict.SHIP
    assert result.training and len(result.training.epochs) > 1
    (stored,) = tmp_path.glob("*-curves-*.json")
    assert all(curve["losses"][0] > 0 for curve in json.loads(stored.read_text())["record"]["curves"])
    assert verify(tmp_path).is_same


def test_the_same_call_again_computes_nothing(dense: nn.Module, first: tuple[Path, RunResult, bool]) -> None:
    folder, result, _ = first
    events: list[Event] = []
    again = compress(
        dense, tiny.load_data(), tiny.task(), tiny.recipe(), TARGET, folder, source="tiny", notify=events.append
    )
    assert all(stage.was_cached for stage in again.stages) and len(again.stages) == len(result.stages) >= 15
    assert to_json(replace(again, stages=result.stages)) == to_json(result)
    (planned,) = [event.stages for event in events if isinstance(event, Planned)]
    assert {*planned} - {"finalist"} == {stage.stage for stage in again.stages} - {"finalist"} | {"gate"}
    of_stages = [event for event in events if not isinstance(event, Planned)]
    assert {type(event) for event in of_stages if event.stage not in ("check", "fingerprints", "gate")} == {
        Started,
        Cached,
    }


def test_another_trial_ships_without_a_search(dense: nn.Module, first: tuple[Path, RunResult, bool]) -> None:
    """In a folder of its own, next to the run that searched, which stays as it is."""
    folder, result, _ = first
    assert result.search
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    best, other = result.search.best, 1 - result.search.best
    told: list[Event] = []
    again = ship(dense, folder, other, told.append)
    assert again.search and (again.search.best, again.search.winner) == (other, best)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    own = folder.with_name(f"{folder.name}-trial-{other}")
    assert to_json(load_result(own)) == to_json(again) and verify(own).is_same
    stages = {stage.stage: stage.was_cached for stage in again.stages}
    assert not {"observe", "search", "confirm", "finalist"} & stages.keys()
    assert stages["structures"] and stages["dense_export"] and stages["baseline"] and not stages["finetune"]
    (planned,) = [event.stages for event in told if isinstance(event, Planned)]  # nothing else is shown as to come
    assert set(planned) == {*stages, "gate"}
    report = (own / "report.html").read_text(encoding="utf-8")
    assert f"Trial {other} ships because it was asked for" in report and f"the search chose trial {best}." in report
    assert all(stage.was_cached for stage in ship(dense, folder, other).stages)


def test_a_trial_that_does_not_exist_is_named(dense: nn.Module, first: tuple[Path, RunResult, bool]) -> None:
    folder, result, _ = first
    assert result.search
    with pytest.raises(ConfigError, match=f"has trials 0 to {len(result.search.trials) - 1}; choose one of them"):
        ship(dense, folder, 99)
    with pytest.raises(RunFolderError, match="holds no finished run"):
        ship(dense, folder / "absent", 0)
    assert not (folder.parent / f"{folder.name}-trial-99").exists()


def test_runs_for_several_targets_share_what_does_not_depend_on_them(
    dense: nn.Module, first: tuple[Path, RunResult, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_for(name: str, **changes: int) -> RunResult:
        target = replace(TARGET, name=name, **changes)
        return compress(
            dense,
            tiny.load_data(),
            tiny.task(),
            tiny.recipe(),
            target,
            tmp_path / name,
            source="tiny",
            shared=tmp_path / "shared",
        )

    torch.manual_seed(12345)  # whatever the caller's generator does
    same = run_for("same")
    assert plans(same) == plans(first[1])
    assert same.prune == first[1].prune and same.repair == first[1].repair
    assert same.benchmark.compressed.file.sha256 == first[1].benchmark.compressed.file.sha256
    assert {path.name[3:].rsplit("-", 1)[0] for path in (tmp_path / "shared").glob("*.json")} == {
        *("memory", "structures", "dense_export", "observe", "score", "curves", "finalist", "prune", "finetune")
    }
    assert {path.parent.parent.name for path in tmp_path.rglob("teacher-outputs-*/epoch-1.safetensors")} == {"shared"}

    def repair_again(*_: object, **__: object) -> None:
        raise AssertionError("what a repaired network comes to on val is known from the other targets")

    monkeypatch.setattr("deploypipe.search.evaluation.evaluator.repair", repair_again)
    other = run_for("timed_otherwise", num_latency_samples=250)
    cached = {stage.stage for stage in other.stages if stage.was_cached}
    assert cached >= {"structures", "dense_export", "observe", "score", "curves", "finalist", "prune", "finetune"}
    assert not {"baseline", "latency", "search", "confirm", "export", "benchmark"} & cached
    assert plans(other) == plans(same)
    for name in ("same", "timed_otherwise"):
        assert verify(tmp_path / name).is_same


def test_a_changed_recipe_computes_only_what_depends_on_it(
    dense: nn.Module, first: tuple[Path, RunResult, bool]
) -> None:
    changed = run(dense, first[0], finetune=replace(tiny.recipe().finetune, num_epochs=1))
    cached = {stage.stage for stage in changed.stages if stage.was_cached}
    before_search = {"structures", "dense_export", "baseline", "latency", "feasibility", "observe", "score", "curves"}
    before_search |= {"memory"}
    assert cached == before_search | {"search", "confirm", "finalist", "prune"}
    assert changed.training and len(changed.training.epochs) == 2
    assert to_json(load_result(first[0])) == to_json(changed)


def test_a_search_of_another_run_is_not_taken_up(
    dense: nn.Module, first: tuple[Path, RunResult, bool], tmp_path: Path
) -> None:
    """Another seed searches afresh, and refuses the file of the first where somebody put it in its place."""
    folder = tmp_path / "run"
    shutil.copytree(first[0], folder)
    known = set(folder.glob("study-*.db"))

    def notify(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "search" and event.done == 1:
            raise KeyboardInterrupt

    recipe = replace(tiny.recipe(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        compress(dense, tiny.load_data(), tiny.task(), recipe, TARGET, folder, notify=notify, source="tiny")
    (other,) = set(folder.glob("study-*.db")) - known
    shutil.copyfile(min(known, key=lambda path: path.stat().st_mtime), other)
    with pytest.raises(RunFolderError, match=r"study-.*\.db: this study was made with another 'seed'"):
        run(dense, folder, seed=1)


class Clock:
    """A machine on which a network takes as long as it has parameters, and longer wherever `slower` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **slower: float) -> None:
        self.slower = slower
        monkeypatch.setattr("deploypipe.search.evaluation.candidate_files.time_interleaved", self.in_the_search)
        monkeypatch.setattr(
            importlib.import_module("deploypipe.benchmark"), "time_steadily", partial(self.time, "benchmark")
        )

    def in_the_search(self, *args: object, num_samples: int | None = None) -> Timings:
        return self.time("again" if num_samples is None else "search", *args)

    def time(self, where: str, paths: Sequence[Path], *_: object) -> Timings:
        sizes = [sum(math.prod(w.dims) for w in onnx.load(path).graph.initializer) for path in paths]
        by = self.slower.get(where, 1.0)  # all but the dense one
        ms = tuple(np.full(200, size * (by if size < max(sizes) else 1.0) / 1e3) for size in sizes)
        return Timings(samples=ms, block=20)


def timed_run(dense: nn.Module, folder: Path, **search: object) -> RunResult:
    recipe = replace(tiny.recipe(), search=replace(tiny.recipe().search, **search))  # type: ignore[arg-type]
    target = tiny.target(latency_p50="0.6x", macs="0.9x")
    return compress(dense, tiny.load_data(), tiny.task(), recipe, target, folder, source="tiny")


def test_a_network_that_the_benchmark_takes_for_too_slow_is_followed_by_a_faster_one(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    Clock(monkeypatch, benchmark=1.3)
    once = timed_run(dense, tmp_path / "run", num_attempts=1)
    assert once.decision.verdict is Verdict.HOLD and not once.too_slow
    result = timed_run(dense, tmp_path / "run")
    assert result.decision.verdict is Verdict.SHIP
    assert len(result.too_slow) == 1 and "above the limit" in result.too_slow[0]
    assert once.search and result.search
    assert to_json(result.search.trials[: len(once.search.trials)]) == to_json(once.search.trials)
    assert result.benchmark.compressed.num_params < once.benchmark.compressed.num_params
    page = (tmp_path / "run" / "report.html").read_text()
    assert "too slow in the final benchmark" in page and "confirm (2)" in page and "confirm (3)" not in page
    again = timed_run(dense, tmp_path / "run")
    assert all(stage.was_cached for stage in again.stages)
    assert to_json(again.search) == to_json(result.search) and again.too_slow == result.too_slow


def test_where_no_finalist_holds_its_latency_a_faster_one_is_made(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    Clock(monkeypatch, again=1.3, benchmark=1.3)
    result = timed_run(dense, tmp_path / "run")
    assert result.search and result.decision.verdict is Verdict.SHIP
    assert not result.too_slow  # found out before anything was trained to the end
    best = result.search.trials[result.search.best]
    assert best.narrowed_from is not None and best.number >= tiny.recipe().search.num_trials
    assert "exceeded the latency budget" in (tmp_path / "run" / "report.html").read_text()


def test_every_plan_holds_to_the_constraints(dense: nn.Module, first: tuple[Path, RunResult, bool]) -> None:
    asked = Constraints(least={"blocks.*": 3, "stem": 0.5}, uniform=("blocks.*",), least_blocks=1)
    result = run(dense, first[0], constraints=asked)
    cached = {stage.stage for stage in result.stages if stage.was_cached}
    assert {"baseline", "observe", "score"} <= cached and not {"structures", "curves"} & cached
    assert result.search and result.structures.constraints.least == {
        "blocks.0.conv1": 3,
        "blocks.1.conv1": 3,
        "stem": 4,
    }
    for trial in result.search.trials:
        assert len(trial.plan.blocks) <= 1
        widths = {cut.group: cut.num_units - len(cut.removed) for cut in trial.plan.cuts}
        inner = {widths.get(f"{b.name}.conv1", 8) for b in result.structures.blocks if b.name not in trial.plan.blocks}
        assert len(inner) == 1 and min(inner) >= 3 and widths.get("stem", 8) >= 4


def test_a_hold_for_noise_ends_where_the_machine_is_quiet_again(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held while others are at work, with the command to run next; the same call again measures, and ships."""
    target = replace(TARGET, budget=Budget(latency_p50="4x", accuracy_drop_pp=50.0))

    def run_while(verdict: Literal["steady", "noisy"], **options: bool) -> RunResult:
        seen = conditions(verdict, *(["others kept 1.9 of 2 processors busy"] if verdict == "noisy" else []))
        monkeypatch.setattr(latency, "judge_conditions", lambda *_, **__: seen)
        arguments = (dense, tiny.load_data(), tiny.task(), tiny.recipe(), target, tmp_path / "run")
        return compress(*arguments, command="deploypipe run tiny cpu", **options)

    held = run_while("noisy")
    check = held.decision.checks[0]
    assert held.decision.verdict is Verdict.HOLD and check.status is Status.UNKNOWN and check.measured
    show_result(load_result(tmp_path / "run"), tmp_path / "run")
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("measure again when the machine is quiet: deploypipe run tiny cpu")
    assert "not measured" not in shown
    shipped = run_while("steady")
    assert shipped.decision.verdict is Verdict.SHIP
    assert {stage.stage for stage in shipped.stages if not stage.was_cached} == {"benchmark"}
    again = run_while("steady", remeasure=True)
    assert {stage.stage for stage in again.stages if not stage.was_cached} == {"benchmark"}


def test_a_dense_model_within_its_budget_ships_as_it_is(dense: nn.Module, tmp_path: Path) -> None:
    target = replace(TARGET, budget=Budget(params="1 M", file_size="10 MiB", accuracy_drop_pp=1.0))
    result = compress(dense, tiny.load_data(), tiny.task(), tiny.recipe(), target, tmp_path / "run")
    assert result.search is None and result.prune is None and result.training is None
    assert result.decision.verdict is Verdict.SHIP
    assert "the dense model is within the budget as it is, nothing was removed" in result.decision.reason
    assert file_sha256(tmp_path / "run" / "model.onnx") == result.benchmark.dense.file.sha256
    assert "nothing was removed" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    aged = replace(target, budget=replace(target.budget, max_age_days=1e-7))
    again = compress(dense, tiny.load_data(), tiny.task(), tiny.recipe(), aged, tmp_path / "run")
    assert again.benchmark == result.benchmark  # of the run before, which is more than 9 ms ago
    assert again.decision.verdict is Verdict.HOLD and "age failed" in again.decision.reason


@pytest.fixture(scope="module")
def held(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult, list[str]]:
    folder, told = tmp_path_factory.mktemp("runs") / "held", []

    def notify(event: Event) -> None:
        if isinstance(event, Warned):
            told.append(event.text)

    result = compress(dense, tiny.load_data(), tiny.task(), tiny.recipe(), GPU, folder, notify=notify)
    return folder, result, told


@pytest.mark.skipif(can(GPU).verdict != "build only", reason="needs tensorrt-rtx, and no GPU")
class TestAnotherDevice:
    """A target that this machine is not: files are made, nothing is measured, nothing is guessed."""

    def test_it_is_held_with_the_reason(self, held: tuple[Path, RunResult, list[str]]) -> None:
        folder, result, told = held
        assert result.decision.verdict is Verdict.HOLD
        checks = {check.name: check for check in result.decision.checks}
        for name in ("latency_p50", "peak_memory", "accuracy_drop"):
            assert (checks[name].status.value, checks[name].measured) == ("UNKNOWN", None)
            assert "no NVIDIA GPU is usable here" in checks[name].reason
        for measured in (result.benchmark.dense, result.benchmark.compressed):
            assert (measured.latency, measured.accuracy, measured.peak_memory_mib) == (None, None, None)
        here = result.benchmark.accuracy_here
        assert here and 0 < here.compressed.value <= here.dense.value + 0.1 and here.num_samples > 2
        assert any("nothing can be measured for gpu here" in message for message in told)
        assert to_json(load_result(folder)) == to_json(result)

    def test_the_search_went_by_macs(self, held: tuple[Path, RunResult, list[str]]) -> None:
        _, result, _ = held
        assert result.search
        assert all(t.candidate.latency_p50_ms is None for t in result.search.trials)
        chosen = result.search.trials[result.search.best]
        assert chosen.violations["macs"] <= 0 and 0 < chosen.candidate.accuracy <= 1
        assert result.benchmark.compressed.num_macs <= 0.5 * result.benchmark.dense.num_macs  # the least of the limits
        told = "latency_p50 and peak_memory cannot be measured here, and the search went by MACs instead, at 0.5x"
        assert any(told in note for note in result.benchmark.notes)

    def test_the_files_are_there(self, held: tuple[Path, RunResult, list[str]]) -> None:
        folder, result, _ = held
        assert result.engine
        placed = load_record(folder / "model.engine")
        assert placed == replace(result.engine, path="model.engine", log="model.engine.log")
        assert (folder / placed.log).is_file()
        assert file_sha256(folder / "model.engine") == result.engine.sha256 == result.benchmark.compressed.file.sha256
        assert file_sha256(folder / "model.onnx") == result.engine.onnx_sha256
        assert result.engine.key.compute_capabilities == ("8.9",)
        report = (folder / "report.html").read_text(encoding="utf-8")
        assert "This machine is not the target" in report and result.engine.layers[0].name in report

    def test_a_rerun_computes_nothing(self, dense: nn.Module, held: tuple[Path, RunResult, list[str]]) -> None:
        folder, result, _ = held
        again = compress(dense, tiny.load_data(), tiny.task(), tiny.recipe(), GPU, folder)
        assert all(stage.was_cached for stage in again.stages)
        assert again.decision == result.decision


@pytest.mark.slow
@pytest.mark.skipif(can(GPU).verdict != "build only", reason="needs tensorrt-rtx, and no GPU")
def test_on_the_device_the_engines_are_measured(
    dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a GPU were here: engines are really built, and what opens one runs the ONNX file it was built from."""
    opened: list[str] = []

    class Stand:
        @contextmanager
        def open(self, path: Path, *, num_threads: int) -> Iterator[Session]:
            opened.append(path.name)
            wanted = load_record(path).onnx_sha256
            source = next(p for p in (tmp_path / "run").rglob("*.onnx") if file_sha256(p) == wanted)
            with OnnxRuntime().open(source, num_threads=num_threads) as session:
                yield session

    gpu = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9")
    monkeypatch.setattr(ability_for_target, "this_machine", lambda: replace(this_machine(), gpus=(gpu,), driver="1"))
    monkeypatch.setitem(RUNTIMES, "tensorrt-rtx", lambda *_: Stand())
    package = importlib.import_module("deploypipe.benchmark")
    monkeypatch.setattr(package, "measure_peak_memory", lambda *_, **__: (None, "it is the GPU's"))
    target = replace(GPU, budget=Budget(latency_p50="4x", macs="0.5x", file_size="2x", accuracy_drop_pp=50.0))
    recipe = replace(tiny.recipe(), search=replace(tiny.recipe().search, num_trials=1))
    result = compress(dense, tiny.load_data(), tiny.task(), recipe, target, tmp_path / "run")
    assert {"dense.engine", "candidate.engine", "compressed.engine"} <= set(opened)
    report = result.benchmark
    assert report.dense.latency and report.compressed.latency and report.accuracy_drop_pp
    assert report.dense.file.path.endswith("/dense.engine")
    assert result.engine and report.compressed.file.sha256 == result.engine.sha256
    assert file_sha256(tmp_path / "run" / "model.engine") == result.engine.sha256
    assert {check.status.value for check in result.decision.checks if check.name != "latency_p50"} == {"PASS"}
    engines = [t.candidate.file_size_mib for t in result.search.trials] if result.search else []
    assert engines and min(engines) > 0.2  # an engine's, not an ONNX file's
