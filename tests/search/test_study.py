"""A killed study continues as if never interrupted; budgets that cannot be met are refused by name."""

import resource
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st
from made_up_searches import DENSE, HALF, NUM_VAL, ORIGIN, SETTINGS, Evaluator, propose, run
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import IntegrityError, PendingRollbackError

from deploypipe.errors import BudgetError, ConfigError, RunFolderError
from deploypipe.recipe import ObjectiveName, Search
from deploypipe.records import Candidate, Event, Note, Progress, PruningPlan, SearchResult, Trial
from deploypipe.search.allocation.limits import violations
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import TrialQueue, covered_seconds
from deploypipe.search.evaluation.early_stopping import interim_sample_counts
from deploypipe.search.pareto import pareto_front
from deploypipe.search.sampling import importances, knobs
from deploypipe.search.study import search
from deploypipe.target import Limit


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    """A finished study with `SETTINGS`: its file, which is to be copied before it is changed, and what was found."""
    path = tmp_path_factory.mktemp("studies") / "whole.db"
    return path, run(Evaluator(), path)


def test_killed_study_ends_with_the_trials_of_an_undisturbed_one(
    undisturbed: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    path, whole = undisturbed
    for kill in (0, 3, 4):  # at the first trial, at the fourth, at the eighth: the last one is the sampler's
        with pytest.raises(KeyboardInterrupt):
            run(Evaluator(kill_at=kill), tmp_path / "killed.db")
    assert run(Evaluator(), tmp_path / "killed.db") == whole
    assert [t.number for t in whole.trials] == list(range(10))
    assert all(t.candidate.latency_p50_ms <= 2.0 for t in whole.trials if t.feasible)
    best = whole.trials[whole.best]
    assert best.feasible
    assert best.candidate.accuracy == max(t.candidate.accuracy for t in whole.trials if t.feasible)
    idle = Evaluator()
    assert run(idle, path) == whole
    assert idle.seen == []


def test_changing_the_number_of_trials_keeps_finished_ones(
    undisturbed: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    whole = undisturbed[1]
    with suppress(BudgetError):  # none of so few
        run(Evaluator(), tmp_path / "study.db", settings=replace(SETTINGS, num_trials=7))
    rest = Evaluator()
    assert run(rest, tmp_path / "study.db") == whole and len(rest.seen) <= 3
    few = run(rest, tmp_path / "study.db", settings=replace(SETTINGS, num_trials=9))
    assert few.trials == whole.trials[:9] and len(rest.seen) <= 3


def test_when_the_time_is_up_the_trials_begun_by_then_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial takes a minute here. What was decided stays decided; with more time the search goes on."""
    monkeypatch.setattr(TrialQueue, "_seconds_spent", lambda queue: 60.0 * len(queue.done()))
    evaluate, told, bounded = Evaluator(), list[Event](), replace(SETTINGS, max_minutes=8.5)
    found = run(evaluate, tmp_path / "study.db", settings=bounded, notify=told.append)
    assert len(found.trials) == 9 and found.trials[found.best].feasible
    assert told[-1] == Note(stage="search", text="the time is up: 9 of 10 trials in 8.5 minutes (search.max_minutes)")
    monkeypatch.setattr(TrialQueue, "_seconds_spent", lambda queue: 0.0)  # of a resumed run, another clock
    num_evaluated = len(evaluate.seen)
    told.clear()
    assert run(evaluate, tmp_path / "study.db", settings=bounded, notify=told.append) == found
    assert len(evaluate.seen) == num_evaluated
    assert [event.done for event in told if isinstance(event, Progress)] == [9]  # so a rate is that of this run
    whole = run(evaluate, tmp_path / "study.db", settings=replace(SETTINGS, max_minutes=60))
    assert whole.trials[:9] == found.trials and len(whole.trials) == 10


def test_time_counts_once_however_many_trials_are_at_work() -> None:
    start = datetime(2026, 1, 1)
    at = [start + timedelta(seconds=second) for second in range(100)]
    assert covered_seconds([(at[50], at[60]), (at[0], at[10]), (at[2], at[5]), (at[8], at[20]), (at[60], at[61])]) == 31
    assert covered_seconds([(at[10], at[0])]) == covered_seconds([]) == 0  # the clock was set back


@pytest.mark.parametrize(
    ("sampler", "objectives", "num_trials"),
    [
        ("tpe", ("accuracy", "latency"), 12),
        ("gp", ("accuracy",), 9),
        ("gp", ("accuracy", "latency"), 8),
        ("nsga2", ("accuracy", "latency", "peak_memory"), 18),  # into the third generation
        ("random", ("accuracy",), 9),
    ],
)
def test_every_sampler_continues_as_if_never_interrupted(
    sampler: Any, objectives: tuple[ObjectiveName, ...], num_trials: int, tmp_path: Path
) -> None:
    settings = Search(num_trials=num_trials, sampler=sampler, objectives=objectives)
    dense = replace(DENSE, peak_memory_mib=2.0)
    whole = run(Evaluator(memory_mib=2.0), tmp_path / "whole.db", settings=settings, dense=dense)
    for _ in range(num_trials):  # killed in every second trial there is, once
        with suppress(KeyboardInterrupt):
            piecewise = run(
                Evaluator(kill_at=2, memory_mib=2.0), tmp_path / "killed.db", settings=settings, dense=dense
            )
            break
    assert piecewise == whole


def test_samplers_differ_from_random_search(tmp_path: Path) -> None:
    def proposed(sampler: Any) -> list[Mapping[str, float]]:
        settings = Search(num_trials=10, sampler=sampler)
        return [t.knobs for t in run(Evaluator(), tmp_path / f"{sampler}.db", settings=settings).trials[8:]]

    chance = proposed("random")
    assert all(proposed(sampler) != chance for sampler in ("tpe", "gp", "nsga2"))


def test_early_stopping_saves_samples_and_keeps_the_winner(tmp_path: Path) -> None:
    saved = []
    for seed in range(2):
        settings = Search(num_trials=10, sampler="random")  # proposes the same, whatever it is told
        hasty, patient = Evaluator(steepness=0.02), Evaluator(steepness=0.02, is_patient=True)
        stopped = run(hasty, tmp_path / f"hasty{seed}.db", seed=seed, settings=settings)
        whole = run(patient, tmp_path / f"patient{seed}.db", seed=seed, settings=settings)
        assert stopped.best == whole.best
        assert not stopped.trials[stopped.best].is_stopped
        assert stopped.trials[stopped.best].num_val_samples == NUM_VAL
        for trial in stopped.trials:
            assert trial.is_stopped is (trial.num_val_samples < NUM_VAL)
            assert trial.feasible or trial.num_val_samples == interim_sample_counts(NUM_VAL)[0]
        assert any(t.is_stopped and t.feasible for t in stopped.trials)
        saved.append(1 - hasty.num_samples / patient.num_samples)
    assert min(saved) > 0.4


def test_with_two_objectives_only_dominated_trials_are_stopped(tmp_path: Path) -> None:
    """What is less accurate and cheaper stays: the front of the patient study is that of the hasty one."""
    settings = Search(num_trials=14, sampler="random", objectives=("accuracy", "latency"))
    hasty = run(Evaluator(steepness=0.02), tmp_path / "hasty.db", settings=settings)
    patient = run(Evaluator(steepness=0.02, is_patient=True), tmp_path / "patient.db", settings=settings)
    evaluated = [replace(t, is_stopped=False) for t in patient.trials]
    assert hasty.pareto_front == pareto_front(evaluated, settings.objectives)
    assert any(t.is_stopped and t.feasible for t in hasty.trials)
    assert len(hasty.pareto_front) > 2


def test_seed_decides_what_is_tried(tmp_path: Path) -> None:
    seeds = (1, -1, 2**40)
    results = [run(Evaluator(), tmp_path / f"{seed}.db", seed=seed) for seed in seeds]
    assert len({str([t.knobs for t in result.trials]) for result in results}) == len(seeds)


def test_same_plan_is_not_evaluated_twice(tmp_path: Path) -> None:
    evaluate = Evaluator()
    result = search(
        lambda knobs, _: propose({**knobs, "fill": round(knobs["fill"]), "control": 1.0}),
        evaluate,
        DENSE,
        HALF,
        (0.2, 0.8),
        SETTINGS,
        storage=Storage.own(tmp_path / "study.db"),
        origin=ORIGIN,
    )
    assert len(result.trials) == 10
    assert len({t.plan.edits for t in result.trials}) == len(evaluate.seen) == 2
    assert len({tuple(t.knobs.items()) for t in result.trials}) > 6


def test_the_error_names_the_nearest_miss(tmp_path: Path) -> None:
    limits = {"latency_p50": Limit(value=0.4, is_relative=False), "file_size": Limit(value=10.0, is_relative=False)}
    with pytest.raises(BudgetError) as caught:
        run(Evaluator(), tmp_path / "study.db", limits)
    assert "none of 10 candidates" in str(caught.value)
    assert "+100.0% over latency_p50" in str(caught.value)
    assert "budget.latency_p50" in str(caught.value)


def test_violations_are_relative_and_unmeasured_memory_is_left_to_the_gate() -> None:
    limits = {
        "latency_p50": Limit(value=0.5, is_relative=True),
        "macs": Limit(value=2000.0, is_relative=False),
        "peak_memory": Limit(value=1.0, is_relative=True),
    }
    assert violations(DENSE, DENSE, limits) == {"latency_p50": 1.0, "macs": -0.5}


def test_unmeasured_memory_as_objective_is_refused_before_the_first_trial(tmp_path: Path) -> None:
    evaluate = Evaluator()
    with pytest.raises(ConfigError, match=r"search\.objectives: 'peak_memory' cannot be measured"):
        run(evaluate, tmp_path / "study.db", settings=Search(objectives=("accuracy", "peak_memory")))
    assert evaluate.seen == []


# --- the front and the importances ------------------------------------------------------------------------------------

points = st.tuples(
    st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans()
)  # few values, so that many are equal


@given(st.lists(points, max_size=12), st.sampled_from([("accuracy",), ("accuracy", "latency", "peak_memory")]))
def test_the_pareto_front_equals_its_definition(
    drawn: list[tuple[int, int, int, bool, bool]], objectives: tuple[ObjectiveName, ...]
) -> None:
    trials = []
    for number, (accuracy, latency, memory, is_feasible, is_stopped) in enumerate(drawn):
        candidate = replace(DENSE, accuracy=accuracy, latency_p50_ms=float(latency), peak_memory_mib=float(memory))
        trials.append(trial(number, candidate, is_feasible, is_stopped))
    sound = [t for t in trials if t.feasible and not t.is_stopped]
    expected: dict[tuple[float, ...], int] = {}
    for t in sound:
        own = figures(t, objectives)
        if not any(
            all(x >= y for x, y in zip(figures(o, objectives), own, strict=True)) and figures(o, objectives) != own
            for o in sound
        ):
            expected.setdefault(own, t.number)
    assert pareto_front(trials, objectives) == tuple(sorted(expected.values()))


def figures(t: Trial, objectives: tuple[ObjectiveName, ...]) -> tuple[float, ...]:
    c = t.candidate
    assert c.latency_p50_ms is not None and c.peak_memory_mib is not None
    return (c.accuracy, -c.latency_p50_ms, *([-c.peak_memory_mib] if "peak_memory" in objectives else []))


def trial(
    number: int, candidate: Candidate, is_feasible: bool = True, is_stopped: bool = False, **knobs: float
) -> Trial:
    return Trial(
        number=number,
        knobs=knobs,
        candidate=candidate,
        violations={},
        feasible=is_feasible,
        plan=PruningPlan(model_fingerprint="f", cuts=(), edits=(), blocks=()),
        is_stopped=is_stopped,
    )


def test_importances_name_the_knob_that_decides() -> None:
    random, trials = np.random.default_rng(0), []
    for number in range(60):
        exponent, weight = random.uniform(0.4, 1.0), random.uniform(0.1, 4.0)
        turned = {
            "fill": 0.5,
            "exponent": exponent,
            "block_weight": weight,
            "late": 0.0,
            "by_importance": 0.0,
            "magnitude": 0.0,
            "control": float(number % 2),
        }
        accuracy = 0.9 - abs(exponent - 0.7) + 0.001 * weight
        trials.append(trial(number, replace(DENSE, accuracy=accuracy), **turned))
    space = knobs((0.5, 0.5))
    shares = importances(trials, space)
    assert set(shares) == {
        "exponent",
        "block_weight",
        "late",
        "by_importance",
        "magnitude",
        "control",
    }  # what cannot be turned has no share
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["exponent"] > 0.5
    assert importances(trials, space) == shares
    assert importances(trials[:19], space) == {}


# --- what can go wrong with the file ----------------------------------------------------------------------------------


def test_a_study_of_another_origin_is_refused_naming_the_difference(undisturbed: tuple[Path, SearchResult]) -> None:
    path, evaluate = undisturbed[0], Evaluator()
    for name in ("model", "data", "device"):
        other = {**ORIGIN, name: "another", "device": "another"}
        with pytest.raises(RunFolderError, match=f"made with another '{name}' .*; delete the file to start"):
            run(evaluate, path, origin=other)
    with pytest.raises(RunFolderError, match="another 'search'"):
        run(evaluate, path, settings=Search(num_trials=8, sampler="random"))
    assert evaluate.seen == []


@contextmanager
def pragma(statement: str) -> Iterator[None]:
    """Each of SQLite's connections, when a transaction begins."""

    def inject(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA {statement}")

    sqlalchemy.event.listen(sqlalchemy.Engine, "begin", inject)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "begin", inject)


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("max_page_count = 1", "database or disk is full.*free space"),
        ("query_only = 1", "readonly.*make it writable"),
    ],
)
def test_a_full_disk_ends_the_search_and_the_next_one_continues(
    statement: str, seen: str, undisturbed: tuple[Path, SearchResult], tmp_path: Path
) -> None:
    whole, storage = undisturbed[1], tmp_path / "study.db"
    stop = {}

    def fill(call: int) -> None:
        if call == 3:
            stop["it"] = pragma(statement)
            stop["it"].__enter__()

    with pytest.raises(RunFolderError, match=rf"study\.db: .*{seen}"):
        try:
            run(Evaluator(before=fill), storage)
        finally:
            stop["it"].__exit__(None, None, None)
    rest = Evaluator()
    assert run(rest, storage) == whole
    assert 0 < len(rest.seen) <= len({t.plan.edits for t in whole.trials}) - 3  # a page that was begun takes more


def test_a_file_that_cannot_grow_is_named(undisturbed: tuple[Path, SearchResult], tmp_path: Path) -> None:
    storage, (soft, hard) = tmp_path / "study.db", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(call: int) -> None:
        if call == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (storage.stat().st_size, hard))

    with pytest.raises(RunFolderError, match=r"cannot be read or written .*check its disk"):
        try:
            run(Evaluator(before=limit), storage)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run(Evaluator(), storage) == undisturbed[1]


def test_a_study_that_cannot_be_created_or_is_not_a_database(tmp_path: Path) -> None:
    with pragma("max_page_count = 1"), pytest.raises(RunFolderError, match="free space"):
        run(Evaluator(), tmp_path / "study.db")
    assert len(run(Evaluator(), tmp_path / "study.db").trials) == 10
    (tmp_path / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RunFolderError, match=r"not a database.*check its disk.*delete the file"):
        run(Evaluator(), tmp_path / "study.db")


def test_a_connection_lost_inside_a_transaction_is_retried() -> None:
    """So it is when the database restarts between two statements. An error in the data is not: it would come again."""
    storage = Storage(url="postgresql:///nowhere", study="any", patience_s=60.0)
    lost = StorageInternalError()
    lost.__cause__ = PendingRollbackError()
    outcomes: list[Exception | int] = [lost, PendingRollbackError(), 7]

    def call() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert storage.retry_while_away(call) == 7
    outcomes = [IntegrityError("", None, ValueError()), 7]
    with pytest.raises(IntegrityError):
        storage.retry_while_away(call)


def test_the_clock_may_jump(undisturbed: tuple[Path, SearchResult], tmp_path: Path) -> None:
    whole = undisturbed[1]
    with pytest.raises(KeyboardInterrupt):
        run(Evaluator(kill_at=4), tmp_path / "killed.db")
    with sqlite3.connect(tmp_path / "killed.db") as file:
        file.execute("UPDATE trials SET datetime_start = '2199-01-01 00:00:00' WHERE number % 2")
        file.execute("UPDATE trials SET datetime_complete = '1971-01-01 00:00:00' WHERE state = 'COMPLETE'")
    file.close()
    assert run(Evaluator(), tmp_path / "killed.db") == whole


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_trials": 0}, "num_trials must be >= 1, got 0; write a whole number from 1"),
        ({"num_trials": 2.5}, "num_trials must be a whole number, got 2.5"),
        ({"num_repair_samples": True}, "num_repair_samples must be a whole number, got True"),
        ({"sampler": "grid"}, "sampler = 'grid' does not exist; write one of tpe, gp"),
        ({"objectives": ("latency",)}, r"objectives = \('latency',\) does not exist; write \('accuracy',\)"),
        ({"objectives": "accuracy"}, "objectives = 'accuracy' does not exist"),
        ({"objectives": ()}, r"objectives = \(\) does not exist"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Search(**settings)
