"""Who does which trial: the study in its storage, from which a worker takes the next trial and to which it tells it.

A worker takes the lowest number that nobody has, under a lease; Optuna's heartbeats say that it is at it, and the trial
of one that is gone is free again. The storage's own numbers count attempts, of which one per trial is completed.
"""

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
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
_MAX_DEATHS = 10  # of workers at one trial, before it is taken for the cause


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A trial that this process is to do."""

    number: int
    knobs: dict[str, float]
    attempt: optuna.Trial


@dataclass(slots=True)
class TrialQueue:
    """An open study."""

    storage: Storage
    database: RDBStorage
    study: optuna.Study
    space: Space
    leases: Leases
    _read: dict[int, tuple[Trial, Results | None]] = field(default_factory=dict)  # by attempt

    def done(self) -> Done:
        """The finished trials."""
        return {number: self._parse(attempt) for number, attempt in self._completed().items()}

    def claim(self, num_trials: int, num_parallel: int, next_knobs: NextKnobs) -> Claim | None:
        """The lowest trial that nobody does or did; None where it has to wait for others, or none is left.

        next_knobs: of a number and the finished trials that it may look at, which are all that are `num_parallel` or
        more before it. StorageError where trial after trial of this number ended its worker.
        """
        self._patiently(self._end_stale)
        if self._patiently(partial(self._next_number, num_trials, num_parallel)) is None:
            return None  # the lease is for those that find work
        is_shared = self.storage.is_shared
        with self.leases.held(f"queue of {self.storage.study}") if is_shared else nullcontext():
            return self._patiently(partial(self._claim, num_trials, num_parallel, next_knobs))

    @contextmanager
    def at_work(self, claim: Claim) -> Iterator[None]:
        """For as long as the block lasts, others see that somebody is at the trial; if it breaks off, it is free."""
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
        """Let somebody take the trial anew."""
        self._patiently(partial(self._end, claim.attempt.number, is_given_back=True))

    def note_plan(self, claim: Claim, plan: str) -> None:
        """Let others know what network the trial is about."""
        self._patiently(partial(self._note_plan, claim, plan))

    def plans_below(self, number: int) -> dict[int, tuple[str | None, bool]]:
        """Of the trials with a lower number that somebody does or did: the plan, once it is known, and whether it is
        done."""
        self._patiently(self._end_stale)
        found: dict[int, tuple[str | None, bool]] = {}
        for attempt in self._patiently(partial(self._attempts, TrialState.RUNNING, TrialState.COMPLETE)):
            own, is_done = attempt.user_attrs.get(_NUMBER, number), attempt.state is TrialState.COMPLETE
            if own < number and (is_done or own not in found):
                found[own] = (attempt.user_attrs.get(_PLAN), is_done)
        return found

    @property
    def worker(self) -> str:
        """This process, where there may be others."""
        return " ".join(this_process().split(":")[:2]) if self.storage.is_shared else ""

    def finish(self, claim: Claim, trial: Trial, results: Results | None, values: Sequence[float]) -> bool:
        """Tell the trial; False where others took it over, as that of a worker that stood still."""
        return self._patiently(partial(self._finish, claim, trial, results, values))

    def end_all(self) -> None:
        """No trial is anybody's: what a killed process left open is closed."""
        self._end_orphans()
        for attempt in self._attempts(TrialState.RUNNING):
            self._end(attempt.number, is_given_back=False)

    def _claim(self, num_trials: int, num_parallel: int, next_knobs: NextKnobs) -> Claim | None:
        self._end_orphans()
        number = self._next_number(num_trials, num_parallel)
        if number is None:
            return None
        self._require_that_workers_survive(number)
        seen = [noted(attempt) for n, attempt in self._completed().items() if n <= number - num_parallel]
        params, notes = next_knobs(number, seen)
        attrs = {_NUMBER: number, _WORKER: this_process(), **notes}
        self.study.enqueue_trial(params, user_attrs=attrs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that only `optimize` beats: `at_work` does here
            attempt = self.study.ask({name: self.space[name] for name in params})
        self.database.record_heartbeat(self._id(attempt.number))
        attempt.set_user_attr(_CLAIMED, True)
        return Claim(number=number, knobs={name: float(value) for name, value in params.items()}, attempt=attempt)

    def _next_number(self, num_trials: int, num_parallel: int) -> int | None:
        """The lowest that nobody does or did, if all that it looks at is done."""
        taken = {a.user_attrs[_NUMBER]: a.state for a in self._attempts(TrialState.RUNNING) if _NUMBER in a.user_attrs}
        taken |= dict.fromkeys(self._completed(), TrialState.COMPLETE)
        number = next((n for n in range(num_trials) if n not in taken), None)
        if number is None or any(taken[n] is not TrialState.COMPLETE for n in range(number - num_parallel + 1)):
            return None
        return number

    def _finish(self, claim: Claim, trial: Trial, results: Results | None, values: Sequence[float]) -> bool:
        with suppress(UpdateFinishedTrialError):  # by others; or by us, and the answer was lost
            for name, excess in trial.violations.items():
                claim.attempt.set_constraint(name, excess)
            claim.attempt.set_user_attr(_RECORD, to_json(trial))
            if results is not None:
                claim.attempt.set_user_attr(_RESULTS, encode_results(results))
        told = self.study.tell(claim.attempt, list(values), skip_if_finished=True)
        return told.state is TrialState.COMPLETE

    def _note_plan(self, claim: Claim, plan: str) -> None:
        with suppress(UpdateFinishedTrialError):  # `finish` will say so
            claim.attempt.set_user_attr(_PLAN, plan)

    def _end(self, attempt: int, *, is_given_back: bool) -> None:
        with suppress(UpdateFinishedTrialError):
            if is_given_back:
                self.database.set_trial_user_attr(self._id(attempt), _GIVEN_BACK, True)
            self.study.tell(attempt, state=TrialState.FAIL, skip_if_finished=True)

    def _end_stale(self) -> None:
        """Trials whose workers are gone are free."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for attempt in self._attempts(TrialState.RUNNING):
            if is_gone(attempt.user_attrs.get(_WORKER, "")):
                self._end(attempt.number, is_given_back=False)

    def _end_orphans(self) -> None:
        """What a process left behind that ended while it was taking a trial, which only one does at a time."""
        while self._attempts(TrialState.WAITING):
            self._end(self.study.ask().number, is_given_back=True)
        for attempt in self._attempts(TrialState.RUNNING):
            if not attempt.user_attrs.get(_CLAIMED):
                self._end(attempt.number, is_given_back=True)

    def _require_that_workers_survive(self, number: int) -> None:
        failed = [a for a in self._attempts(TrialState.FAIL) if a.user_attrs.get(_NUMBER) == number]
        deaths = [a for a in failed if not a.user_attrs.get(_GIVEN_BACK)]
        if self.storage.is_shared and len(deaths) >= _MAX_DEATHS:
            who = ", ".join(sorted({a.user_attrs[_WORKER].split(":")[0] for a in deaths}))
            raise StorageError(
                f"trial {number} ended {len(deaths)} workers (on {who}): they ran out of memory or were killed; give "
                f"them more memory or lower search.num_repair_samples, and start the search under another name"
            )

    def _beat(self, claim: Claim, ended: threading.Event) -> None:
        while not ended.wait(self.storage.heartbeat_s):
            with suppress(Exception):  # while the database is away; then nobody can take the trial over either
                self.database.record_heartbeat(self._id(claim.attempt.number))

    def _completed(self) -> dict[int, FrozenTrial]:
        """By number, in its order; of two attempts, which one that stood still can leave, the first."""
        found: dict[int, FrozenTrial] = {}
        for attempt in self._patiently(partial(self._attempts, TrialState.COMPLETE)):
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

    def _patiently(self, call: Callable[[], T]) -> T:
        return self.storage.patiently(call)


@contextmanager
def open_board(
    storage: Storage,
    space: Space,
    objectives: Sequence[ObjectiveName],
    origin: Mapping[str, str],
) -> Iterator[TrialQueue]:
    """The study, made if there is none. origin: what it is about, as words or fingerprints by name; a study of anything
    else is refused by RunFolderError or StorageError. Raises those, too, for what the database refuses."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage.errors_told():
        database = storage.open()
        try:
            leases = Leases(database.engine, storage.patiently, storage.grace_s)
            with leases.held(f"study {storage.study}") if storage.is_shared else nullcontext():
                study = _found_or_made(storage, database, objectives, origin)
            _require_origin(storage, json.loads(study.user_attrs[_ORIGIN]), origin)
            board = TrialQueue(storage=storage, database=database, study=study, space=space, leases=leases)
            if not storage.is_shared:
                board.end_all()
            yield board
        finally:
            database.engine.dispose()


def read_job(storage: Storage) -> dict[str, Any] | None:
    """What a worker needs to know, as the process that opened the study first was told; None where nobody did yet."""
    known = _known(storage)
    return json.loads(known[_JOB]) if known and _JOB in known else None


def require_same(storage: Storage, own: Mapping[str, str]) -> None:
    """StorageError where the study was made with another of these, naming it."""
    known = _known(storage)
    if known:
        _require_origin(storage, json.loads(known[_ORIGIN]), own)


def _known(storage: Storage) -> dict[str, str] | None:
    with storage.errors_told():
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
    sampler = optuna.samplers.RandomSampler()  # is never asked: all knobs of a trial are fixed when it is put up
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
            told = f"{storage.shown}: this study was made with another {name!r} {seen}"
            if storage.is_shared:
                raise StorageError(f"{told}; use the same on every machine, or give the search another name")
            raise RunFolderError(
                f"{told}; delete the file to start the search afresh, or give the run a folder of its own with --out"
            )
