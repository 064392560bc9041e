"""The queue of trials, in the study's storage: a worker claims the next trial and reports its result.

A worker claims the lowest number that no worker has, under a lease. Optuna's heartbeats show that it works on it; the
trial of a worker that ended is free again. Optuna's own numbers count attempts: one attempt per trial is completed.
"""

import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from deploypipe.errors import RunFolderError, StorageError
from deploypipe.files.json_records import from_json, to_json
from deploypipe.recipe import ObjectiveName
from deploypipe.records import Trial
from deploypipe.search.distributed.leases import Leases, is_gone, this_process
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.sample_results import Results, decode_results, encode_results
from deploypipe.search.sampling import Space, directions, noted

T = TypeVar("T")

NextKnobs = Callable[[int, list[FrozenTrial]], tuple[dict[str, Any], dict[str, Any]]]
Done = dict[int, tuple[Trial, Results | None]]  # by number, in its order

_NUMBER, _WORKER, _CLAIMED, _PLAN, _RECORD, _RESULTS = "number", "worker", "claimed", "plan", "record", "results"
_GIVEN_BACK, _ORIGIN, _JOB = "given_back", "origin", "job"
_LAST_WITHIN = "number of trials within"
_MAX_DEATHS = 10  # of workers at one trial; beyond, the trial counts as the cause


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A trial that this process has claimed and must do."""

    number: int
    knobs: dict[str, float]
    attempt: optuna.Trial


@dataclass(slots=True)
class TrialQueue:
    """The trials of an open study."""

    storage: Storage
    database: RDBStorage
    study: optuna.Study
    space: Space
    leases: Leases
    _read: dict[int, tuple[Trial, Results | None]] = field(default_factory=dict)  # by attempt

    def done(self) -> Done:
        """The finished trials."""
        return {number: self._parse(attempt) for number, attempt in self._completed().items()}

    def last_of(self, num_trials: int, max_minutes: float | None) -> int:
        """The number of trials in all: `num_trials`, or those that had begun when `max_minutes` were spent on trials.

        Once the time is up, the number is stored: all workers, and a run that resumes, end with the same trials.
        """
        if max_minutes is None:
            return num_trials
        last = self._retry(partial(self._last_within, max_minutes, is_decided=True))
        if last is None and self._retry(self._seconds_spent) >= 60 * max_minutes:
            with self._alone():
                last = self._retry(partial(self._last_within, max_minutes, is_decided=False))
        return min(num_trials, last) if last else num_trials

    def claim(self, num_trials: int, num_parallel: int, next_knobs: NextKnobs) -> Claim | None:
        """Claim the lowest trial that no worker does or did; None if it must wait for others, or none is left.

        next_knobs: called with the number and the finished trials that it may depend on, which are all that are
        `num_parallel` numbers or more before it. StorageError if attempt after attempt at a trial ended its worker.
        """
        if self.storage.is_shared:
            self._retry(self._end_stale)
            if self._retry(partial(self._next_number, num_trials, num_parallel)) is None:
                return None  # no work, so no lease is needed
        with self._alone():
            return self._retry(partial(self._claim, num_trials, num_parallel, next_knobs))

    @contextmanager
    def at_work(self, claim: Claim) -> Iterator[None]:
        """Report heartbeats for the trial during the block. If the block raises, the trial is free again."""
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(claim, ended), daemon=True)
        beating.start()
        try:
            yield
        except BaseException:
            self.give_back(claim)
            raise
        finally:
            ended.set()
            beating.join()

    def give_back(self, claim: Claim) -> None:
        """Let any worker claim the trial again."""
        self._retry(partial(self._end, claim.attempt.number, is_given_back=True))

    def note_plan(self, claim: Claim, plan: str) -> None:
        """Record which network the trial is about, for other workers."""
        self._retry(partial(self._note_plan, claim, plan))

    def plans_below(self, number: int) -> dict[int, tuple[str | None, bool]]:
        """By number, the trials below `number` that a worker does or did: (plan, or None if unknown; whether done)."""
        if self.storage.is_shared:
            self._retry(self._end_stale)
        found: dict[int, tuple[str | None, bool]] = {}
        for attempt in self._retry(partial(self._attempts, TrialState.RUNNING, TrialState.COMPLETE)):
            own, is_done = attempt.user_attrs.get(_NUMBER, number), attempt.state is TrialState.COMPLETE
            if own < number and (is_done or own not in found):
                found[own] = (attempt.user_attrs.get(_PLAN), is_done)
        return found

    @property
    def worker(self) -> str:
        """This process's name; "" if there is only one."""
        return " ".join(this_process().split(":")[:2]) if self.storage.is_shared else ""

    def finish(self, claim: Claim, trial: Trial, results: Results | None, values: Sequence[float]) -> bool:
        """Report the trial. False if another worker took it over, for example because this one was paused."""
        return self._retry(partial(self._finish, claim, trial, results, values))

    def end_all(self) -> None:
        """Close every trial that a killed process left open; no other process may use the study."""
        self._end_orphans()
        for attempt in self._attempts(TrialState.RUNNING):
            self._end(attempt.number, is_given_back=False)

    def _alone(self) -> AbstractContextManager[object]:
        """Let one process at a time assign trials."""
        return self.leases.held(f"queue of {self.storage.study}") if self.storage.is_shared else nullcontext()

    def _last_within(self, max_minutes: float, *, is_decided: bool) -> int | None:
        """The stored number of trials for that limit. Unless it must be decided already, store those begun so far."""
        name = f"{_LAST_WITHIN} {max_minutes:g} minutes"
        last: int | None = self.study.user_attrs.get(name)
        if last is None and not is_decided:
            begun = {a.user_attrs[_NUMBER] for a in self._attempts(TrialState.RUNNING) if _NUMBER in a.user_attrs}
            last = 1 + max(begun | self._completed().keys())
            self.study.set_user_attr(name, last)
        return last

    def _seconds_spent(self) -> float:
        """The time in which at least one trial was at work, of those that were completed."""
        attempts = self._attempts(TrialState.COMPLETE)
        return covered_seconds(
            (a.datetime_start, a.datetime_complete) for a in attempts if a.datetime_start and a.datetime_complete
        )

    def _claim(self, num_trials: int, num_parallel: int, next_knobs: NextKnobs) -> Claim | None:
        self._end_orphans()
        number = self._next_number(num_trials, num_parallel)
        if number is None:
            return None
        self._require_that_workers_survive(number)
        seen = [noted(attempt) for n, attempt in self._completed().items() if n <= number - num_parallel]
        params, notes = next_knobs(number, seen)
        attempt = self._begin(params, {_NUMBER: number, _WORKER: this_process(), **notes})
        return Claim(number=number, knobs={name: float(value) for name, value in params.items()}, attempt=attempt)

    def _begin(self, params: dict[str, Any], attrs: dict[str, Any]) -> optuna.Trial:
        """Store the attempt with all of its knobs at once: `Study.ask` writes them one by one."""
        space = {name: self.space[name] for name in params}
        attempt = optuna.create_trial(state=TrialState.RUNNING, params=params, distributions=space, user_attrs=attrs)
        study_id = self.database.get_study_id_from_name(self.storage.study)
        trial_id = self.database.create_new_trial(study_id, template_trial=attempt)
        self.database.record_heartbeat(trial_id)
        self.database.set_trial_user_attr(trial_id, _CLAIMED, True)
        return optuna.Trial(self.study, trial_id)

    def _next_number(self, num_trials: int, num_parallel: int) -> int | None:
        """The lowest number that no worker does or did, if all trials that it depends on are done."""
        running = self._attempts(TrialState.RUNNING)
        taken = {a.user_attrs[_NUMBER]: a.state for a in running if a.user_attrs.get(_CLAIMED)}
        taken |= dict.fromkeys(self._completed(), TrialState.COMPLETE)
        number = next((n for n in range(num_trials) if n not in taken), None)
        if number is None or any(taken[n] is not TrialState.COMPLETE for n in range(number - num_parallel + 1)):
            return None
        return number

    def _finish(self, claim: Claim, trial: Trial, results: Results | None, values: Sequence[float]) -> bool:
        with suppress(UpdateFinishedTrialError):  # finished by others; or by us, and the answer was lost
            for name, excess in trial.violations.items():
                claim.attempt.set_constraint(name, excess)
            claim.attempt.set_user_attr(_RECORD, to_json(trial))
            if results is not None:
                claim.attempt.set_user_attr(_RESULTS, encode_results(results))
        reported = self.study.tell(claim.attempt, list(values), skip_if_finished=True)
        return reported.state is TrialState.COMPLETE

    def _note_plan(self, claim: Claim, plan: str) -> None:
        with suppress(UpdateFinishedTrialError):  # `finish` will report it
            claim.attempt.set_user_attr(_PLAN, plan)

    def _end(self, attempt: int, *, is_given_back: bool) -> None:
        with suppress(UpdateFinishedTrialError):
            if is_given_back:
                self.database.set_trial_user_attr(self._id(attempt), _GIVEN_BACK, True)
            self.study.tell(attempt, state=TrialState.FAIL, skip_if_finished=True)

    def _end_stale(self) -> None:
        """Free the trials whose workers have ended."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for attempt in self._attempts(TrialState.RUNNING):
            if is_gone(attempt.user_attrs.get(_WORKER, "")):
                self._end(attempt.number, is_given_back=False)

    def _end_orphans(self) -> None:
        """Close what a process left behind that ended while it claimed a trial. Only one process claims at a time."""
        for attempt in self._attempts(TrialState.RUNNING):
            if not attempt.user_attrs.get(_CLAIMED):
                self._end(attempt.number, is_given_back=True)

    def _require_that_workers_survive(self, number: int) -> None:
        failed = [a for a in self._attempts(TrialState.FAIL) if a.user_attrs.get(_NUMBER) == number]
        deaths = [a for a in failed if not a.user_attrs.get(_GIVEN_BACK)]
        if self.storage.is_shared and len(deaths) >= _MAX_DEATHS:
            hosts = ", ".join(sorted({a.user_attrs[_WORKER].split(":")[0] for a in deaths}))
            raise StorageError(
                f"trial {number} ended {len(deaths)} workers (on {hosts}): they ran out of memory or were killed; give "
                f"them more memory or lower search.num_repair_samples, and start the search under another name"
            )

    def _beat(self, claim: Claim, ended: threading.Event) -> None:
        while not ended.wait(self.storage.heartbeat_s):
            with suppress(Exception):  # the database cannot be reached, so no other worker can take the trial over
                self.database.record_heartbeat(self._id(claim.attempt.number))

    def _completed(self) -> dict[int, FrozenTrial]:
        """By number, ascending. A paused worker can leave two completed attempts at a trial: the first counts."""
        found: dict[int, FrozenTrial] = {}
        for attempt in self._retry(partial(self._attempts, TrialState.COMPLETE)):
            found.setdefault(attempt.user_attrs[_NUMBER], attempt)
        return dict(sorted(found.items()))

    def _attempts(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _parse(self, attempt: FrozenTrial) -> tuple[Trial, Results | None]:
        if attempt.number not in self._read:
            packed = attempt.user_attrs.get(_RESULTS)
            trial = from_json(Trial, attempt.user_attrs[_RECORD], "the study")
            self._read[attempt.number] = trial, decode_results(packed) if packed else None
        return self._read[attempt.number]

    def _id(self, attempt: int) -> int:
        study = self.database.get_study_id_from_name(self.storage.study)
        return self.database.get_trial_id_from_study_id_trial_number(study, attempt)

    def _retry(self, call: Callable[[], T]) -> T:
        return self.storage.retry_while_away(call)


def covered_seconds(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """The seconds that lie in at least one of the spans from one time to another."""
    total, until = 0.0, None
    for start, end in sorted(spans):
        since = start if until is None else max(start, until)
        total += max((end - since).total_seconds(), 0.0)
        until = end if until is None else max(end, until)
    return total


@contextmanager
def open_trial_queue(
    storage: Storage,
    space: Space,
    objectives: Sequence[ObjectiveName],
    origin: Mapping[str, str],
) -> Iterator[TrialQueue]:
    """Open the study, or create it.

    origin: what the study is about, as words or fingerprints by name. RunFolderError or StorageError if the study has
    another origin, or if the database refuses.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage.translated_errors():
        database = storage.open()
        try:
            leases = Leases(database.engine, storage.retry_while_away, storage.grace_s)
            with leases.held(f"study {storage.study}") if storage.is_shared else nullcontext():
                study = _found_or_made(storage, database, objectives, origin)
            _require_origin(storage, json.loads(study.user_attrs[_ORIGIN]), origin)
            queue = TrialQueue(storage=storage, database=database, study=study, space=space, leases=leases)
            if not storage.is_shared:
                queue.end_all()
            yield queue
        finally:
            database.engine.dispose()


def read_job(storage: Storage) -> dict[str, Any] | None:
    """Read what a worker needs to know, as the process that created the study stored it; None if there is no study."""
    known = _known(storage)
    return json.loads(known[_JOB]) if known and _JOB in known else None


def require_same(storage: Storage, own: Mapping[str, str]) -> None:
    """StorageError that names the first of `own` in which the study differs."""
    known = _known(storage)
    if known:
        _require_origin(storage, json.loads(known[_ORIGIN]), own)


def _known(storage: Storage) -> dict[str, str] | None:
    with storage.translated_errors():
        database = storage.open()
        try:
            study = optuna.load_study(storage=database, study_name=storage.study)
            return study.user_attrs if _ORIGIN in study.user_attrs else None
        except KeyError:
            return None
        finally:
            database.engine.dispose()


def _found_or_made(
    storage: Storage, database: RDBStorage, objectives: Sequence[ObjectiveName], origin: Mapping[str, str]
) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler()  # never used: all knobs of a trial are fixed when it is enqueued
    study = optuna.create_study(
        storage=database,
        study_name=storage.study,
        sampler=sampler,
        directions=directions(objectives),
        load_if_exists=True,
    )
    if storage.job:
        study.set_user_attr(_JOB, json.dumps(dict(storage.job)))
    if _ORIGIN not in study.user_attrs:
        study.set_user_attr(_ORIGIN, json.dumps(dict(origin)))
    return study


def _require_origin(storage: Storage, stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    for name, value in own.items():
        if stored.get(name) != value:
            seen = f"({stored.get(name, 'absent')}, here {value})"
            problem = f"{storage.shown}: this study was made with another {name!r} {seen}"
            if storage.is_shared:
                raise StorageError(f"{problem}; use the same on every machine, or give the search another name")
            raise RunFolderError(
                f"{problem}; delete the file to start the search again, or give the run a folder of its own with --out"
            )
