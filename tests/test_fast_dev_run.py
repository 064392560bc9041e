"""A fast development run goes through every stage on a few samples, and nothing makes its result ship."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny_pipeline as tiny

from deploypipe.cli.run_targets import RunArguments
from deploypipe.errors import BundleError, ConfigError, RunFolderError
from deploypipe.pipeline import compress
from deploypipe.records import Status, Verdict, Waiver
from deploypipe.records.stages import STAGES
from deploypipe.release.bundle import make_bundle
from deploypipe.release.decide_again import decide_again
from deploypipe.report.next_steps import next_steps
from deploypipe.report.run_tables import check_cells
from deploypipe.report.search_text import reach_rows
from deploypipe.runs.full_run_command import full_run_command
from deploypipe.runs.result import RunResult, save_result
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.stages.fast_dev_run import first_batches, short_recipe, short_target
from deploypipe.stages.ship_trial import choose_trial
from deploypipe.task import count_batches

RECIPE = replace(tiny.recipe(), fast_dev_run=True)
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    target = tiny.target(latency_p50="0.01x", macs="0.001x")  # no network is as fast: its own budget does not count
    folder = tmp_path_factory.mktemp("runs") / "fast"
    return compress(
        tiny.build_model(),
        tiny.load_data(),
        tiny.task(),
        RECIPE,
        target,
        folder,
        command="deploypipe run t here --fast-dev-run",
        tensorboard=folder / "boards",
    )


def test_every_stage_runs(done: RunResult) -> None:
    # The gate is never remembered, and both trials may make the same network, which is then the only finalist.
    left_out = {"dense_precision", "precision", "engine", "gate", "finalist"}
    assert {stage.stage for stage in done.stages} - {"finalist"} == {
        stage.name for stage in STAGES if is_of_a_run(stage.name)
    } - left_out
    assert done.search is not None and len(done.search.trials) == 2 and done.search.finalists
    assert done.training is not None and [epoch.epoch for epoch in done.training.epochs] == [0, 1]
    assert (
        done.benchmark.latency_ratio is not None and done.benchmark.compressed.num_macs < done.benchmark.dense.num_macs
    )


def test_tensorboard_shows_it(done: RunResult) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(Path(done.folder) / "boards" / "model-here-fast-dev-run"))
    events.Reload()
    assert done.search is not None and done.training is not None
    accuracies = [event.value for event in events.Scalars("trial/accuracy")]
    assert accuracies == pytest.approx([trial.candidate.accuracy for trial in done.search.trials])
    assert events.Scalars("finetune/train_loss")[0].value == pytest.approx(done.training.epochs[1].train_loss)
    tags = {f"seconds/{stage.stage}" for stage in done.stages} | {"final/latency_ratio", "final/compressed.macs"}
    assert tags <= set(events.Tags()["scalars"])


def is_of_a_run(name: str) -> bool:
    from deploypipe.stages import expected_stages

    return f'"{name}"' in Path(expected_stages.__file__).read_text(encoding="utf-8")


def test_it_holds_whatever_was_measured(done: RunResult) -> None:
    assert done.decision.verdict is Verdict.HOLD
    (held,) = [check for check in done.decision.checks if check.name == "fast_dev_run"]
    assert held.status is Status.UNKNOWN and "fast_dev_run is unknown (fast development run" in done.decision.reason
    steps = next_steps(done)
    assert all(step.endswith("every stage works; for a result that can ship: deploypipe run t here") for step in steps)


def test_limits_that_it_loosens_are_shown_as_none(done: RunResult) -> None:
    (cells,) = [cells for check in done.decision.checks if (cells := check_cells(check))[0] == "latency p50"]
    assert cells[1] == "PASS" and cells[3:] == ("no limit", "no limit")
    (row,) = [row for row in reach_rows(done.search, done.target) if row[0] == "latency p50"]
    assert row[2:4] == ("no limit", "no limit")


def test_the_full_run_has_a_folder_of_its_own_and_trials_of_a_fast_one_name_it(done: RunResult) -> None:
    with pytest.raises(RunFolderError, match=r"first run in full: deploypipe run t here$"):
        choose_trial(Path(done.folder), 1)
    fast = "deploypipe run t here --out=r/late --shared=s --set=fast_dev_run=true --ship-trial=1"
    assert full_run_command(fast) == "deploypipe run t here --out=r/late-full --shared=s"
    several = "deploypipe run t a --out=runs/t-fast-dev-run/a --shared=runs/t-fast-dev-run/shared --fast-dev-run"
    assert full_run_command(several) == "deploypipe run t a --out=runs/t/a --shared=runs/t/shared"
    assert full_run_command("deploypipe run t a") == "deploypipe run t a --set=fast_dev_run=false"  # recipe() asked
    assert full_run_command("") == ""


def test_no_waiver_and_no_later_decision_ships_it(done: RunResult, tmp_path: Path) -> None:
    names = [check.name for check in done.decision.checks]
    day = NOW.date().isoformat()
    waivers = [Waiver(check=name, reason="a trial", by="me", granted=day, expires=day) for name in names]
    with_all = decide_again(tmp_path, done, None, waivers, NOW)
    assert [check.name for check in with_all.decision.checks if not check.is_settled] == ["fast_dev_run"]
    assert with_all.decision.verdict is Verdict.HOLD
    with pytest.raises(BundleError, match=r"the gate holds this run: .*fast development run"):
        make_bundle(done.folder, tmp_path / "out", now=NOW)


def test_a_real_run_finds_none_of_its_results(done: RunResult) -> None:
    """Even on data of which the fast run used all, with its very settings: one key differs, which all stages hold."""
    from deploypipe.runs.store import open_run
    from deploypipe.stages.context import prepare_run

    origins = []
    for is_fast in (True, False):
        recipe = replace(short_recipe(RECIPE), fast_dev_run=is_fast)
        with open_run(Path(done.folder)) as run:
            splits = first_batches(tiny.load_data())
            ctx = prepare_run(tiny.build_model(), splits, tiny.task(), recipe, short_target(tiny.target()), run)
        origins.append(ctx.origin)
    assert origins[0].pop("fast_dev_run") is True and origins[0] == origins[1]


def test_it_leaves_the_folder_of_a_real_run_alone(done: RunResult, tmp_path: Path) -> None:
    save_result(tmp_path, replace(done, recipe=tiny.recipe()))
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(RunFolderError, match="holds the result of a real run; choose another folder"):
        compress(tiny.build_model(), tiny.load_data(), tiny.task(), RECIPE, tiny.target(), tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before


def test_workers_are_refused(tmp_path: Path) -> None:
    storage = Storage(url=f"sqlite:///{tmp_path / 'db'}", study="s")
    with pytest.raises(ConfigError, match="fast_dev_run: needs no workers"):
        compress(tiny.build_model(), tiny.load_data(), tiny.task(), RECIPE, tiny.target(), tmp_path, storage=storage)


def test_splits_are_shortened_once() -> None:
    splits = first_batches(first_batches(tiny.load_data()))
    assert [count_batches(split) for split in (splits.calib, splits.train, splits.val, splits.test)] == [2, 1, 2, 2]


@pytest.mark.parametrize(("changes", "is_asked"), [([], True), (["fast_dev_run=true"], False)])
def test_its_folder_has_its_own_name(changes: list[str], is_asked: bool) -> None:
    asked = RunArguments(str(tiny.PATH), ["x86_cpu"], changes, None, None, None, None, None, False, is_asked)
    assert asked.folder == Path("runs/tiny_pipeline-x86_cpu-fast-dev-run")
    assert ("--fast-dev-run" in asked.shown_command(asked.devices[0])) is is_asked
