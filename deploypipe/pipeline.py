"""`compress`: the stages in order. Each is remembered in the run folder and can be called alone."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.benchmark import benchmark, measure
from deploypipe.benchmark.environment import describe_environment
from deploypipe.checks import check_inputs
from deploypipe.data import fingerprint
from deploypipe.errors import DeploypipeError
from deploypipe.export.onnx_file import export_onnx
from deploypipe.observe.moments import Moments, load_moments, merge, save_moments
from deploypipe.observe.stream import observe_halves
from deploypipe.pruning.apply import apply_plan, describe
from deploypipe.pruning.attention import with_slim_attention
from deploypipe.pruning.calls import one_thread_if_small
from deploypipe.pruning.plan import make_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.saved import own_weights, save_pruned
from deploypipe.pruning.structures import count_macs, list_structures, model_fingerprint
from deploypipe.recipe import Recipe
from deploypipe.records import (
    BenchmarkReport,
    Candidate,
    Curves,
    Event,
    Measurement,
    ModelFile,
    Observation,
    Progress,
    PruneOutcome,
    PruningPlan,
    ScoreSummary,
    ScoreTable,
    SearchResult,
    Structures,
    TrainLog,
    silent,
)
from deploypipe.release.gate import decide
from deploypipe.runs import RunFolder, RunResult, open_run, place_file, save_result, start_afresh
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.null import null_shares
from deploypipe.scoring.summary import summarise
from deploypipe.search.allocate import Allocation, allocate_to, least_macs, uniform
from deploypipe.search.curves import measure_curves
from deploypipe.search.judge import Judge
from deploypipe.search.study import search, violations
from deploypipe.target import Limit, Target
from deploypipe.task import Splits, Task, num_samples, take, take_calib
from deploypipe.training.finetune import finetune

MODEL, REPORT = "model.onnx", "report.html"
PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_NUM_PARITY_SAMPLES = 64
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples
# A search that fills the whole latency budget leaves the gate's interval nothing to lie in.
_LATENCY_MARGIN = 0.03
_SMALLEST_SHARE = 0.1  # of the dense MACs; below, no candidate was ever worth repairing


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
    notify: Progress = silent,
) -> RunResult:
    """Compress a trained network for one device, and decide whether the result may be shipped.

    The same call resumes an interrupted run in the folder `out`. `source` is the text of the code that made model and
    data: when it changes, everything is computed again. The model is left as it is. Raises DeploypipeError for all that
    a user can get wrong, BudgetError when no candidate meets the target's budget. Where the dense model is within the
    budget as it is, nothing is removed: `search` is None, and it is the dense model that the gate decides on.

    A finished run leaves `model.onnx`, `report.html` and, written last, `result.json` in `out`.
    """
    check_inputs(model, splits, task, recipe, target)
    with open_run(Path(out), notify) as run:
        start_afresh(run.path, (MODEL, REPORT))
        job = _Job(with_slim_attention(model), splits, task, recipe, target, run, source)
        result = _run_stages(job, name)
        place_file(run.path / result.benchmark.compressed.file.path, run.path / MODEL)
        _write_report(result, run.path, notify)
        save_result(run.path, result)
        return result


def summarise_scores(
    model: nn.Module, splits: Splits, task: Task, recipe: Recipe, *, notify: Progress = silent
) -> ScoreSummary:
    """What `recipe.score` says about a network, from one pass over the calibration samples; nothing is removed.

    Raises DeploypipeError for what a user can get wrong.
    """
    calib = take_calib(splits.calib, recipe.observe.num_samples)
    model = with_slim_attention(model).cpu().eval()
    structures = list_structures(model, take(calib[0][0], 2), recipe.keep)
    loss = task.loss if needs_derivatives(recipe.score) else None
    notify(Event(stage="observe", message="start"))
    settings, seed = recipe.observe, recipe.seed
    halves = observe_halves(model, structures, calib, settings, loss=loss, shuffled=True, seed=seed, notify=notify)
    notify(Event(stage="observe", message="done"))
    moments = merge(*halves)
    notify(Event(stage="score", message="start"))
    table = score_halves(model, structures, halves, moments, recipe.score, seed=seed)
    nulls = null_shares(model, structures, moments, recipe.score)
    notify(Event(stage="score", message="done"))
    return summarise(structures, table, moments, nulls)


def _run_stages(job: "_Job", name: str) -> RunResult:
    dense = job.baseline()
    structures = job.structures()
    limits = job.target.budget.limits()
    summary, found, outcome, log, file = None, None, None, None, dense.file
    counts = (dense.num_params, dense.num_macs)
    if _is_over_budget(dense, _with_margin(limits)):
        halves = job.observe(structures)
        moments = merge(*halves)
        scores = job.score(structures, halves, moments)
        summary = summarise(structures, scores, moments)
        curves = job.curves(structures, scores, moments)
        found = job.search(structures, scores, curves, dense, limits)
        plan = found.trials[found.best].plan
        outcome = job.prune(plan)
        log = job.finetune(plan)
        file = job.export(plan)
        counts = (outcome.prune.params_after, outcome.prune.macs_after)
    report = job.benchmark(dense, file, counts)
    job.run.notify(Event(stage="gate", message="start"))
    decision = decide(report, job.target.budget)
    job.run.notify(Event(stage="gate", message="done"))
    return RunResult(
        pipeline=name,
        metric=job.task.name,
        recipe=job.recipe,
        target=job.target,
        structures=structures,
        scores=summary,
        search=found,
        prune=outcome.prune if outcome else None,
        repair=outcome.repair if outcome else None,
        training=log,
        benchmark=report,
        decision=decision,
        stages=tuple(job.run.times),
    )


class _Job:
    """One run's inputs, and its stages as methods: what each depends on, and what it computes."""

    def __init__(
        self, model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target, run: RunFolder, source: str
    ) -> None:
        self.model, self.splits, self.task = copy.deepcopy(model).cpu().eval(), splits, task
        self.recipe, self.target, self.run = recipe, target, run
        self.calib = take_calib(splits.calib, max(recipe.observe.num_samples, recipe.repair.num_samples))
        self.parity_batches = take_calib(self.calib, _NUM_PARITY_SAMPLES)
        self.inputs = take(self.calib[0][0], 2)
        self.device = {
            "fingerprint": describe_environment(target.num_threads).device_fingerprint,
            "runtime": target.runtime,
            "batch": target.batch_size,
            "threads": target.num_threads,
            "samples": target.num_latency_samples,
        }
        self.origin = {
            "model": model_fingerprint(model),
            "data": fingerprint(splits),
            "source": source,
            "packages": {package: version(package) for package in PACKAGES},
            "seed": recipe.seed,
        }

    def baseline(self) -> Measurement:
        """The dense network, exported and measured by the method used at the end."""

        def compute(work: Path) -> Measurement:
            file = export_onnx(self.model, self.parity_batches, work / "dense.onnx", self.recipe.export)
            counts = count_macs(self.model, self.inputs)
            return measure(
                file,
                folder=work,
                batches=self.splits.val,
                task=self.task,
                target=self.target,
                counts=counts,
                notify=self.run.notify,
            )

        inputs = {**self.origin, "device": self.device, "export": self.recipe.export}
        return self.run.remember("baseline", inputs, compute, Measurement)

    def structures(self) -> Structures:
        inputs = {**self.origin, "keep": self.recipe.keep}
        return self.run.remember(
            "structures", inputs, lambda _: list_structures(self.model, self.inputs, self.recipe.keep), Structures
        )

    def observe(self, structures: Structures) -> tuple[Moments, Moments]:
        loss = self.task.loss if needs_derivatives(self.recipe.score) else None

        def compute(work: Path) -> Observation:
            settings, seed = self.recipe.observe, self.recipe.seed
            halves = observe_halves(
                self.model, structures, self.calib, settings, loss=loss, seed=seed, notify=self.run.notify
            )
            for name, half in zip(_HALVES, halves, strict=True):
                save_moments(half, work / name)
            return Observation(num_samples=sum(half.num_samples for half in halves), skipped=halves[0].skipped)

        inputs = {
            **self.origin,
            "structures": structures,
            "observe": self.recipe.observe,
            "derivatives": loss is not None,
        }
        self.run.remember("observe", inputs, compute, Observation)
        first, second = (load_moments(self.run.files("observe") / name) for name in _HALVES)
        return first, second

    def score(self, structures: Structures, halves: tuple[Moments, Moments], moments: Moments) -> ScoreTable:
        def compute(_: Path) -> ScoreTable:
            with one_thread_if_small(0):  # thousands of small products
                return score_halves(self.model, structures, halves, moments, self.recipe.score, seed=self.recipe.seed)

        inputs = {"observe": self.run.key("observe"), "score": self.recipe.score}
        return self.run.remember(
            "score",
            inputs,
            compute,
            ScoreTable,
        )

    def curves(self, structures: Structures, scores: ScoreTable, moments: Moments) -> Curves:
        def compute(_: Path) -> Curves:
            return measure_curves(
                self.model,
                structures,
                scores,
                moments,
                self.calib,
                self.recipe.search,
                channel_multiple=self.target.channel_multiple,
                notify=self.run.notify,
            )

        settings = self.recipe.search
        inputs = {
            "score": self.run.key("score"),
            "search": [settings.num_curve_samples, settings.num_levels, settings.prune_blocks],
            "multiple": self.target.channel_multiple,
        }
        return self.run.remember("curves", inputs, compute, Curves)

    def search(
        self,
        structures: Structures,
        scores: ScoreTable,
        curves: Curves,
        dense: Measurement,
        limits: Mapping[str, Limit],
    ) -> SearchResult:
        multiple = self.target.channel_multiple

        def plan_for(allocation: Allocation) -> PruningPlan:
            return make_plan(structures, scores, allocation.widths, allocation.blocks, multiple)

        def macs_of(allocation: Allocation) -> int:
            return count_macs(apply_plan(self.model, plan_for(allocation)), self.inputs)[1]

        def propose(knobs: Mapping[str, float]) -> PruningPlan:
            if knobs["measured"] == 0.0:
                return plan_for(uniform(structures, knobs["macs_kept"], multiple))
            allocation = allocate_to(
                structures,
                curves,
                knobs["macs_kept"],
                macs_of,
                exponent=knobs["exponent"],
                block_weight=knobs["block_weight"],
            )
            return plan_for(allocation)

        def compute(work: Path) -> SearchResult:
            judge = Judge(
                dense=self.model,
                dense_file=self.run.files("baseline") / dense.file.path,
                dense_p50_ms=_candidate(dense).latency_p50_ms,
                calib=self.calib,
                val=self.splits.val,
                task=self.task,
                recipe=self.recipe,
                target=self.target,
                work=work,
            )
            return search(
                propose,
                judge,
                _candidate(dense),
                _with_margin(limits),
                _macs_bounds(structures, curves, limits),
                self.recipe.search,
                storage=work / "study.db",
                seed=self.recipe.seed,
                notify=self.run.notify,
            )

        inputs = {
            "curves": self.run.key("curves"),
            "baseline": self.run.key("baseline"),
            "budget": self.target.budget,
            "search": self.recipe.search,
            "repair": self.recipe.repair,
            "device": self.device,
        }
        return self.run.remember("search", inputs, compute, SearchResult)

    def prune(self, plan: PruningPlan) -> PruneOutcome:
        def compute(work: Path) -> PruneOutcome:
            pruned = apply_plan(self.model, plan)
            report = describe(self.model, pruned, plan, self.inputs)
            repaired, repairs = repair(
                self.model,
                pruned,
                plan,
                self.calib,
                self.recipe.repair,
                seed=self.recipe.seed,
                notify=lambda e: self.run.notify(Event(stage="prune", done=e.done, total=e.total, message=e.message)),
            )
            save_file(own_weights(repaired), work / "weights.safetensors")
            return PruneOutcome(prune=report, repair=repairs)

        inputs = {**self.origin, "plan": plan, "calib": self.run.key("observe"), "repair": self.recipe.repair}
        return self.run.remember("prune", inputs, compute, PruneOutcome)

    def finetune(self, plan: PruningPlan) -> TrainLog:
        def compute(work: Path) -> TrainLog:
            checkpoints = work / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            with one_thread_if_small(self._batch_macs()):
                tuned, log = finetune(
                    self.restored(plan, "prune"),
                    self.model,
                    self.splits,
                    self.task,
                    self.recipe.finetune,
                    checkpoint=checkpoints,
                    seed=self.recipe.seed,
                    notify=self.run.notify,
                )
            save_pruned(tuned, plan, self.inputs, work)
            for file in checkpoints.iterdir():
                file.unlink()
            checkpoints.rmdir()
            return log

        inputs = {"prune": self.run.key("prune"), "finetune": self.recipe.finetune}
        return self.run.remember("finetune", inputs, compute, TrainLog)

    def export(self, plan: PruningPlan) -> ModelFile:
        def compute(work: Path) -> ModelFile:
            tuned = self.restored(plan, "finetune")
            return export_onnx(tuned, self.parity_batches, work / "compressed.onnx", self.recipe.export)

        inputs = {"finetune": self.run.key("finetune"), "export": self.recipe.export}
        return self.run.remember("export", inputs, compute, ModelFile)

    def benchmark(self, dense: Measurement, file: ModelFile, counts: tuple[int, int]) -> BenchmarkReport:
        """Both files in one process, on the test split."""
        dense_file = _placed(dense.file, self.run.stages["baseline"])
        compressed = _placed(file, self.run.stages["export"]) if "export" in self.run.stages else dense_file

        def compute(_: Path) -> BenchmarkReport:
            return benchmark(
                dense_file,
                compressed,
                folder=self.run.path,
                test_batches=self.splits.test,
                task=self.task,
                target=self.target,
                counts=((dense.num_params, dense.num_macs), counts),
                notify=self.run.notify,
            )

        inputs = {"dense": dense_file.sha256, "compressed": compressed.sha256, "device": self.device, **self.origin}
        return self.run.remember("benchmark", inputs, compute, BenchmarkReport)

    def _batch_macs(self) -> int:
        """Multiply-accumulates of the dense network on one batch of the training split."""
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(self.splits.train), None)
        return num_samples(batch[0]) * count_macs(self.model, self.inputs)[1] if batch else 0

    def restored(self, plan: PruningPlan, stage: str) -> nn.Module:
        """The pruned network with the weights a stage left."""
        pruned = apply_plan(self.model, plan)
        pruned.load_state_dict(load_file(self.run.files(stage) / "weights.safetensors"))
        return pruned


def _placed(file: ModelFile, folder: str) -> ModelFile:
    return replace(file, path=f"{folder}/{file.path}")


def _candidate(dense: Measurement) -> Candidate:
    """The dense network's own figures, as a search compares them."""
    if dense.latency is None or dense.accuracy is None:
        raise DeploypipeError("the dense model could not be measured on this machine; run `deploypipe doctor TARGET`")
    return Candidate(
        accuracy=dense.accuracy.value,
        latency_p50_ms=dense.latency.p50_ms.value,
        peak_memory_mib=dense.peak_memory_mib,
        file_size_mib=dense.file.size_bytes / 2**20,
        num_params=dense.num_params,
        num_macs=dense.num_macs,
    )


def _is_over_budget(dense: Measurement, limits: Mapping[str, Limit]) -> bool:
    candidate = _candidate(dense)
    return any(excess > 0 for excess in violations(candidate, candidate, limits).values())


def _with_margin(limits: Mapping[str, Limit]) -> dict[str, Limit]:
    tightened = dict(limits)
    if "latency_p50" in limits:
        limit = limits["latency_p50"]
        tightened["latency_p50"] = Limit(value=limit.value * (1 - _LATENCY_MARGIN), is_relative=limit.is_relative)
    return tightened


def _macs_bounds(structures: Structures, curves: Curves, limits: Mapping[str, Limit]) -> tuple[float, float]:
    """Between which shares of the dense MACs the study looks. With no other budget, at the limit alone."""
    high = min(1.0, limits["macs"].absolute(structures.num_macs) / structures.num_macs) if "macs" in limits else 1.0
    if set(limits) == {"macs"}:
        return high, high
    low = max(_SMALLEST_SHARE, least_macs(structures, curves) * 1.1)
    return min(low, high), high


def _write_report(result: RunResult, folder: Path, notify: Progress) -> None:
    try:
        from deploypipe.report.html import write_report

        write_report(result, folder / REPORT)
    except DeploypipeError as error:
        notify(Event(stage="report", message=f"WARNING: no report: {error}"))
