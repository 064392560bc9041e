"""From scores to the plan that wins."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from deploypipe.budgets import LATENCY_P50, PEAK_MEMORY
from deploypipe.files.hashing import digest
from deploypipe.memory_order import find_order
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.recipe import Magnitude
from deploypipe.records import (
    Curves,
    EpochEnded,
    Event,
    Feasibility,
    Measurement,
    Note,
    PrecisionRow,
    Progress,
    PruningPlan,
    ScoreTable,
    SearchResult,
    Structures,
    TimedNetworks,
    TrainLog,
    Trial,
    as_part_of,
    silent,
)
from deploypipe.runs.store import StageResult
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search import study
from deploypipe.search.allocation.feasibility import feasibility_text, find_feasibility, require_feasible
from deploypipe.search.allocation.limits import (
    bounded_shares,
    candidate_of,
    converted,
    fill_range,
    is_over_budget,
    memory_limit_mib,
    share_to_confirm,
    violations,
    with_margin,
)
from deploypipe.search.allocation.loss_curves import unmeasured_curves
from deploypipe.search.allocation.proposer import Proposer
from deploypipe.search.allocation.solver import Allocation, allowed_widths
from deploypipe.search.cost_models.width_dependencies import find_layer_widths
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.duration import duration_text, predict_seconds
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.early_stopping import draw_parts
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.search.evaluation.latency_store import LocalLatencyStore, SharedLatencyStore
from deploypipe.search.evaluation.run_trial import History, evaluate_plan
from deploypipe.search.evaluation.time_networks import time_networks
from deploypipe.search.evaluation.winner import confirm_finalists, with_finalists, with_tuned
from deploypipe.search.search_inputs import SearchGoal, SearchInputs
from deploypipe.stages import compression, profile
from deploypipe.stages.context import RunContext
from deploypipe.stages.expected_stages import is_timed
from deploypipe.target import Limit

_VAL_SHARE = 0.25  # of the memory that a run may hold; the rest of val is in a file


def is_needed(
    ctx: RunContext, dense: StageResult[Measurement], limits: Mapping[str, Limit], precision: PrecisionRow
) -> bool:
    """Whether the dense network is over budget, in fp32 and in the precision that would ship."""
    tight = with_margin(limits)
    reference = candidate_of(dense.record, profile.dense_opened(ctx, dense), accuracy=0.0)  # no limit is about accuracy
    networks = (reference, converted(reference, precision))
    return all(is_over_budget(network, reference, tight) for network in networks)


def goal(
    ctx: RunContext,
    structures: Structures,
    dense: StageResult[Measurement],
    limits: Mapping[str, Limit],
    precision: PrecisionRow,
) -> SearchGoal:
    """The network to cut candidates from, their reference and their limits. precision: that of the candidates."""
    opened = profile.dense_opened(ctx, dense)
    candidates = CandidateFiles(
        dense=ctx.model,
        dense_onnx=dense.files / profile.DENSE,
        dense_opened=dense.files / opened.path,
        template=dense.files / profile.TEMPLATE,
        precision=precision,
        calib=ctx.calib,
        timed_on=[*ctx.timed_on(ctx.calib)],
        target=ctx.target,
        builds_engines=ctx.builds,
        export=ctx.recipe.export,
        latency_store=SharedLatencyStore(ctx.storage, digest(ctx.device)) if ctx.storage else LocalLatencyStore(),
    )
    reference = candidate_of(dense.record, opened, profile.dense_accuracy(ctx, dense))
    return SearchGoal(structures=structures, dense=dense, reference=reference, limits=limits, candidates=candidates)


def timed_networks(ctx: RunContext, goal: SearchGoal) -> StageResult[TimedNetworks] | None:
    """Time networks on the target, for a latency model to learn from.

    None where nothing asks for latency, or it cannot be measured here. Which units go does not change the time of a
    network, so the plans need no scores of the observed network.
    """
    if not is_timed(ctx, goal.limits):
        return None
    levels = allowed_widths(goal.structures, _choices(ctx, goal.structures))
    magnitudes = score_magnitudes(ctx.model, goal.structures)

    def plan_for(chosen: Allocation) -> PruningPlan:
        return make_plan(goal.structures, magnitudes, chosen.widths, chosen.blocks, ctx.target.channel_multiple)

    def compute(work: Path) -> TimedNetworks:
        return time_networks(
            goal.candidates,
            goal.structures,
            levels,
            plan_for,
            work,
            count=ctx.recipe.search.num_timed,
            seed=ctx.recipe.seed,
            notify=ctx.run.notify,
        )

    inputs = {
        "baseline": goal.dense.key,
        "structures": goal.structures,
        "levels": levels,
        "precision": goal.candidates.precision.file,
        "count": ctx.recipe.search.num_timed,
        "device": ctx.device,
    }
    return ctx.run.remember("latency", inputs, compute, TimedNetworks)


def feasibility(
    ctx: RunContext, goal: SearchGoal, latency: StageResult[TimedNetworks] | None
) -> StageResult[Feasibility]:
    """Find the lowest reachable value of every budget; BudgetError if a budget is below it.

    Only costs count here: the plans go by the weights' magnitudes, and all choices lose the same.
    """
    choices = _choices(ctx, goal.structures)

    def compute(work: Path) -> Feasibility:
        proposer = _proposer(ctx, goal, latency, score_magnitudes(ctx.model, goal.structures), choices, work)
        found, shares = find_feasibility(proposer, proposer.shares), dict(proposer.shares)
        dense = goal.reference.peak_memory_mib
        limit = memory_limit_mib(with_margin(goal.limits), goal.reference, ())
        if dense and limit:  # what predicts it learns from the search's candidates: here it is measured
            smallest = [proposer.plan(proposer.cheapest(name)) for name in ("params", "macs")]
            if least := goal.candidates.least_peak_memory_mib(smallest, work):
                shares[PEAK_MEMORY] = limit / dense
                require_feasible(PEAK_MEMORY, least / dense, shares[PEAK_MEMORY])
                found = replace(found, least={**found.least, PEAK_MEMORY: least / dense})
        _note(ctx, feasibility_text(found, shares), stage="feasibility")
        return found

    inputs = {
        "baseline": goal.dense.key,
        "structures": goal.structures,
        "choices": choices,
        "latency": latency.key if latency else "",
        "precision": goal.candidates.precision.file,
        "budget": ctx.target.budget,
    }
    return ctx.run.remember("feasibility", inputs, compute, Feasibility)


def _choices(ctx: RunContext, structures: Structures) -> Curves:
    """Loss curves of all allowed widths and blocks, with losses of zero."""
    return unmeasured_curves(structures, ctx.recipe.search, ctx.target.channel_multiple)


def search(ctx: RunContext, inputs: SearchInputs) -> StageResult[SearchResult]:
    """Run the trials and pick the best; with a shared storage, as one of the processes at work on them."""
    depends_on = _depends_on(ctx, inputs)

    def compute(work: Path) -> SearchResult:
        proposer, evaluator = _search_proposer(ctx, inputs, work), _evaluator(ctx, inputs.goal, work)
        typical, settings = proposer.plain(), ctx.recipe.search
        seconds = predict_seconds(evaluator, typical, settings.num_trials)
        _note(ctx, duration_text(seconds, settings.num_trials, settings.max_minutes))
        if ctx.storage:
            _invite_workers(ctx, ctx.storage)
        found = _run_trials(ctx, inputs, proposer, evaluator, ctx.storage or _own_storage(ctx, depends_on))
        return replace(
            found,
            feasibility=inputs.feasibility,
            latency_fit=proposer.latency_fit(found.trials),
            curve_points=inputs.curves.record.points,
        )

    return ctx.run.remember("search", depends_on, compute, SearchResult)


def confirm(
    ctx: RunContext, inputs: SearchInputs, searched: StageResult[SearchResult], part: float = 1.0
) -> SearchResult:
    """Time the best trials again. Finalists are those within `part` of the latency limit."""
    found, goal, wanted = searched.record, inputs.goal, ctx.recipe.search.num_finalists
    if not inputs.latency or LATENCY_P50 not in goal.limits:
        return with_finalists(found, wanted)

    def compute(work: Path) -> SearchResult:
        proposer, evaluator = _search_proposer(ctx, inputs, work), _evaluator(ctx, goal, work)

        def narrow(trial: Trial, number: int, share: float) -> Trial:
            shares = {**proposer.shares, LATENCY_P50: share / trial.knobs["fill"]}
            plan = replace(proposer, shares=shares)(trial.knobs, found.trials)
            excess_of = partial(violations, dense=goal.reference, limits=with_margin(goal.limits))
            history = History(trials=[], results={})
            objectives = ctx.recipe.search.objectives
            return evaluate_plan(number, trial.knobs, plan, evaluator, excess_of, objectives, history)[0]

        limit = part * share_to_confirm(goal.limits, found.dense)
        return confirm_finalists(found, limit, lambda plan: goal.candidates.time_again(plan, work), narrow, wanted)

    return ctx.run.remember("confirm", {"search": searched.key, "part": part}, compute, SearchResult).record


def help_search(ctx: RunContext, inputs: SearchInputs, storage: Storage) -> SearchResult:
    """Do trials of the search that another process began, until all of them are done."""
    with TemporaryDirectory(dir=ctx.run.path) as folder:
        work = Path(folder)
        proposer, evaluator = _search_proposer(ctx, inputs, work), _evaluator(ctx, inputs.goal, work)
        return _run_trials(ctx, inputs, proposer, evaluator, storage)


def tune_finalists(ctx: RunContext, found: SearchResult) -> SearchResult:
    """Train the finalists briefly; the most accurate one wins."""
    if len(found.finalists) < 2 or ctx.recipe.finetune.num_epochs == 0:
        return found
    return with_tuned(found, {str(number): _tune_finalist(ctx, found, number) for number in found.finalists})


def _tune_finalist(ctx: RunContext, found: SearchResult, number: int) -> float:
    """Train a trial's network for a few epochs; return its accuracy on val."""
    plan = found.trials[number].plan
    short = replace(ctx.recipe.finetune, num_epochs=ctx.recipe.search.finalist_epochs)
    finalist = as_part_of("finalist", ctx.run.notify)
    message = f"trial {number}, {found.finalists.index(number) + 1} of {len(found.finalists)}"

    def compute(work: Path) -> TrainLog:
        repaired, _ = compression.repair_network(ctx, plan, apply_plan(ctx.model, plan), silent)
        checkpoint = work / "checkpoints"
        checkpoint.mkdir(exist_ok=True)

        def notify(event: Event) -> None:
            if isinstance(event, Progress):
                event = replace(event, message=message)
            elif isinstance(event, EpochEnded):
                event = replace(event, trial=number)
            finalist(event)

        _, log = compression.tune(ctx, plan, repaired, short, checkpoint, notify)
        shutil.rmtree(checkpoint)
        return log

    inputs = {**ctx.origin, **compression.repair_inputs(ctx), "plan": plan, "finetune": short}
    inputs |= compression.own_training(ctx.task)
    log = ctx.run.remember("finalist", inputs, compute, TrainLog, is_shared=True).record
    return log.epochs[log.chosen_epoch].val_accuracy


def _depends_on(ctx: RunContext, inputs: SearchInputs) -> dict[str, object]:
    return {
        "curves": inputs.curves.key,
        "baseline": inputs.goal.dense.key,
        "latency": inputs.latency.key if inputs.latency else "",
        "precision": inputs.goal.candidates.precision.file,
        "budget": ctx.target.budget,
        "search": ctx.recipe.search,
        **compression.repair_inputs(ctx),
        "device": ctx.device,
    }


def _search_proposer(ctx: RunContext, inputs: SearchInputs, work: Path) -> Proposer:
    return _proposer(ctx, inputs.goal, inputs.latency, inputs.scores, inputs.curves.record, work)


def _proposer(
    ctx: RunContext,
    goal: SearchGoal,
    latency: StageResult[TimedNetworks] | None,
    scores: ScoreTable,
    curves: Curves,
    work: Path,
) -> Proposer:
    precision, tight = goal.candidates.precision, with_margin(goal.limits)
    shipped = precision.file or goal.dense.record.file
    return Proposer(
        dense=ctx.model,
        inputs=ctx.inputs,
        structures=goal.structures,
        scores=scores,
        magnitudes=score_magnitudes(ctx.model, goal.structures),
        curves=curves,
        channel_multiple=ctx.target.channel_multiple,
        shares=bounded_shares(tight, goal.reference, shipped.size_bytes / 2**20, is_timed=latency is not None),
        reference=goal.reference,
        layers=find_layer_widths(ctx.model, goal.structures, ctx.inputs),
        timed=latency.record.rows if latency else (),
        dense_ratio=precision.latency_ratio.value if precision.latency_ratio else 1.0,
        measure=lambda plan: goal.candidates.ratio_of(plan, work),
    )


def _evaluator(ctx: RunContext, goal: SearchGoal, work: Path) -> Evaluator:
    tight, objectives = with_margin(goal.limits), ctx.recipe.search.objectives
    return Evaluator(
        candidates=goal.candidates,
        dense_p50_ms=goal.reference.latency_p50_ms,
        calib=ctx.calib,
        parts=draw_parts(
            ctx.splits.val,
            ctx.recipe.seed,
            find_order(ctx.model, ctx.inputs),
            most_bytes=ctx.memory.allowed_bytes * _VAL_SHARE,
            folder=ctx.run.path,
        ),
        task=ctx.task,
        recipe=ctx.recipe,
        needs_peak_memory=memory_limit_mib(tight, goal.reference, objectives) is not None,
        work=work,
        accuracies=known_accuracies(ctx),
        fit=ctx.memory.trial_repair,
        device=ctx.compute.device,
        notify=ctx.run.notify,
    )


def known_accuracies(ctx: RunContext) -> AccuracyCache:
    """The accuracies of repaired networks, measured in this search or in one for another target or budget."""
    num_samples = ctx.recipe.search.num_repair_samples
    key = digest([ctx.origin, compression.repair_inputs(ctx), num_samples])
    return AccuracyCache((ctx.run.shared or ctx.run.path) / f"accuracies-{key}")


def _run_trials(
    ctx: RunContext, inputs: SearchInputs, proposer: Proposer, evaluator: Evaluator, storage: Storage
) -> SearchResult:
    settings, tight = ctx.recipe.search, with_margin(inputs.goal.limits)
    depends_on = {name: value for name, value in _depends_on(ctx, inputs).items() if name != "device"}
    return study.search(
        proposer,
        evaluator,
        inputs.goal.reference,
        tight,
        fill_range(proposer.shares, tight, settings.objectives),
        settings,
        magnitude=(0.0, 0.0) if isinstance(ctx.recipe.score, Magnitude) else (0.0, 1.0),
        storage=storage,
        origin={**ctx.identity(), **depends_on},
        seed=ctx.recipe.seed,
        notify=ctx.run.notify,
    )


def _own_storage(ctx: RunContext, depends_on: Mapping[str, object]) -> Storage:
    """The study's file, next to the stages: a search for more trials continues with those in it."""
    key = digest([ctx.identity(), {**depends_on, "search": study.rules(ctx.recipe.search)}])
    return Storage.own(ctx.run.path / f"study-{key}.db")


def _invite_workers(ctx: RunContext, storage: Storage) -> None:
    ctx.run.publish(storage.stages)
    at_once = ctx.recipe.search.num_parallel
    _note(
        ctx,
        f"{at_once} {'workers find' if at_once > 1 else 'worker finds'} work at a time (search.num_parallel); to "
        f"start one: deploypipe worker --storage {storage.shown} --run {storage.study}",
    )


def _note(ctx: RunContext, text: str, stage: str = "search") -> None:
    ctx.run.notify(Note(stage=stage, text=text))
