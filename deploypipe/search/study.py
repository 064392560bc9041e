"""The search: propose, evaluate and store one trial after another, in one process or many."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from deploypipe.errors import BudgetError
from deploypipe.files.hashing import digest
from deploypipe.recipe import Search
from deploypipe.records import Candidate, Note, Notify, Progress, PruningPlan, SearchResult, Trial, TrialEnded, silent
from deploypipe.scheduling.exclusive_measurement import sleep_without_blocking, yield_to_measurements
from deploypipe.search.allocation.limits import Range, violations
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import Claim, Done, TrialQueue, open_trial_queue
from deploypipe.search.evaluation.run_trial import (
    Evaluate,
    History,
    Propose,
    evaluate_plan,
    most_accurate,
    network_key,
)
from deploypipe.search.pareto import costs, pareto_front
from deploypipe.search.sampling import Seen, Space, importances, knobs, next_knobs, warm_starts
from deploypipe.target import Limit

_POLL_S, _MAX_POLL_S = 0.5, 5.0  # while a trial waits for those of other workers


def search(
    propose: Propose,
    evaluate: Evaluate,
    dense: Candidate,
    limits: Mapping[str, Limit],
    fill: Range,
    settings: Search,
    *,
    storage: Storage,
    origin: Mapping[str, object],
    magnitude: Range = (0.0, 1.0),
    seed: int = 0,
    notify: Notify = silent,
) -> SearchResult:
    """Run, continue or help with the study in `storage`. Return all its trials and the best feasible one.

    A trial depends only on the seed and on the trials that are at least `settings.num_parallel` numbers before it. So a
    killed study continues as if never interrupted, and many workers end with the same trials as one. After
    `settings.max_minutes`, the study ends with the trials that had begun by then.

    Raises BudgetError, which names the nearest miss, if no trial meets every limit; RunFolderError or StorageError if
    the storage cannot be used, or holds the study of another `origin` (model, data, device).
    """
    costs(dense, settings.objectives)  # refuses an objective that cannot be measured before the first trial
    space, warm = knobs(fill, magnitude), warm_starts(fill)
    excess_of = partial(violations, dense=dense, limits=limits)
    about = {name: _described(value) for name, value in {**origin, "search": rules(settings), "seed": seed}.items()}

    def choose_knobs(number: int, seen: Seen) -> tuple[dict[str, Any], dict[str, Any]]:
        return next_knobs(number, seen, space, warm, settings, seed)

    def run_trial(queue: TrialQueue, claim: Claim) -> None:
        history = _history(queue.done(), claim.number - settings.num_parallel)
        chosen = {"control": 0.0, **claim.knobs}
        plan = propose(chosen, history.trials)
        twin = _find_twin(queue, claim, plan)
        if twin is not None:  # other knobs, the same network: nothing to measure
            trial, results = replace(twin, number=claim.number, knobs=chosen), None
        else:
            number, objectives = claim.number, settings.objectives
            trial, results = evaluate_plan(number, chosen, plan, evaluate, excess_of, objectives, history)
        trial = replace(trial, evaluated_by=queue.worker)
        # A stopped trial reports its estimate. As a "pruned" one, only TPE would use it, with one objective only.
        queue.finish(claim, trial, results, [trial.candidate.accuracy, *costs(trial.candidate, settings.objectives)])

    with open_trial_queue(storage, space, settings.objectives, about) as queue:
        reported: set[int] = set()
        wait_s = _POLL_S
        while True:
            end = queue.last_of(settings.num_trials, settings.max_minutes)
            done = {number: known for number, known in queue.done().items() if number < end}
            for number in _unreported_(done, reported):
                reported.add(number)
                message = _summary(done[number][0])
                notify(Progress(stage="search", done=len(reported), total=end, message=message))
                notify(TrialEnded(stage="search", trial=done[number][0]))
            if len(done) == end:
                break
            yield_to_measurements()
            claim = queue.claim(end, settings.num_parallel, choose_knobs)
            if claim is None:
                sleep_without_blocking(wait_s)
                wait_s = min(1.5 * wait_s, _MAX_POLL_S)
                continue
            wait_s = _POLL_S
            with suppress(_LowerTrialIsFreeError), queue.at_work(claim):
                run_trial(queue, claim)
    _tell_time(end, settings, notify)
    return _conclude([trial for trial, _ in done.values()], dense, settings, space)


def _unreported_(done: Done, reported: set[int]) -> list[int]:
    """The finished trials to report now. Those that an earlier run did are reported together, by the last of them."""
    fresh = sorted(done.keys() - reported)
    if not reported:
        reported.update(fresh[:-1])
        return fresh[-1:]
    return fresh


def _tell_time(num_trials: int, settings: Search, notify: Notify) -> None:
    """Report it if the search ran out of time before its last trial."""
    if num_trials < settings.num_trials:
        done = f"{num_trials} of {settings.num_trials} trials in {settings.max_minutes:g} minutes (search.max_minutes)"
        notify(Note(stage="search", text=f"the time is up: {done}"))


def rules(settings: Search) -> Search:
    """The settings that a trial depends on, without the number and time of trials and the treatment of the best."""
    return replace(settings, num_trials=1, max_minutes=None, num_finalists=1, finalist_epochs=1, num_attempts=1)


class _LowerTrialIsFreeError(Exception):
    """A trial with a lower number is free again, and goes first."""


def _history(done: Done, last: int) -> History:
    """The finished trials up to number `last`, which a new trial depends on."""
    before = {number: known for number, known in done.items() if number <= last}
    return History(
        trials=[trial for trial, _ in before.values()],
        results={number: results for number, (_, results) in before.items() if results is not None},
    )


def _find_twin(queue: TrialQueue, claim: Claim, plan: PruningPlan) -> Trial | None:
    """The trial with a lower number that makes the same network; waits for it if another worker evaluates it."""
    own = network_key(plan)
    queue.note_plan(claim, own)
    while True:
        below = queue.plans_below(claim.number)
        same = [number for number, (known, _) in below.items() if known == own]
        if same and below[min(same)][1]:
            return queue.done()[min(same)][0]
        if not same and len(below) == claim.number and None not in {known for known, _ in below.values()}:
            return None
        if len(below) < claim.number:
            raise _LowerTrialIsFreeError
        sleep_without_blocking(_POLL_S)


def _described(value: object) -> str:
    return str(value) if isinstance(value, str | int) else digest(value)


def _conclude(
    trials: Sequence[Trial],
    dense: Candidate,
    settings: Search,
    space: Space,
) -> SearchResult:
    if not any(t.feasible for t in trials):
        nearest = min(trials, key=lambda t: max(t.violations.values(), default=0.0))
        name = max(nearest.violations, key=lambda n: nearest.violations[n])
        raise BudgetError(
            f"none of {len(trials)} candidates meets the budget; the nearest (trial {nearest.number}) is "
            f"{nearest.violations[name]:+.1%} over {name} at {nearest.candidate.accuracy:.2%} accuracy on val; "
            f"relax budget.{name} in the target, or raise search."
            + ("max_minutes" if len(trials) < settings.num_trials else "num_trials")
        )
    return SearchResult(
        dense=dense,
        trials=tuple(trials),
        best=most_accurate([t for t in trials if t.feasible and not t.is_stopped]).number,
        pareto_front=pareto_front(trials, settings.objectives),
        importances=importances(trials, space),
    )


def _summary(trial: Trial) -> str:
    c = trial.candidate
    fits = "fits" if trial.feasible else "over budget"
    fits += f", stopped after {trial.num_val_samples:,} samples" if trial.is_stopped else ""
    cost = f"{c.num_macs:,} MACs" if c.latency_p50_ms is None else f"{c.latency_p50_ms:.3f} ms"
    by = f" ({trial.evaluated_by})" if trial.evaluated_by else ""
    return f"trial {trial.number}: {c.accuracy:.2%} on val, {cost}, {fits}{by}"
