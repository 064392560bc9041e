"""From scores to the plan that wins."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from deploypipe.budgets import BUDGETS
from deploypipe.files.hashing import digest
from deploypipe.memory_order import find_order
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.recipe import Magnitude
from deploypipe.records import (
    Event,
    Feasibility,
    Measurement,
    PrecisionRow,
    PruningPlan,
    ScoreTable,
    SearchResult,
    Structures,
    TimedNetworks,
    TrainLog,
    Trial,
    silent,
)
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search import study
from deploypipe.search.allocation.feasibility import feasibility_text, find_feasibility, require_feasible
from deploypipe.search.allocation.limits import (
    bounded_shares,
    candidate_of,
    fill_range,
    memory_limit_mib,
    share_to_confirm,
    with_margin,
)
from deploypipe.search.allocation.loss_curves import unmeasured_curves
from deploypipe.search.allocation.proposer import Proposer
from deploypipe.search.allocation.solver import Allocation, allowed_widths
from deploypipe.search.cost_models.layer_widths import find_sites
from deploypipe.search.cost_models.time_networks import time_networks
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.duration import duration_text, predict_seconds
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.early_stopping import draw_parts
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.search.evaluation.latency_store import LocalLatencyStore, SharedLatencyStore
from deploypipe.search.evaluation.trial_loop import History, evaluate_plan, violations
from deploypipe.search.evaluation.winner import confirm_finalists, with_finalists, with_tuned
from deploypipe.search.search_inputs import Basis, Tools
from deploypipe.stages import compression, profile
from deploypipe.stages.context import Job
from deploypipe.target import Limit


def candidates(job: Job, dense: Measurement, shipping: PrecisionRow) -> CandidateFiles:
    """Files of pruned networks in the precision that ships, which is that of the row, and their latency."""
    baseline = job.run.files("baseline")
    return CandidateFiles(
        dense=job.model,
        dense_onnx=baseline / profile.DENSE,
        dense_opened=baseline / profile.dense_opened(job, dense).path,
        template=baseline / profile.TEMPLATE,
        precision=shipping,
        calib=job.calib,
        target=job.target,
        builds_engines=job.builds,
        export=job.recipe.export,
        measuring=SharedLatencyStore(job.storage, digest(job.device)) if job.storage else LocalLatencyStore(),
    )


def unobserved(
    job: Job, structures: Structures, dense: Measurement, limits: Mapping[str, Limit], row: PrecisionRow
) -> Basis:
    """What is known before anything is observed. The row: the precision that candidates are made in."""
    return Basis(
        structures=structures,
        scores=ScoreTable(scorer="none", channels={g.name: (0.0,) * g.num_units for g in structures.groups}),
        curves=unmeasured_curves(structures, job.recipe.search, job.target.channel_multiple),
        dense=dense,
        limits=limits,
        shipping=row,
        candidates=candidates(job, dense, row),
    )


def timed_networks(job: Job, basis: Basis) -> TimedNetworks | None:
    """Networks timed on the target, for a latency model to learn from; None where nothing asks for latency, or it
    cannot be taken here."""
    is_bounded = any(BUDGETS[name].predictor == "latency_model" for name in basis.limits)
    is_asked_for = is_bounded or "latency" in job.recipe.search.objectives
    if job.ability.verdict != "run" or not is_asked_for:
        return None
    levels = allowed_widths(basis.structures, basis.curves)

    def plan_for(chosen: Allocation) -> PruningPlan:
        return make_plan(basis.structures, basis.scores, chosen.widths, chosen.blocks, job.target.channel_multiple)

    def compute(work: Path) -> TimedNetworks:
        return time_networks(
            basis.candidates,
            basis.structures,
            levels,
            plan_for,
            work,
            count=job.recipe.search.num_timed,
            seed=job.recipe.seed,
            notify=job.run.notify,
        )

    inputs = {
        "baseline": job.run.key("baseline"),
        "structures": basis.structures,
        "levels": levels,
        "precision": basis.shipping.file,
        "count": job.recipe.search.num_timed,
        "device": job.device,
    }
    return job.run.remember("latency", inputs, compute, TimedNetworks)


def reach(job: Job, basis: Basis) -> Feasibility:
    """What networks can come to; BudgetError where that is not within the budgets."""

    def compute(work: Path) -> Feasibility:
        proposer = _proposer(job, basis, work)
        found, shares = find_feasibility(proposer, proposer.shares), dict(proposer.shares)
        dense = proposer.reference.peak_memory_mib
        limit = memory_limit_mib(with_margin(basis.limits), proposer.reference, ())
        if dense and limit:  # what predicts it learns from the search's candidates: here it is measured
            smallest = [proposer.plan(proposer.cheapest(name)) for name in ("params", "macs")]
            if least := basis.candidates.least_peak_memory_mib(smallest, work):
                shares["peak_memory"] = limit / dense
                require_feasible("peak_memory", least / dense, shares["peak_memory"])
                found = replace(found, least={**found.least, "peak_memory": least / dense})
        _note(job, feasibility_text(found, shares), stage="reach")
        return found

    inputs = {
        "baseline": job.run.key("baseline"),
        "structures": basis.structures,
        "curves": basis.curves,
        "latency": job.run.key("latency") if basis.timed else "",
        "precision": basis.shipping.file,
        "budget": job.target.budget,
    }
    return job.run.remember("reach", inputs, compute, Feasibility)


def search(job: Job, basis: Basis) -> SearchResult:
    """The trials and their winner; with a shared storage, this process is one of those at work on them."""
    inputs = _search_inputs(job, basis)

    def compute(work: Path) -> SearchResult:
        tools = _tools(job, basis, work)
        typical, num_trials = tools.proposer.plain(), job.recipe.search.num_trials
        _note(job, duration_text(predict_seconds(tools.evaluator, typical, num_trials), num_trials))
        if job.storage:
            _invite_workers(job, job.storage)
        found = _run_trials(job, tools, inputs, job.storage or _own_storage(job, inputs))
        return replace(found, reach=basis.reach, latency_fit=tools.proposer.latency_fit(found.trials))

    return job.run.remember("search", inputs, compute, SearchResult)


def confirm(job: Job, basis: Basis, found: SearchResult, part: float = 1.0) -> SearchResult:
    """The best trials that are within `part` of the latency limit when they are timed once more."""
    wanted = job.recipe.search.num_finalists
    if not basis.timed or "latency_p50" not in basis.limits:
        return with_finalists(found, wanted)

    def compute(work: Path) -> SearchResult:
        tools = _tools(job, basis, work)

        def narrow(trial: Trial, number: int, share: float) -> Trial:
            shares = {**tools.proposer.shares, "latency_p50": share / trial.knobs["fill"]}
            plan = replace(tools.proposer, shares=shares)(trial.knobs, found.trials)
            excess_of = partial(violations, dense=tools.proposer.reference, limits=tools.limits)
            history = History(trials=[], results={})
            objectives = job.recipe.search.objectives
            return evaluate_plan(number, trial.knobs, plan, tools.evaluator, excess_of, objectives, history)[0]

        limit = part * share_to_confirm(basis.limits, found.dense)
        return confirm_finalists(found, limit, lambda plan: basis.candidates.ratio_anew(plan, work), narrow, wanted)

    inputs = {"search": job.run.key("search"), "part": part}
    return job.run.remember("confirm", inputs, compute, SearchResult)


def help_search(job: Job, basis: Basis, storage: Storage) -> SearchResult:
    """Do trials of the search that another process began, until all of them are done."""
    with TemporaryDirectory(dir=job.run.path) as work:
        tools = _tools(job, basis, Path(work))
        return _run_trials(job, tools, _search_inputs(job, basis), storage)


def finalists(job: Job, found: SearchResult) -> SearchResult:
    """The winner by what a short training makes of the best trials."""
    if len(found.finalists) < 2 or job.recipe.finetune.num_epochs == 0:
        return found
    return with_tuned(found, {str(number): _finalist(job, found, number) for number in found.finalists})


def _finalist(job: Job, found: SearchResult, number: int) -> float:
    """The accuracy on val that a short training brings a trial to."""
    plan = found.trials[number].plan
    short = replace(job.recipe.finetune, num_epochs=job.recipe.search.finalist_epochs)
    told = f"trial {number}, {found.finalists.index(number) + 1} of {len(found.finalists)}"

    def compute(work: Path) -> TrainLog:
        repaired, _ = compression.make_repaired(job, plan, silent)
        checkpoint = work / "checkpoints"
        checkpoint.mkdir(exist_ok=True)

        def notify(event: Event) -> None:
            job.run.notify(replace(event, stage="finalist", message=told))

        _, log = compression.tune(job, plan, repaired, short, checkpoint, notify)
        shutil.rmtree(checkpoint)
        return log

    inputs = {
        **job.origin,
        "plan": plan,
        "calib": job.run.key("observe"),
        "finetune": short,
        "repair": job.recipe.repair,
    }
    log = job.run.remember("finalist", inputs, compute, TrainLog, is_shared=True)
    return log.epochs[log.chosen_epoch].val_accuracy


def _search_inputs(job: Job, basis: Basis) -> dict[str, object]:
    return {
        "curves": job.run.key("curves"),
        "baseline": job.run.key("baseline"),
        "latency": job.run.key("latency") if basis.timed else "",
        "precision": basis.shipping.file,
        "budget": job.target.budget,
        "search": job.recipe.search,
        "repair": job.recipe.repair,
        "device": job.device,
    }


def _proposer(job: Job, basis: Basis, work: Path) -> Proposer:
    dense, structures, shipped = basis.dense, basis.structures, basis.shipping.file or basis.dense.file
    reference = candidate_of(dense, profile.dense_opened(job, dense), profile.dense_accuracy(job, dense))
    is_timed = basis.timed is not None
    return Proposer(
        dense=job.model,
        inputs=job.inputs,
        structures=structures,
        scores=basis.scores,
        magnitudes=score_magnitudes(job.model, structures),
        curves=basis.curves,
        channel_multiple=job.target.channel_multiple,
        shares=bounded_shares(with_margin(basis.limits), reference, shipped.size_bytes / 2**20, is_timed=is_timed),
        reference=reference,
        sites=find_sites(job.model, structures, job.inputs),
        timed=basis.timed.rows if basis.timed else (),
        dense_ratio=basis.shipping.latency_ratio.value if basis.shipping.latency_ratio else 1.0,
        measure=lambda plan: basis.candidates.ratio_of(plan, work),
    )


def _tools(job: Job, basis: Basis, work: Path) -> Tools:
    tight, proposer = with_margin(basis.limits), _proposer(job, basis, work)
    reference = proposer.reference
    arrange = find_order(job.model, job.inputs)
    evaluator = Evaluator(
        candidates=basis.candidates,
        dense_p50_ms=reference.latency_p50_ms,
        calib=job.calib,
        parts=draw_parts(job.splits.val, job.recipe.seed, arrange),
        task=job.task,
        recipe=job.recipe,
        memory_limit_mib=memory_limit_mib(tight, reference, job.recipe.search.objectives),
        work=work,
        accuracies=known_accuracies(job),
    )
    return Tools(limits=tight, proposer=proposer, evaluator=evaluator)


def known_accuracies(job: Job) -> AccuracyCache:
    """Of the repaired networks that this search, or one for another target or budget, has judged."""
    settings = {"repair": job.recipe.repair, "num_samples": job.recipe.search.num_repair_samples}
    key = digest([job.origin, job.run.key("observe"), settings])
    return AccuracyCache((job.run.shared or job.run.path) / f"accuracies-{key}")


def _run_trials(job: Job, tools: Tools, inputs: Mapping[str, object], storage: Storage) -> SearchResult:
    settings = job.recipe.search
    return study.search(
        tools.proposer,
        tools.evaluator,
        tools.proposer.reference,
        tools.limits,
        fill_range(tools.proposer.shares, tools.limits, settings.objectives),
        settings,
        magnitude=(0.0, 0.0) if isinstance(job.recipe.score, Magnitude) else (0.0, 1.0),
        storage=storage,
        origin={**job.about(), **{name: value for name, value in inputs.items() if name != "device"}},
        seed=job.recipe.seed,
        notify=job.run.notify,
    )


def _own_storage(job: Job, inputs: Mapping[str, object]) -> Storage:
    """Beside the stages: a search for more trials goes on with those there are."""
    key = digest([job.about(), {**inputs, "search": study.rules(job.recipe.search)}])
    return Storage.own(job.run.path / f"study-{key}.db")


def _invite_workers(job: Job, storage: Storage) -> None:
    job.run.publish(storage.stages)
    at_once = job.recipe.search.num_parallel
    _note(
        job,
        f"{at_once} {'workers find' if at_once > 1 else 'worker finds'} work at a time (search.num_parallel); to "
        f"start one: deploypipe worker --storage {storage.shown} --run {storage.study}",
    )


def _note(job: Job, text: str, stage: str = "search") -> None:
    job.run.notify(Event(stage=stage, message=f"NOTE: {text}"))
