"""`compress`: the stages in order. Each is remembered in the run folder and can be called alone."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from deploypipe.benchmark.latency import brief_timing
from deploypipe.budgets import LATENCY_P50
from deploypipe.checked_splits import wrap_splits
from deploypipe.errors import ConfigError, DeploypipeError, StorageError
from deploypipe.export.tensorrt_engine.build_engine import place_engine
from deploypipe.files.atomic import place_file
from deploypipe.files.hashing import digest, file_sha256
from deploypipe.files.json_records import to_plain
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.preflight import check_inputs
from deploypipe.pruning.modules.hook_computed_weights import describe_hooks
from deploypipe.pruning.surgery.saved_network import WEIGHTS
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BenchmarkReport,
    EngineFile,
    FileEntry,
    GateDecision,
    Golden,
    Measurement,
    Note,
    Notify,
    Planned,
    PrecisionChoice,
    PruneOutcome,
    RunEnded,
    ScoreSummary,
    SearchResult,
    Status,
    TrainLog,
    Warned,
    reported,
    silent,
)
from deploypipe.runs.result import RunResult, save_result, start_afresh
from deploypipe.runs.run_about import RunAbout, write_about
from deploypipe.runs.store import StageResult, open_run
from deploypipe.search.allocation.limits import search_limits, tightened_limit_fraction
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import require_same
from deploypipe.search.search_inputs import SearchGoal, SearchInputs
from deploypipe.stages import compression, deploy, fast_dev_run, profile, search
from deploypipe.stages.context import RunContext, prepare_run
from deploypipe.stages.deploy import MODEL, Shipped
from deploypipe.stages.expected_stages import SEARCH, expected_delivery, expected_stages
from deploypipe.stages.ship_trial import ChosenTrial, choose_trial, describe, link_stages
from deploypipe.target import Target
from deploypipe.task import Splits, Task
from deploypipe.text.safe_names import name_problem
from deploypipe.tracking import require_packages, tracked
from deploypipe.tracking.tracked_run import TrackedRun, flat_parameters
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.user_code_errors import wrap_forward_errors, wrap_task
from deploypipe.verification.golden_json import GOLDEN, TENSORS

ENGINE, REPORT = "model.engine", "report.html"


@wrap_forward_errors()
def compress(
    model: nn.Module,
    splits: Splits,
    task: Task,
    recipe: Recipe,
    target: Target,
    out: Path | str,
    *,
    source: str = "",
    name: str = "model",
    shared: Path | str | None = None,
    storage: Storage | None = None,
    notify: Notify = silent,
    ranks: Ranks = ALONE,
    remeasure: bool = False,
    command: str = "",
    ship_trial: int | None = None,
    tensorboard: Path | str | None = None,
) -> RunResult:
    """Compress a trained network for one device, and decide whether the result may be shipped.

    The same call resumes an interrupted run in the folder `out`. The model is left as it is. Raises DeploypipeError
    for all that a user can get wrong, BudgetError if no candidate meets the target's budget.

    If the dense model is within the budget, in fp32 or in the precision that pays on the target, nothing is removed:
    `search` is None, and the gate decides on the dense model. If this machine is not the device
    (`runtimes.ability_for_target.can`), nothing is measured: sizes are chosen by MACs, the files are exported, an
    engine is built if it can be, and the gate decides HOLD.

    A finished run leaves `model.onnx` (and `model.engine` for TensorRT), the samples that `deploypipe verify` replays,
    `report.html` and, written last, `result.json` in `out`.

    source: the text of the code that made model and data; if it changes, everything is computed again.
    shared: a folder for the stages that do not depend on the target; runs for several targets compute them once.
    storage: a database for the search's trials. Other processes may do some of them (`help_search`); the result is the
        same.
    ranks: on the first of several (`training.ranks.join`), fine-tuning is shared with the others, which are in
        `training.multi_rank_finetune.serve` meanwhile.
    recipe.fast_dev_run: try every stage on the first batches; the result can never ship.
    remeasure: repeat the last measurements. Without it, only those taken on an unsteady machine are repeated.
    command: what the result says to run again.
    ship_trial: ship this trial of the finished search in `out` instead of its winner. Nothing is searched; the run is
        in a folder of its own, `out-trial-N`, and reuses what the other one computed.
    tensorboard: a folder for TensorBoard event files, written while the run goes on. If MLFLOW_TRACKING_URI is set, the
        run is tracked there too (`deploypipe.tracking`).
    """
    tensorboard = Path(tensorboard) if tensorboard is not None else None
    require_packages(tensorboard)
    model, out = unwrapped(model), Path(out)
    if problem := name_problem(name):
        raise ConfigError("compress", "name", *problem.split("; "))
    splits, task, notes = wrap_splits(splits), wrap_task(task), list[str]()
    chosen = None if ship_trial is None else choose_trial(out, ship_trial)
    out = chosen.folder if chosen else out
    if recipe.fast_dev_run:
        fast_dev_run.require_own_place(out, is_shared=storage is not None)
        notes.append(fast_dev_run.NOTE)
        splits, recipe = fast_dev_run.first_batches(splits), fast_dev_run.short_recipe(recipe)
        target = fast_dev_run.short_target(target)
    with reported(notify, "check"):
        check_inputs(model, splits, task, recipe, target, notes)
    for note in notes:
        notify(Note(stage="check", text=note))
    place = storage.place if storage else None
    with open_run(out, notify, Path(shared) if shared else None, place=place) as run:
        run.remeasure = remeasure
        target_name = target.name or target.runtime
        write_about(out, RunAbout(pipeline=name, target=target_name, is_fast_dev_run=recipe.fast_dev_run))
        if chosen:
            link_stages(chosen, out)
        if computed := describe_hooks(model):
            run.notify(Note(stage="check", text=f"weights that hooks compute are plain from here on: {computed}"))
        start_afresh(run.path, (MODEL, GOLDEN, TENSORS, ENGINE, f"{ENGINE}.json", f"{ENGINE}.log", REPORT, WEIGHTS))
        model = with_slim_attention(model)
        ctx = prepare_run(model, splits, task, recipe, target, run, source=source, storage=storage, ranks=ranks)
        if storage:
            require_same(storage, ctx.identity())  # now, and not when the search begins
        with (
            tracked(run.notify, _as_tracked(ctx, name, chosen), tensorboard) as run.notify,
            brief_timing() if recipe.fast_dev_run else nullcontext(),
        ):
            return _run_stages(ctx, name, command, chosen)


def _as_tracked(ctx: RunContext, name: str, chosen: ChosenTrial | None) -> TrackedRun:
    settings = {"recipe": to_plain(ctx.recipe), "target": to_plain(ctx.target), "pipeline": name}
    if ctx.origin["source"]:  # the pipeline's code and its changed constants, which make another network or other data
        settings["source"] = digest(ctx.origin["source"])
    title = f"{name}-{ctx.target.name or ctx.target.runtime}"
    if chosen:
        title += f"-trial-{chosen.trial.number}"
    elif ctx.recipe.fast_dev_run:
        title += "-fast-dev-run"
    return TrackedRun(name=title, parameters=dict(flat_parameters(settings)), folder=ctx.run.path)


def _run_stages(ctx: RunContext, name: str, command: str, chosen: ChosenTrial | None) -> RunResult:
    """The line of stages, from the dense network to what ships. chosen: instead of a search."""
    limits, stand_in = search_limits(ctx.target.budget.limits(), ctx.ability)
    expected = expected_stages(ctx, limits)
    ctx.run.notify(Planned(stages=tuple(name for name in expected if not (chosen and name in SEARCH))))
    structures = profile.structures(ctx).record  # first: names in the recipe are looked up here
    dense = profile.baseline(ctx, profile.dense_export(ctx))
    choice = deploy.dense_precision(ctx, dense)
    row = deploy.candidate_precision(dense.record, choice)
    smaller: _Smaller | None = None
    summary: ScoreSummary | None = None
    if chosen:
        ctx.run.notify(Note(stage="search", text=describe(chosen)))
        smaller, summary = _make_network(ctx, dense, chosen.search, stand_in), chosen.scores
        delivery = smaller.delivery
    elif search.is_needed(ctx, dense, limits, row):
        inputs, summary = _observe(ctx, search.goal(ctx, structures, dense, limits, row))
        trials = search.search(ctx, inputs)
        smaller = _make_smaller(ctx, inputs, trials, stand_in)
        delivery = smaller.delivery
    else:
        ctx.run.notify(Planned(stages=("benchmark", "gate", "golden")))
        shipped = deploy.shipped(dense.record.file, dense.files, choice)
        delivery = _deliver(ctx, dense, shipped, (dense.record.num_params, dense.record.num_macs), stand_in, choice)
    golden = deploy.golden(ctx, delivery.shipped)
    result = RunResult(
        pipeline=name,
        metric=ctx.task.name,
        recipe=ctx.recipe,
        target=ctx.target,
        structures=structures,
        scores=summary,
        search=smaller.search if smaller else None,
        prune=smaller.outcome.prune if smaller else None,
        repair=smaller.outcome.repair if smaller else None,
        training=smaller.training if smaller else None,
        precision=delivery.precision,
        benchmark=delivery.benchmark,
        decision=delivery.decision,
        stages=tuple(ctx.run.times),
        engine=delivery.engine.record if delivery.engine else None,
        golden=golden.record,
        origin=ctx.described_origin(),
        too_slow=smaller.too_slow if smaller else (),
        command=command,
        weights=_entry_of(smaller.weights) if smaller else None,
        folder=str(ctx.run.path),
    )
    if smaller:
        place_file(smaller.weights, ctx.run.path / WEIGHTS)
    _leave_files(ctx, result, golden, delivery.engine)
    ctx.run.notify(RunEnded(stage="gate", report=result.benchmark, decision=result.decision))
    return result


def _entry_of(file: Path) -> FileEntry:
    return FileEntry(name=file.name, sha256=file_sha256(file), size_bytes=file.stat().st_size)


def _observe(ctx: RunContext, goal: SearchGoal) -> tuple[SearchInputs, ScoreSummary]:
    """The stages between the baseline and the search. A budget that cannot be reached ends the run before the network
    is observed."""
    latency = search.timed_networks(ctx, goal)
    feasibility = search.feasibility(ctx, goal, latency)
    observed = profile.observe(ctx, goal.structures)
    scores = profile.score(ctx, goal.structures, observed)
    curves = profile.loss_curves(ctx, goal.structures, scores, observed)
    inputs = SearchInputs(
        goal=goal, latency=latency, feasibility=feasibility.record, scores=scores.record, curves=curves
    )
    return inputs, profile.score_summary(goal.structures, scores.record, observed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Delivery:
    """A network as it would ship, measured and decided on."""

    shipped: Shipped
    precision: PrecisionChoice | None
    engine: StageResult[EngineFile] | None
    benchmark: BenchmarkReport
    decision: GateDecision


@dataclass(frozen=True, kw_only=True, slots=True)
class _Smaller:
    """The compressed network, and how it was made."""

    delivery: _Delivery
    weights: Path  # of the trained network in PyTorch
    search: SearchResult
    outcome: PruneOutcome
    training: TrainLog
    too_slow: tuple[str, ...]  # what the gate said of those made before it


def _make_smaller(ctx: RunContext, inputs: SearchInputs, trials: StageResult[SearchResult], stand_in: str) -> _Smaller:
    """Make the network that the search found. While the benchmark finds it too slow, make a faster one instead.

    Latency drifts by a few percent from one minute to the next, so a network that met its limit in the search may
    exceed it in the benchmark. `search.num_attempts` bounds the attempts.
    """
    goal, part, too_slow = inputs.goal, 1.0, list[str]()
    num_attempts = ctx.recipe.search.num_attempts
    for number in range(1, num_attempts + 1):
        found = search.tune_finalists(ctx, search.confirm(ctx, inputs, trials, part))
        made = _make_network(ctx, goal.dense, found, stand_in)
        failed = [c for c in made.delivery.decision.checks if c.name == LATENCY_P50 and c.status is Status.FAIL]
        if number == num_attempts or not failed or not found.timed_again:
            break
        part = tightened_limit_fraction(goal.limits, found, failed[0])
        problem = f"trial {found.best}: {failed[0].reason}"
        too_slow.append(problem)
        again = f"a faster network is made, {number + 1} of {num_attempts}"
        ctx.run.notify(Note(stage="gate", text=f"{problem}; {again}"))
        ctx.run.notify(Planned(stages=(*expected_delivery(ctx, goal.limits), "golden")))
    return replace(made, too_slow=tuple(too_slow))


def _make_network(ctx: RunContext, dense: StageResult[Measurement], found: SearchResult, stand_in: str) -> _Smaller:
    """Make the best network of a search: cut, repair, train and export it, then measure it and decide."""
    plan = found.trials[found.best].plan
    pruned = compression.prune(ctx, plan)
    tuned = compression.finetune(ctx, plan, pruned)
    exported = compression.export(ctx, plan, tuned)
    choice = deploy.precision(ctx, exported)
    shipped = deploy.shipped(exported.record, exported.files, choice)
    counts = (pruned.record.prune.params_after, pruned.record.prune.macs_after)
    return _Smaller(
        delivery=_deliver(ctx, dense, shipped, counts, stand_in, choice),
        weights=tuned.files / WEIGHTS,
        search=found,
        outcome=pruned.record,
        training=tuned.record,
        too_slow=(),
    )


def _deliver(
    ctx: RunContext,
    dense: StageResult[Measurement],
    shipped: Shipped,
    counts: tuple[int, int],
    stand_in: str,
    choice: StageResult[PrecisionChoice] | None,
) -> _Delivery:
    """Build the engine, measure, and decide. counts: parameters and multiply-accumulates of what ships."""
    engine = deploy.engine(ctx, dense, shipped)
    report = deploy.benchmark(ctx, dense, shipped, engine, counts, stand_in).record
    return _Delivery(
        shipped=shipped,
        precision=choice.record if choice else None,
        engine=engine,
        benchmark=report,
        decision=deploy.gate(ctx, report, shipped),
    )


def _leave_files(
    ctx: RunContext, result: RunResult, golden: StageResult[Golden], engine: StageResult[EngineFile] | None
) -> None:
    """Put the end products into the run folder, `result.json` last."""
    folder = ctx.run.path
    for entry in golden.record.files:
        place_file(golden.files / entry.name, folder / entry.name)
    if engine:
        place_engine(engine.files / engine.record.path, folder, ENGINE)
    try:
        from deploypipe.report.html import write_report

        write_report(result, folder / REPORT)
    except DeploypipeError as error:
        ctx.run.notify(Warned(stage="report", text=f"no report: {error}"))
    save_result(folder, result)


@wrap_forward_errors()
def help_search(
    model: nn.Module,
    splits: Splits,
    task: Task,
    recipe: Recipe,
    target: Target,
    storage: Storage,
    *,
    source: str = "",
    notify: Notify = silent,
) -> SearchResult:
    """Do trials of the search that `compress` began elsewhere with the same arguments and storage, until all are done.

    Results of the stages before the search are fetched from `storage.stages`. Raises StorageError naming the first
    difference in this process: a version of a package, the network, the data, the code, the device.
    """
    model = unwrapped(model)
    splits, task = wrap_splits(splits), wrap_task(task)
    check_inputs(model, splits, task, recipe, target)
    with (
        TemporaryDirectory(prefix="deploypipe-worker-") as folder,
        open_run(Path(folder), notify, source=storage.stages, place=storage.place) as run,
    ):
        model = with_slim_attention(model)
        ctx = prepare_run(model, splits, task, recipe, target, run, source=source, storage=storage)
        require_same(storage, ctx.identity())
        structures = profile.structures(ctx).record
        dense = profile.baseline(ctx, profile.dense_export(ctx))
        limits, _ = search_limits(ctx.target.budget.limits(), ctx.ability)
        row = deploy.candidate_precision(dense.record, deploy.dense_precision(ctx, dense))
        if not search.is_needed(ctx, dense, limits, row):
            raise StorageError(f"{storage.shown}: {storage.study}: the dense network is within the budget here")
        inputs, _ = _observe(ctx, search.goal(ctx, structures, dense, limits, row))
        return search.help_search(ctx, inputs, storage)
