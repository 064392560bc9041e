"""The study: Optuna tunes the few knobs that shape an allocation; every trial is judged repaired and measured.

The only importer of optuna.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from deploypipe.errors import BudgetError, RunFolderError
from deploypipe.jsonio import from_json, to_json
from deploypipe.recipe import ObjectiveName, Search
from deploypipe.records import FEWEST_FOR_IMPORTANCES, Candidate, Event, Progress, SearchResult, Trial, silent
from deploypipe.runs import digest
from deploypipe.search.front import costs, pareto_front
from deploypipe.search.looks import pack, unpack
from deploypipe.search.trials import Evaluate, History, Propose, judge_plan, most_accurate, violations
from deploypipe.target import Limit

_WIDE = 0.2  # a range of sizes that wants more than one to begin with
_STUDY = "search"
_RECORD, _RESULTS, _ORIGIN = "record", "results", "origin"
_LOCK_TIMEOUT_S = 60
_POPULATION = 8  # of NSGA-II: a study has tens of trials, not thousands
_REMEDIES = (  # what SQLite says, and what to do
    ("is full", "make room on its disk, and run the same command again: it goes on after the last finished trial"),
    ("readonly", "make it writable, and run the same command again: it goes on after the last finished trial"),
    ("locked", "end the other process that uses it, and run the same command again"),
    ("", "check its disk and the room on it, and run the same command again; if that fails too, delete the file"),
)


def knobs(fill: tuple[float, float]) -> dict[str, BaseDistribution]:
    """What the study may turn. fill: which part of the budgets may be used; one value where that is known exactly."""
    return {
        "fill": FloatDistribution(*fill),
        "exponent": FloatDistribution(0.4, 1.0),
        "block_weight": FloatDistribution(0.1, 4.0, log=True),
        "late": FloatDistribution(-0.7, 0.7),
        "by_importance": CategoricalDistribution((0.0, 1.0)),  # 1: blocks in the order of CKA, not of the losses
        "measured": CategoricalDistribution((1.0, 0.0)),  # 0: uniform widths, the control
    }


def search(
    propose: Propose,
    evaluate: Evaluate,
    dense: Candidate,
    limits: Mapping[str, Limit],
    fill: tuple[float, float],
    settings: Search,
    *,
    storage: Path,
    origin: Mapping[str, object],
    seed: int = 0,
    notify: Progress = silent,
) -> SearchResult:
    """Run (or go on with) the study in `storage`, an SQLite file, and return all its trials and the best feasible one.

    A trial's knobs depend on the seed and on the trials finished before it, on nothing else: a study that was killed
    goes on as if it had not been. Raises BudgetError naming the nearest miss when no trial meets every limit, and
    RunFolderError where the file cannot be written, or holds the study of another `origin`: model, data, device.
    """
    costs(dense, settings.objectives)  # what cannot be measured is refused before the first trial
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    excess_of = partial(violations, dense=dense, limits=limits)
    space, warm = knobs(fill), _warm_starts(fill)
    with _storage_errors_told(storage):
        study = _open_study(storage, settings.objectives, {**origin, "search": settings, "seed": seed})
        _end_unfinished(study)
        history = _read_history(study)
        while len(history.trials) < settings.num_trials:
            number = len(history.trials)
            study.sampler = _sampler(settings, (seed * 10_007 + number) % 2**32, len(warm))
            if number < len(warm):
                study.enqueue_trial(warm[number])
            asked = study.ask(space)
            _ = asked.relative_params  # an enqueued trial, too, is to belong to one of NSGA-II's generations
            chosen = {name: float(value) for name, value in asked.params.items()}
            trial, results = judge_plan(chosen, propose, evaluate, excess_of, settings.objectives, history)
            for name, excess in trial.violations.items():
                asked.set_constraint(name, excess)
            asked.set_user_attr(_RECORD, to_json(trial))
            if results is not None:
                asked.set_user_attr(_RESULTS, pack(results))
            # A stopped trial is told its estimate: "pruned" ones only TPE would look at, and with one objective only.
            study.tell(asked, [trial.candidate.accuracy, *costs(trial.candidate, settings.objectives)])
            history.add(trial, results)
            notify(Event(stage="search", done=number + 1, total=settings.num_trials, message=_summary(trial)))
    return _conclude(history.trials, dense, settings.objectives, space)


def importances(trials: Sequence[Trial], space: Mapping[str, BaseDistribution]) -> dict[str, float]:
    """How much each knob decided whether a trial within the budget was among its most accurate quarter; sum 1.

    PED-ANOVA (arXiv:2304.10255). Empty for fewer than 20 trials within the budget.
    """
    turned = {name: distribution for name, distribution in space.items() if not distribution.single()}
    feasible = [t for t in trials if t.feasible]
    if len(feasible) < FEWEST_FOR_IMPORTANCES:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial in feasible:
        params = {name: trial.knobs[name] for name in turned}
        told = optuna.trial.create_trial(params=params, distributions=turned, value=trial.candidate.accuracy)
        study.add_trial(told)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return {str(k): float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()}


def _warm_starts(fill: tuple[float, float]) -> list[dict[str, Any]]:
    """The solver's plain solution, one in which small losses count more, the same with blocks in the order of CKA, one
    that prefers dropping blocks, and uniform widths as control; of a wide range of sizes, the first at several."""
    low, high = fill
    is_wide = high - low > _WIDE
    most = 0.9 if is_wide else 0.6

    plain = {"exponent": 1.0, "block_weight": 1.0, "late": 0.0, "by_importance": 0.0, "measured": 1.0}

    def start(share: float, **other: float) -> dict[str, Any]:
        return {"fill": low + share * (high - low), **plain, **other}

    full = [
        start(most),
        start(most, exponent=0.5),
        start(most, exponent=0.5, by_importance=1.0),
        start(most, block_weight=0.25),
        start(most, measured=0.0),
    ]
    return [*full, start(0.6), start(0.3, exponent=0.5), start(0.0, exponent=0.5)] if is_wide else full


class _Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents stand in the order in which a search that goes on reads them from its file."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


def _sampler(settings: Search, seed: int, num_warm: int) -> optuna.samplers.BaseSampler:
    """A new one for every trial: what a sampler remembers would be lost with the process."""
    match settings.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_warm)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=num_warm, warn_independent_sampling=False)
        case "nsga2":
            return _Nsga2(seed=seed, population_size=_POPULATION)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)


def _open_study(path: Path, objectives: Sequence[ObjectiveName], origin: Mapping[str, object]) -> optuna.Study:
    """The study in the file, which is made under another name first: whoever finds it finds it whole."""
    fingerprint = {name: digest(value) for name, value in origin.items()}
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{part}")
        directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (len(objectives) - 1)]
        made = optuna.create_study(storage=storage, study_name=_STUDY, directions=directions)
        made.set_user_attr(_ORIGIN, json.dumps(fingerprint))
        storage.engine.dispose()
        part.replace(path)
    # A process killed a moment ago may still hold the lock while the kernel takes it down.
    waiting = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}}
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=waiting)
    try:
        study = optuna.load_study(storage=storage, study_name=_STUDY)
    except KeyError:
        raise RunFolderError(f"{path}: holds no study of a search; delete it to start the search afresh") from None
    _check_origin(path, json.loads(study.user_attrs.get(_ORIGIN, "{}")), fingerprint)
    return study


def _check_origin(path: Path, stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    for name, value in own.items():
        if stored.get(name) != value:
            raise RunFolderError(
                f"{path}: this study was made with another {name!r} (fingerprint {stored.get(name, 'absent')}, here "
                f"{value}); delete the file to start the search afresh, or give the run a folder of its own with --out"
            )


@contextmanager
def _storage_errors_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        reason = str(getattr(cause, "orig", None) or cause)
        remedy = next(remedy for text, remedy in _REMEDIES if text in reason)
        raise RunFolderError(f"{path}: the study cannot be read or written ({reason}); {remedy}") from error


def _end_unfinished(study: optuna.Study) -> None:
    """Trials that a killed process left open are closed; the sampler does not look at failed ones."""
    for trial in study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
        study.tell(trial.number, state=TrialState.FAIL)
    while study.get_trials(states=(TrialState.WAITING,), deepcopy=False):
        study.tell(study.ask(), state=TrialState.FAIL)


def _read_history(study: optuna.Study) -> History:
    history = History(trials=[], results={})
    for finished in study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False):
        trial = from_json(Trial, finished.user_attrs[_RECORD], "the study")
        packed = finished.user_attrs.get(_RESULTS)
        history.add(trial, unpack(packed) if packed else None)
    return history


def _conclude(
    trials: Sequence[Trial],
    dense: Candidate,
    objectives: Sequence[ObjectiveName],
    space: Mapping[str, BaseDistribution],
) -> SearchResult:
    if not any(t.feasible for t in trials):
        nearest = min(trials, key=lambda t: max(t.violations.values(), default=0.0))
        name = max(nearest.violations, key=lambda n: nearest.violations[n])
        raise BudgetError(
            f"none of {len(trials)} candidates meets the budget; the nearest (trial {nearest.number}) is "
            f"{nearest.violations[name]:+.1%} over {name} at {nearest.candidate.accuracy:.2%} accuracy on val: "
            f"relax budget.{name} in the target, or raise search.num_trials"
        )
    return SearchResult(
        dense=dense,
        trials=tuple(trials),
        best=most_accurate([t for t in trials if t.feasible and not t.is_stopped]).number,
        front=pareto_front(trials, objectives),
        importances=importances(trials, space),
    )


def _summary(trial: Trial) -> str:
    c = trial.candidate
    fits = "fits" if trial.feasible else "over budget"
    fits += f", stopped after {trial.num_val_samples:,} samples" if trial.is_stopped else ""
    told = f"{c.num_macs:,} MACs" if c.latency_p50_ms is None else f"{c.latency_p50_ms:.3f} ms"
    return f"trial {trial.number}: {c.accuracy:.2%} on val, {told}, {fits}"
