"""The study: Optuna tunes the few knobs that shape an allocation; every trial is judged repaired and measured.

The only importer of optuna.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from deploypipe.errors import BudgetError
from deploypipe.jsonio import from_json, to_json
from deploypipe.recipe import Search
from deploypipe.records import Candidate, Event, Progress, PruningPlan, SearchResult, Trial, silent
from deploypipe.target import Limit


class Evaluate(Protocol):
    """Judge one plan: surgery, repair, accuracy on val, the exported file on the target's runtime."""

    def __call__(self, plan: PruningPlan) -> Candidate: ...


Propose = Callable[[Mapping[str, float]], PruningPlan]

_RECORD = "record"
_LOCK_TIMEOUT_S = 60


def knobs(macs_bounds: tuple[float, float]) -> dict[str, BaseDistribution]:
    """What the study may turn. `macs_kept` is fixed where only MACs or parameters are bounded."""
    low, high = macs_bounds
    return {
        "macs_kept": FloatDistribution(low, high),
        "exponent": FloatDistribution(0.4, 1.0),
        "block_weight": FloatDistribution(0.1, 4.0, log=True),
        "measured": CategoricalDistribution((1.0, 0.0)),  # 0: uniform widths, the control
    }


def search(
    propose: Propose,
    evaluate: Evaluate,
    dense: Candidate,
    limits: Mapping[str, Limit],
    macs_bounds: tuple[float, float],
    settings: Search,
    *,
    storage: Path,
    seed: int = 0,
    notify: Progress = silent,
) -> SearchResult:
    """Run (or go on with) the study in `storage`, an SQLite file, and return all its trials and the best feasible one.

    A trial's knobs depend on the seed and on the trials finished before it, on nothing else: a study that was killed
    goes on as if it had not been. Raises BudgetError naming the nearest miss when no trial meets every limit.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=_open_storage(storage), study_name="search", direction="maximize", load_if_exists=True
    )
    _end_unfinished(study)
    space = knobs(macs_bounds)
    warm = _warm_starts(macs_bounds)
    finished = _records(study)
    while len(finished) < settings.num_trials:
        number = len(finished)
        study.sampler = optuna.samplers.TPESampler(seed=seed * 10_007 + number, n_startup_trials=len(warm))
        if number < len(warm):
            study.enqueue_trial(warm[number])
        asked = study.ask(space)
        chosen = {name: float(value) for name, value in asked.params.items()}
        trial = _judge(number, chosen, propose, evaluate, dense, limits, finished)
        for name, excess in trial.violations.items():
            asked.set_constraint(name, excess)
        asked.set_user_attr(_RECORD, to_json(trial))
        study.tell(asked, trial.candidate.accuracy)
        finished.append(trial)
        notify(Event(stage="search", done=len(finished), total=settings.num_trials, message=_summary(trial)))
    return _conclude(finished, dense)


def violations(candidate: Candidate, dense: Candidate, limits: Mapping[str, Limit]) -> dict[str, float]:
    """Relative excess over each limit a search can judge; zero or less meets it."""
    figures = {
        "latency_p50": (candidate.latency_p50_ms, dense.latency_p50_ms),
        "peak_memory": (candidate.peak_memory_mib, dense.peak_memory_mib),
        "file_size": (candidate.file_size_mib, dense.file_size_mib),
        "params": (float(candidate.num_params), float(dense.num_params)),
        "macs": (float(candidate.num_macs), float(dense.num_macs)),
    }
    excess = {}
    for name, limit in limits.items():
        measured, reference = figures[name]
        if measured is not None and reference is not None:  # what cannot be measured here, the gate says
            excess[name] = measured / limit.absolute(reference) - 1
    return excess


def _judge(
    number: int,
    chosen: dict[str, float],
    propose: Propose,
    evaluate: Evaluate,
    dense: Candidate,
    limits: Mapping[str, Limit],
    finished: list[Trial],
) -> Trial:
    plan = propose(chosen)
    known = next((t for t in finished if t.plan.edits == plan.edits and t.plan.blocks == plan.blocks), None)
    if known is not None:  # other knobs, the same network: nothing new to measure
        return replace(known, number=number, knobs=chosen)
    candidate = evaluate(plan)
    excess = violations(candidate, dense, limits)
    is_feasible = all(value <= 0 for value in excess.values())
    return Trial(number=number, knobs=chosen, candidate=candidate, violations=excess, feasible=is_feasible, plan=plan)


def _warm_starts(bounds: tuple[float, float]) -> list[dict[str, Any]]:
    """The solver's plain solution at several sizes, one that prefers dropping blocks, and uniform widths as control."""
    low, high = bounds

    def start(share: float, exponent: float = 1.0, block_weight: float = 1.0, measured: float = 1.0) -> dict[str, Any]:
        kept = low + share * (high - low)
        return {"macs_kept": kept, "exponent": exponent, "block_weight": block_weight, "measured": measured}

    if high - low < 1e-6:
        return [start(0.0), start(0.0, exponent=0.5), start(0.0, measured=0.0)]
    sizes = [start(0.9), start(0.6), start(0.3, exponent=0.5), start(0.0, exponent=0.5)]
    return [*sizes, start(0.5, block_weight=0.25), start(0.5, measured=0.0)]


def _open_storage(path: Path) -> optuna.storages.RDBStorage:
    """The study's file, made under another name first: whoever finds it finds all its tables."""
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        optuna.storages.RDBStorage(f"sqlite:///{part}").engine.dispose()
        part.replace(path)
    # A process killed a moment ago may still hold the lock while the kernel takes it down.
    waiting = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}}
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=waiting)


def _end_unfinished(study: optuna.Study) -> None:
    """Trials that a killed process left open are closed; the sampler does not look at failed ones."""
    for trial in study.get_trials(states=(TrialState.RUNNING,), deepcopy=False):
        study.tell(trial.number, state=TrialState.FAIL)
    while study.get_trials(states=(TrialState.WAITING,), deepcopy=False):
        study.tell(study.ask(), state=TrialState.FAIL)


def _records(study: optuna.Study) -> list[Trial]:
    complete: list[FrozenTrial] = study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)
    return [from_json(Trial, trial.user_attrs[_RECORD], "the study") for trial in complete]


def _conclude(trials: list[Trial], dense: Candidate) -> SearchResult:
    feasible = [t for t in trials if t.feasible]
    if not feasible:
        nearest = min(trials, key=lambda t: max(t.violations.values(), default=0.0))
        name = max(nearest.violations, key=lambda n: nearest.violations[n])
        raise BudgetError(
            f"none of {len(trials)} candidates meets the budget; the nearest (trial {nearest.number}) is "
            f"{nearest.violations[name]:+.1%} over {name} at {nearest.candidate.accuracy:.2%} accuracy on val: "
            f"relax budget.{name} in the target, or raise search.num_trials"
        )
    # Of equals on val the one that uses more of the budget: it has more left to lose on other data.
    best = max(feasible, key=lambda t: (t.candidate.accuracy, _cost(t.candidate), -t.number))
    return SearchResult(dense=dense, trials=tuple(trials), best=best.number)


def _cost(candidate: Candidate) -> float:
    """Milliseconds, or MACs where nothing could be timed: alike for all trials of a search."""
    return candidate.num_macs if candidate.latency_p50_ms is None else candidate.latency_p50_ms


def _summary(trial: Trial) -> str:
    c = trial.candidate
    fits = "fits" if trial.feasible else "over budget"
    cost = f"{c.num_macs:,} MACs" if c.latency_p50_ms is None else f"{c.latency_p50_ms:.3f} ms"
    return f"trial {trial.number}: {c.accuracy:.2%} on val, {cost}, {fits}"
