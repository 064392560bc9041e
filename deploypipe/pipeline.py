"""`compress`: the stages in order. Each is remembered in the run folder and can be called alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from deploypipe.errors import ConfigError, DeploypipeError, StorageError
from deploypipe.export.onnx_export.input_sizes import ends_of, extremes_of
from deploypipe.export.onnx_export.parity import limit_of
from deploypipe.export.tensorrt_engine.build_engine import place_engine
from deploypipe.files.atomic import place_file
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.moments import Moments, merge
from deploypipe.preflight import check_inputs
from deploypipe.pruning.surgery.hook_computed_weights import describe_hooks
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BenchmarkReport,
    Curves,
    EngineFile,
    Event,
    GateDecision,
    Measurement,
    PrecisionChoice,
    PrecisionRow,
    Progress,
    PruneOutcome,
    ScoreSummary,
    ScoreTable,
    SearchResult,
    Status,
    Structures,
    TrainLog,
    silent,
)
from deploypipe.release.gate import decide
from deploypipe.runs.result import RunResult, save_result, start_afresh
from deploypipe.runs.store import open_run
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.permutation_baseline import permutation_baseline_shares
from deploypipe.scoring.score_summary import summarise
from deploypipe.search.allocation.limits import (
    candidate_of,
    converted,
    is_over_budget,
    search_limits,
    tightened_limit_fraction,
    with_margin,
)
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import require_same
from deploypipe.search.search_inputs import Basis
from deploypipe.stages import compression, deploy, profile, search
from deploypipe.stages.context import Job
from deploypipe.stages.deploy import MODEL, Shipped
from deploypipe.target import Limit, Target
from deploypipe.task import Splits, Task, take, take_calib
from deploypipe.text.safe_names import name_problem
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.user_code_errors import wrap_forward_errors, wrap_splits, wrap_task
from deploypipe.verification.golden_file import GOLDEN, TENSORS

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
    notify: Progress = silent,
    ranks: Ranks = ALONE,
    remeasure: bool = False,
    command: str = "",
) -> RunResult:
    """Compress a trained network for one device, and decide whether the result may be shipped.

    The same call resumes an interrupted run in the folder `out`. `source` is the text of the code that made model and
    data: when it changes, everything is computed again. `shared` is a folder for the stages that do not depend on the
    target, so that runs of one network for several targets compute them once. `storage` is a database for the search's
    trials, of which other processes (`help_search`) may then do some; the result is the same. On the first of several
    `ranks` (`training.ranks.join`) fine-tuning is shared with the others, which are at `training.together.serve`
    meanwhile. `remeasure` takes the last measurements again, which the same call does by itself where the machine was
    not steady. `command` is what the result says to run again. The model is left as it is. Raises DeploypipeError for
    all that a user can get wrong, BudgetError when no candidate meets the target's budget. Where the dense model is
    within the budget as it is, or in the precision that pays on the target, nothing is removed: `search` is None, and
    it is the dense model that the gate decides on.

    Where this machine is not the device (`runtimes.ability.can`), nothing is measured: sizes are chosen by MACs, the
    files are exported, an engine is built if it can be, and the gate decides HOLD.

    A finished run leaves `model.onnx` (and `model.engine` for TensorRT), the samples that `deploypipe verify` replays,
    `report.html` and, written last, `result.json` in `out`.
    """
    model = unwrapped(model)
    if problem := name_problem(name):
        raise ConfigError("compress", "name", *problem.split("; "))
    splits, task, notes = wrap_splits(splits), wrap_task(task), list[str]()
    check_inputs(model, splits, task, recipe, target, notes)
    for note in notes:
        notify(Event(stage="check", message=f"NOTE: {note}"))
    place = storage.place if storage else None
    with open_run(Path(out), notify, Path(shared) if shared else None, place=place) as run:
        run.remeasure = remeasure
        if computed := describe_hooks(model):
            run.notify(Event(stage="check", message=f"weights that hooks compute are plain from here on: {computed}"))
        start_afresh(run.path, (MODEL, GOLDEN, TENSORS, ENGINE, f"{ENGINE}.json", f"{ENGINE}.log", REPORT))
        job = Job(with_slim_attention(model), splits, task, recipe, target, run, source, storage, ranks)
        if storage:
            require_same(storage, job.about())  # now, and not when the search begins
        result = replace(_run_stages(job, name), command=command)
        for entry in result.golden.files if result.golden else ():
            place_file(run.files("golden") / entry.name, run.path / entry.name)
        if result.engine:
            place_engine(deploy.engine_file(job), run.path, ENGINE)
        _write_report(result, run.path, notify)
        save_result(run.path, result)
        return result


@wrap_forward_errors()
def summarise_scores(
    model: nn.Module, splits: Splits, task: Task, recipe: Recipe, *, notify: Progress = silent
) -> ScoreSummary:
    """What `recipe.score` says about a network, from one pass over the calibration samples; nothing is removed.

    Raises DeploypipeError for what a user can get wrong.
    """
    model = unwrapped(model)
    splits, task = wrap_splits(splits), wrap_task(task)
    calib = take_calib(splits.calib, recipe.observe.num_samples)
    model = with_slim_attention(model).cpu().eval()
    others = ends_of(extremes_of(inputs for inputs, _ in calib))
    structures = list_structures(model, take(calib[0][0], 2), recipe.keep, recipe.constraints, other_inputs=others)
    loss = task.loss if needs_derivatives(recipe.score) else None
    notify(Event(stage="observe", message="start"))
    settings, seed = recipe.observe, recipe.seed
    halves = observe_halves(
        model,
        structures,
        calib,
        settings,
        loss=loss,
        real_tokens=task.real_tokens,
        shuffled=True,
        seed=seed,
        notify=notify,
    )
    notify(Event(stage="observe", message="done"))
    moments = merge(*halves)
    notify(Event(stage="score", message="start"))
    table = score_halves(model, structures, halves, moments, recipe.score, seed=seed)
    nulls = permutation_baseline_shares(model, structures, moments, recipe.score)
    notify(Event(stage="score", message="done"))
    return summarise(structures, table, moments, nulls)


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
    notify: Progress = silent,
) -> SearchResult:
    """Do trials of the search that `compress` began elsewhere with the same arguments and storage, until all are done.

    What was computed before the search is fetched from `storage.stages`. Raises StorageError naming the first thing
    that this process has otherwise: a version of a package, the network, the data, the code, the device.
    """
    model = unwrapped(model)
    splits, task = wrap_splits(splits), wrap_task(task)
    check_inputs(model, splits, task, recipe, target)
    with (
        TemporaryDirectory(prefix="deploypipe-worker-") as folder,
        open_run(Path(folder), notify, source=storage.stages, place=storage.place) as run,
    ):
        job = Job(with_slim_attention(model), splits, task, recipe, target, run, source, storage)
        require_same(storage, job.about())
        structures = profile.structures(job)
        dense = profile.baseline(job, profile.dense_export(job))
        limits, _ = search_limits(job.target.budget.limits(), job.ability)
        _, row = _dense_precision(job, dense, limits)
        if not row:
            raise StorageError(f"{storage.shown}: {storage.study}: the dense network is within the budget here")
        basis, _ = _observed(job, structures, dense, limits, row)
        return search.help_search(job, basis, storage)


def _dense_precision(
    job: Job, dense: Measurement, limits: Mapping[str, Limit]
) -> tuple[PrecisionChoice | None, PrecisionRow | None]:
    """The dense network in another precision, where that was tried; and what candidates are made in, unless the dense
    network is within the limits."""
    # No budget of the search is about accuracy.
    reference = candidate_of(dense, profile.dense_opened(job, dense), accuracy=0.0)
    if not is_over_budget(reference, reference, with_margin(limits)):
        return None, None
    precision = deploy.dense_precision(job, dense)
    row = precision.row if precision else PrecisionRow(precision="fp32", file=dense.file)
    is_over = is_over_budget(converted(reference, row), reference, with_margin(limits))
    return precision, row if is_over else None


def _observed(
    job: Job, structures: Structures, dense: Measurement, limits: Mapping[str, Limit], row: PrecisionRow
) -> tuple[Basis, ScoreSummary]:
    basis = search.unobserved(job, structures, dense, limits, row)
    basis = replace(basis, timed=search.timed_networks(job, basis))
    basis = replace(basis, reach=search.reach(job, basis))  # a budget out of reach ends here
    moments, scores, curves = _analysed(job, structures)
    return replace(basis, scores=scores, curves=curves), summarise(structures, scores, moments)


def _analysed(job: Job, structures: Structures) -> tuple[Moments, ScoreTable, Curves]:
    halves = profile.observe(job, structures)
    moments = merge(*halves)
    scores = profile.score(job, structures, halves, moments)
    return moments, scores, profile.curves(job, structures, scores, moments)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """A network as it would ship, and what was found about it."""

    shipped: Shipped
    engine: EngineFile | None
    precision: PrecisionChoice | None
    benchmark: BenchmarkReport
    decision: GateDecision
    search: SearchResult | None = None  # None, like the next two: it is the dense one
    outcome: PruneOutcome | None = None
    training: TrainLog | None = None
    too_slow: tuple[str, ...] = ()  # what was said of those made before it


def _run_stages(job: Job, name: str) -> RunResult:
    structures = profile.structures(job)  # first: what the recipe names is looked up here
    limits, stand_in = search_limits(job.target.budget.limits(), job.ability)
    meanwhile = partial(_analysed, job, structures) if limits else None  # without, there is nothing to search for
    dense = profile.baseline(job, profile.dense_export(job, meanwhile))
    summary = None
    precision, row = _dense_precision(job, dense, limits)
    if row:
        basis, summary = _observed(job, structures, dense, limits, row)
        made = _make_smaller(job, basis, stand_in)
    else:
        precision = precision or deploy.dense_precision(job, dense)
        shipped = deploy.shipped(job, dense.file, "baseline", precision)
        made = _judge(job, dense, shipped, (dense.num_params, dense.num_macs), stand_in, precision)
    golden = deploy.golden(job, made.shipped)
    return RunResult(
        pipeline=name,
        metric=job.task.name,
        recipe=job.recipe,
        target=job.target,
        structures=structures,
        scores=summary,
        search=made.search,
        prune=made.outcome.prune if made.outcome else None,
        repair=made.outcome.repair if made.outcome else None,
        training=made.training,
        precision=made.precision,
        benchmark=made.benchmark,
        decision=made.decision,
        stages=tuple(job.run.times),
        engine=made.engine,
        golden=golden,
        origin=job.described_origin(),
        too_slow=made.too_slow,
    )


def _make_smaller(job: Job, basis: Basis, stand_in: str) -> _Made:
    """The network that the search finds; where the benchmark then takes it for too slow, a faster one, and so on.

    Latency moves by a few percent from one minute to the next: what the search found within its limit, the benchmark
    sometimes does not.
    """
    trials, part = search.search(job, basis), 1.0
    too_slow: list[str] = []
    most = job.recipe.search.num_attempts
    for number in range(1, most + 1):
        found = search.finalists(job, search.confirm(job, basis, trials, part))
        plan = found.trials[found.best].plan
        outcome = compression.prune(job, plan)
        training = compression.finetune(job, plan)
        file = compression.export(job, plan)
        precision = deploy.precision(job, file)
        shipped = deploy.shipped(job, file, "export", precision)
        counts = (outcome.prune.params_after, outcome.prune.macs_after)
        made = _judge(job, basis.dense, shipped, counts, stand_in, precision)
        made = replace(made, search=found, outcome=outcome, training=training, too_slow=tuple(too_slow))
        failed = [c for c in made.decision.checks if c.name == "latency_p50" and c.status is Status.FAIL]
        if number == most or not failed or not found.timed_again:
            break
        part = tightened_limit_fraction(basis.limits, found, failed[0])
        told = f"trial {found.best}: {failed[0].reason}"
        too_slow.append(told)
        job.run.notify(Event(stage="gate", message=f"NOTE: {told}; a faster network is made, {number + 1} of {most}"))
    return made


def _judge(
    job: Job,
    dense: Measurement,
    shipped: Shipped,
    counts: tuple[int, int],
    stand_in: str,
    precision: PrecisionChoice | None,
) -> _Made:
    engine = deploy.engine(job, shipped)
    report = deploy.benchmark(job, dense, shipped, engine, counts, stand_in)
    job.run.notify(Event(stage="gate", message="start"))
    parity_limit = limit_of(job.recipe.export, shipped.file.precision)
    # By today's date: what an earlier run left may have been measured long ago.
    decision = decide(report, job.target.budget, parity_limit=parity_limit, now=datetime.now(UTC))
    job.run.notify(Event(stage="gate", message="done"))
    return _Made(shipped=shipped, engine=engine, precision=precision, benchmark=report, decision=decision)


def _write_report(result: RunResult, folder: Path, notify: Progress) -> None:
    try:
        from deploypipe.report.html import write_report

        write_report(result, folder / REPORT)
    except DeploypipeError as error:
        notify(Event(stage="report", message=f"WARNING: no report: {error}"))
