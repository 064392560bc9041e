"""A search that one process begins and another goes on with, by the stages that the first left."""

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch
from s3_server import Store

from deploypipe.errors import DeploypipeError, StorageError
from deploypipe.pipeline import compress, help_search
from deploypipe.records import Event, Planned, Progress, Started
from deploypipe.runs.result import RunResult
from deploypipe.scheduling.exclusive_measurement import try_lock
from deploypipe.search.distributed.study_storage import Storage

NUM_TRIALS = 5
RECIPE = replace(tiny.recipe(), search=replace(tiny.recipe().search, num_trials=NUM_TRIALS, num_parallel=3))
TARGET = tiny.target(macs="0.5x")


@pytest.fixture(scope="module")
def unsearched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended before its search."""

    def notify(event: Event) -> None:
        if event == Started(stage="search"):
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("unsearched") / "run"
    with pytest.raises(KeyboardInterrupt):
        compress(tiny.build_model(), tiny.load_data(), tiny.task(), RECIPE, TARGET, folder, notify=notify)
    return folder


@pytest.fixture(scope="module")
def alone(unsearched: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = Path(shutil.copytree(unsearched, tmp_path_factory.mktemp("alone") / "run"))
    return compress(tiny.build_model(), tiny.load_data(), tiny.task(), RECIPE, TARGET, folder)


def choice(result: RunResult) -> object:
    assert result.search
    trials = [(t.number, t.knobs, t.plan, t.candidate.accuracy, t.feasible) for t in result.search.trials]
    return trials, result.search.best, result.search.finalists


def is_of_a_stage(event: Event) -> bool:
    """Not of what comes before them all."""
    return not isinstance(event, Planned) and event.stage not in ("check", "fingerprints")


def interrupt_at_trial(number: int, done: list[int]) -> object:
    def notify(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "search":
            done.append(event.done)
            if event.done == number:
                raise KeyboardInterrupt

    return notify


@pytest.fixture(params=["folder", "s3"])
def stages(request: pytest.FixtureRequest, unsearched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(shutil.copytree(unsearched, tmp_path / "run"))  # the run folder itself
    store = Store()
    request.addfinalizer(store.stop)
    return f"{store.new_bucket(monkeypatch)}/stages"


def begin(storage: Storage, folder: Path) -> None:
    """The first process, ended by Ctrl-C after two trials."""
    with pytest.raises(KeyboardInterrupt):
        compress(
            tiny.build_model(),
            tiny.load_data(),
            tiny.task(),
            RECIPE,
            TARGET,
            folder,
            storage=storage,
            notify=interrupt_at_trial(2, []),  # type: ignore[arg-type]
        )


def test_a_worker_goes_on_with_the_search_of_a_run(stages: str, alone: RunResult, tmp_path: Path) -> None:
    storage = Storage(url=f"sqlite:///{tmp_path}/study.db", study="tiny", stages=stages)
    begin(storage, tmp_path / "run")
    told: list[int] = []
    model, data, task = tiny.build_model(), tiny.load_data(), tiny.task()
    found = help_search(
        model,
        data,
        task,
        RECIPE,
        TARGET,
        storage,
        notify=interrupt_at_trial(0, told),  # type: ignore[arg-type]
    )
    assert told == list(range(2, NUM_TRIALS + 1)) and len(found.trials) == NUM_TRIALS  # the two before come together
    result = compress(model, data, task, RECIPE, TARGET, tmp_path / "run", storage=storage)
    assert choice(result) == choice(alone)
    assert result.search and all(trial.evaluated_by for trial in result.search.trials)


def test_run_and_workers_of_one_database_are_side_by_side(unsearched: Path, tmp_path: Path) -> None:
    stages = shutil.copytree(unsearched, tmp_path / "run")
    storage = Storage(url=f"sqlite:///{tmp_path}/study.db", study="tiny", stages=str(stages))
    could_measure: list[bool] = []

    def notify(event: Event) -> None:
        if not is_of_a_stage(event):
            return
        (room,) = storage.place.glob("*-work.lock")
        with room.open() as opened:
            could_measure.append(try_lock(opened, fcntl.LOCK_EX))
        if isinstance(event, Progress) and event.stage == "search" and event.done == 2:
            raise KeyboardInterrupt

    model, data, task = tiny.build_model(), tiny.load_data(), tiny.task()
    with pytest.raises(KeyboardInterrupt):
        compress(model, data, task, RECIPE, TARGET, tmp_path / "run", storage=storage, notify=notify)
    with pytest.raises(KeyboardInterrupt):
        help_search(model, data, task, RECIPE, TARGET, storage, notify=notify)
    assert could_measure and not any(could_measure)


def test_a_worker_with_something_else_or_a_changed_stage_is_refused_by_name(unsearched: Path, tmp_path: Path) -> None:
    stages = shutil.copytree(unsearched, tmp_path / "run")
    storage = Storage(url=f"sqlite:///{tmp_path}/study.db", study="tiny", stages=str(stages))
    begin(storage, tmp_path / "run")
    model, data, task = tiny.build_model(), tiny.load_data(), tiny.task()

    def refusal(**other: object) -> str:
        given = {"model": model, "splits": data, "task": task, "recipe": RECIPE, "target": TARGET, **other}
        with pytest.raises(DeploypipeError) as told:
            help_search(storage=storage, **given)  # type: ignore[arg-type]
        return str(told.value)

    another = tiny.build_model()
    with torch.no_grad():
        another.head.bias += 1.0
    assert "made with another 'model'" in refusal(model=another)
    few = replace(data, val=tiny.TensorBatches(*tiny.images(100, seed=5), 100))
    assert "made with another 'data'" in refusal(splits=few)
    assert "made with another 'source'" in refusal(source="other code")
    assert "made with another 'device'" in refusal(target=replace(TARGET, num_threads=2))
    sampled = replace(RECIPE, search=replace(RECIPE.search, sampler="random"))
    assert "made with another 'search'" in refusal(recipe=sampled)
    observed = replace(RECIPE, observe=replace(RECIPE.observe, num_samples=64))
    assert "has no sound stage memory-" in refusal(recipe=observed)  # the first that depends on it
    [moments] = (tmp_path / "run").glob("*-observe-*/first.safetensors")
    moments.write_bytes(moments.read_bytes()[:-1])
    assert "has no sound stage observe-" in refusal()  # a stage that was changed is not used


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql://ada:hunter2@127.0.0.1:9/none", r"postgresql://127\.0\.0\.1:9/none: the study cannot be read"),
        ("no address", "is not the address of a database"),
        ("sqlite:////no/such/folder/study.db", "cannot be read or written .*unable to open"),
        ("oracle://ada:hunter2@db/none", "write postgresql://..., and pip install"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_without_its_password(address: str, told: str, tmp_path: Path) -> None:
    storage = Storage(url=address, study="tiny", stages=str(tmp_path))
    with pytest.raises(StorageError, match=told) as refused:
        help_search(tiny.build_model(), tiny.load_data(), tiny.task(), RECIPE, TARGET, storage)
    assert "hunter2" not in str(refused.value)
    seen: list[Event] = []
    with pytest.raises(StorageError, match=told):
        compress(
            tiny.build_model(),
            tiny.load_data(),
            tiny.task(),
            RECIPE,
            TARGET,
            tmp_path / "run",
            storage=storage,
            notify=seen.append,
        )
    assert not any(map(is_of_a_stage, seen))  # before the first stage
