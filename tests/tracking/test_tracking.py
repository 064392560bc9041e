"""What MLflow and TensorBoard show of a run: read back from a real store and from real event files."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_runs import finished_run

from deploypipe import tracking
from deploypipe.errors import ConfigError, DataError
from deploypipe.pipeline import _as_tracked
from deploypipe.records import EpochEnded, EpochLog, Event, Finished, Notify, RunEnded, Started, TrialEnded, Warned
from deploypipe.tracking import require_packages, tracked
from deploypipe.tracking.delivery import Delivery
from deploypipe.tracking.mlflow_tracker import MlflowTracker
from deploypipe.tracking.tracked_run import Figure, Outcome, TrackedRun, flat_parameters

mlflow = pytest.importorskip("mlflow", reason="mlflow is absent; pip install 'deploypipe[mlflow]'")
pytest.importorskip("tensorboard", reason="tensorboard is absent; pip install 'deploypipe[tracking]'")

DONE = finished_run()
assert DONE.search
TRIALS = DONE.search.trials


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a store: one for all tests, because its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setattr(tracking, "_WAIT_S", 120.0)  # a machine at other work
    return mlflow.MlflowClient(tracking_uri=store)


def runs_of(client: Any, request: pytest.FixtureRequest) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(request.node.name).experiment_id]))


def run_in(folder: Path, **parameters: str) -> TrackedRun:
    return TrackedRun(name="net-here", parameters={"recipe.seed": "0", **parameters}, folder=folder)


def epoch(number: int, *, trial: int | None = None) -> EpochEnded:
    loss = float("nan") if number == 0 else 1.0 / number
    log = EpochLog(epoch=number, learning_rate=0.1, train_loss=loss, val_accuracy=0.5 + number / 10, seconds=2.0)
    return EpochEnded(stage="finetune", epoch=log, trial=trial)


def whole_run() -> Iterator[Event]:
    yield Finished(stage="observe", seconds=3.5)
    yield from (TrialEnded(stage="search", trial=trial) for trial in TRIALS)
    yield from (epoch(0, trial=1), epoch(1, trial=1))
    for _ in range(2):  # the first network was too slow
        yield Started(stage="finetune")
        yield from map(epoch, range(3))
    yield RunEnded(stage="gate", report=DONE.benchmark, decision=DONE.decision)


EVENTS = list(whole_run())


def play(run: TrackedRun, events: Sequence[Event], tensorboard: Path | None = None) -> list[Event]:
    """What a listener sees of a run with these events."""
    seen: list[Event] = []
    with tracked(seen.append, run, tensorboard) as notify:
        for event in events:
            notify(event)
    return seen


def series(client: Any, run_id: str, name: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for metric in client.get_metric_history(run_id, name):
        found.setdefault(metric.step, []).append(metric.value)
    return found


def test_a_run_is_read_back(client: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert play(run_in(tmp_path), EVENTS, tmp_path / "board") == EVENTS  # and no warning
    (run,) = runs_of(client, request)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "net-here")
    assert run.data.params == {"recipe.seed": "0"}
    assert run.data.tags["deploypipe.verdict"] == DONE.decision.verdict.value
    expected = {
        "trial/accuracy": {trial.number: [trial.candidate.accuracy] for trial in TRIALS},
        "finalist_1/val_accuracy": {0: [0.5], 1: [0.6]},
        "finetune/train_loss": {1: [1.0], 2: [0.5]},
        "finetune_2/train_loss": {1: [1.0], 2: [0.5]},
        "seconds/observe": {0: [3.5]},
        "final/compressed.params": {0: [float(DONE.benchmark.compressed.num_params)]},
    }
    written = board(tmp_path / "board" / "net-here")
    for name, values in expected.items():
        assert series(client, run.info.run_id, name) == values
        assert written[name] == {step: pytest.approx(value[0], rel=1e-6) for step, value in values.items()}


def board(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith(("parameters", "status", "verdict"))]
    assert len(texts) == 3
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (DataError("the train split is empty"), "FAILED", "the train split is empty"),
        (OSError("no space"), "FAILED", "OSError: no space"),
        (KeyboardInterrupt(), "KILLED", "interrupted; the same command resumes"),
    ],
    ids=["user", "machine", "interrupt"],
)
def test_a_run_that_fails_says_why(
    error: BaseException, status: str, told: str, client: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(type(error)), tracked(lambda _: None, run_in(tmp_path)) as notify:
        notify(epoch(1))
        raise error
    (run,) = runs_of(client, request)
    assert (run.info.status, run.data.tags["deploypipe.error"]) == (status, told)
    assert series(client, run.info.run_id, "finetune/train_loss") == {1: [1.0]}


def test_the_same_command_continues_its_run(client: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trials = [TrialEnded(stage="search", trial=trial) for trial in TRIALS]
    with suppress(KeyboardInterrupt), tracked(lambda _: None, run_in(tmp_path)) as notify:
        notify(trials[0])
        raise KeyboardInterrupt
    ending = RunEnded(stage="gate", report=DONE.benchmark, decision=DONE.decision)
    play(run_in(tmp_path), [*trials, epoch(1), ending])
    (run,) = runs_of(client, request)
    assert (run.info.status, run.data.tags["deploypipe.error"]) == ("FINISHED", "")
    values = {trial.number: [trial.candidate.accuracy] for trial in TRIALS}
    assert series(client, run.info.run_id, "trial/accuracy") == values  # the first trial once
    play(run_in(tmp_path, **{"search.num_trials": "99"}), trials)
    others = {other.info.run_id for other in runs_of(client, request)} - {run.info.run_id}
    assert len(others) == 1
    client.delete_run(*others)  # which the folder names now
    play(run_in(tmp_path, **{"search.num_trials": "99"}), trials)
    assert len({other.info.run_id for other in runs_of(client, request)} - others - {run.info.run_id}) == 1


def test_a_server_that_is_down_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_WAIT_S", 120.0)
    seen = play(run_in(tmp_path), EVENTS)
    (warning,) = [event for event in seen if isinstance(event, Warned)]
    assert "MLflow at http://" in warning.text and "the run goes on without it" in warning.text
    assert "hunter2" not in warning.text and [event for event in seen if event != warning] == EVENTS


class Slow:
    """Takes nothing until it is released."""

    title = "Slow"

    def __init__(self) -> None:
        self.released, self.taken = threading.Event(), 0

    def import_packages(self) -> None:
        pass

    def open(self) -> None:
        self.released.wait()

    def log(self, figures: Sequence[Figure]) -> None:
        self.taken += len(figures)

    def close(self, outcome: Outcome) -> None:
        self.taken += 1


class Importing(Slow):
    """Notes the thread that imports, and may lack a package."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.released.set()
        self.error, self.thread = error, 0

    def import_packages(self) -> None:
        self.thread = threading.get_ident()
        if self.error:
            raise self.error


def test_packages_are_imported_on_the_thread_of_the_run() -> None:
    """Both threads at once would see packages that are half imported: pandas, of MLflow and of the report's plotly."""
    for error in (None, ImportError("no module named pandas")):
        tracker = Importing(error)
        delivery = Delivery(tracker)  # type: ignore[arg-type]
        assert tracker.thread == threading.get_ident()
        delivery.close(Outcome(status="FINISHED", texts={}), 60.0)
        assert delivery.take_problem() == (f"Slow: {error}; the run goes on without it" if error else "")
        assert tracker.taken == (0 if error else 1)


def test_another_source_of_the_pipeline_is_another_run(tmp_path: Path) -> None:
    """The source that a run gets ends with the constants that `--set pipeline.X=...` changed."""

    def key(source: str) -> str:
        ctx: Any = SimpleNamespace(
            recipe=DONE.recipe, target=DONE.target, origin={"source": source}, run=SimpleNamespace(path=tmp_path)
        )
        return MlflowTracker(_as_tracked(ctx, "net", None), "sqlite:///x.db")._key

    assert key("WIDTH = 8") == key("WIDTH = 8") != key("WIDTH = 8\nWIDTH=16")


def test_what_the_trackers_import_is_there_before_they_open(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from deploypipe.tracking.mlflow_tracker import MlflowTracker
from deploypipe.tracking.tracked_run import TrackedRun
assert "pandas" not in sys.modules
MlflowTracker(TrackedRun(name="net", parameters={}, folder=Path()), "sqlite:///x.db").import_packages()
print({"mlflow", "pandas", "sqlalchemy", "alembic"} <= set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_nobody_waits_for_a_slow_server() -> None:
    slow = Slow()
    delivery = Delivery(slow)  # type: ignore[arg-type]
    for step in range(5_000):  # a queue without a bound would hold them all, one that waits would never get here
        delivery.put([Figure(name="loss", value=0.0, step=step)])
    told = delivery.take_problem()
    assert told == "Slow is too slow, so later figures of this run are not tracked" and not delivery.take_problem()
    slow.released.set()


def test_the_end_is_waited_for_but_not_for_ever() -> None:
    slow, quick = Slow(), Slow()
    quick.released.set()
    for tracker, seconds in ((slow, 0.05), (quick, 60.0)):
        delivery = Delivery(tracker)  # type: ignore[arg-type]
        delivery.put([Figure(name="loss", value=0.0)])
        delivery.close(Outcome(status="FINISHED", texts={}), seconds)
        assert ("did not take the last figures within 0.05 s" in delivery.take_problem()) is (tracker is slow)
    assert (slow.taken, quick.taken) == (0, 2)
    slow.released.set()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    (warning,) = play(run_in(tmp_path), [])
    assert isinstance(warning, Warned) and "pip install 'deploypipe[mlflow]'" in warning.text
    require_packages(None)
    with pytest.raises(ConfigError, match=r"--tensorboard: the package tensorboard is not installed; .*\[tracking\]"):
        require_packages(tmp_path)


def test_nothing_is_tracked_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listener(event: Event) -> None:
        raise AssertionError("no event was sent")

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    names = {thread.name for thread in threading.enumerate()}
    with tracked(listener, run_in(tmp_path)) as notify:
        same: Notify = listener
        assert notify is same and {thread.name for thread in threading.enumerate()} <= names


def test_settings_become_dotted_names() -> None:
    nested = {"recipe": {"search": {"num_trials": 4, "sampler": "tpe", "max_minutes": None}, "keep": ["a", "b"]}}
    assert dict(flat_parameters(nested)) == {
        "recipe.search.num_trials": "4",
        "recipe.search.sampler": "tpe",
        "recipe.keep": '["a", "b"]',
    }
