"""`compress`: the stages in order. Each is remembered in the run folder and can be called alone."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.benchmark import benchmark, measure, unmeasured
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.benchmark.environment import describe_environment
from deploypipe.checks import check_inputs
from deploypipe.data import fingerprint
from deploypipe.errors import DeploypipeError
from deploypipe.export.choice import choose_precision
from deploypipe.export.engine import as_model_file, build_engine, is_built, place_engine
from deploypipe.export.golden import write_golden
from deploypipe.export.onnx_file import export_onnx
from deploypipe.export.parity import compare_networks
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
    EngineFile,
    Event,
    Golden,
    Measurement,
    ModelFile,
    Observation,
    PrecisionChoice,
    Progress,
    PruneOutcome,
    PruningPlan,
    ResolvedConstraints,
    ScoreSummary,
    ScoreTable,
    SearchResult,
    Structures,
    TrainLog,
    silent,
)
from deploypipe.release.gate import decide
from deploypipe.runs import RunFolder, RunResult, digest, file_sha256, open_run, place_file, save_result, start_afresh
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.ability import Ability, can
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.machine import this_machine
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
from deploypipe.verify import GOLDEN, TENSORS

MODEL, ENGINE, REPORT = "model.onnx", "model.engine", "report.html"
PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_DENSE, _COMPRESSED = "dense.onnx", "compressed.onnx"
_DENSE_ENGINE, _ENGINE = "dense.engine", "compressed.engine"
_NUM_PARITY_SAMPLES = 64
_NUM_HELD_OUT = 128  # samples beside those of `export.int8`, for its errors
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples
# A search that fills the whole latency budget leaves the gate's interval nothing to lie in.
_LATENCY_MARGIN = 0.03
_STAND_IN = 0.5  # of the dense MACs, for a limit that has no share
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

    Where this machine is not the device (`runtimes.ability.can`), nothing is measured: sizes are chosen by MACs, the
    files are exported, an engine is built if it can be, and the gate decides HOLD.

    A finished run leaves `model.onnx` (and `model.engine` for TensorRT), the samples that `deploypipe verify` replays,
    `report.html` and, written last, `result.json` in `out`.
    """
    check_inputs(model, splits, task, recipe, target)
    with open_run(Path(out), notify) as run:
        start_afresh(run.path, (MODEL, GOLDEN, TENSORS, ENGINE, f"{ENGINE}.json", f"{ENGINE}.log", REPORT))
        job = _Job(with_slim_attention(model), splits, task, recipe, target, run, source)
        result = _run_stages(job, name)
        for entry in result.golden.files if result.golden else ():
            place_file(run.files("golden") / entry.name, run.path / entry.name)
        if result.engine:
            place_engine(job.engine_file, run.path, ENGINE)
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
    structures = list_structures(model, take(calib[0][0], 2), recipe.keep, recipe.constraints)
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
    nulls = null_shares(model, structures, moments, recipe.score)
    notify(Event(stage="score", message="done"))
    return summarise(structures, table, moments, nulls)


def _run_stages(job: "_Job", name: str) -> RunResult:
    structures = job.structures()  # first: what the recipe names is looked up here
    dense = job.baseline()
    limits, stand_in = search_limits(job.target.budget.limits(), job.ability)
    summary, found, outcome, log, file = None, None, None, None, dense.file
    counts = (dense.num_params, dense.num_macs)
    if _is_over_budget(dense, job.dense_opened(dense), _with_margin(limits)):
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
    precision = job.precision(file)
    file = precision.file if precision else file
    engine = job.engine()
    report = job.benchmark(dense, file, engine, counts, stand_in)
    golden = job.golden(file)
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
        precision=precision,
        benchmark=report,
        decision=decision,
        stages=tuple(job.run.times),
        engine=engine,
        golden=golden,
    )


class _Job:
    """One run's inputs, and its stages as methods: what each depends on, and what it computes."""

    def __init__(
        self, model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target, run: RunFolder, source: str
    ) -> None:
        self.model, self.splits, self.task = copy.deepcopy(model).cpu().eval(), splits, task
        self.recipe, self.target, self.run = recipe, target, run
        self.ability = can(target)
        self.builds = is_built(target) and self.ability.verdict != "export only"
        if self.ability.verdict != "run":
            told = f"nothing can be measured for {target.name or target.runtime} here, so the run will end in HOLD"
            run.notify(Event(stage="check", message=f"WARNING: {told}: {self.ability.reason}"))
        self.calib = take_calib(splits.calib, max(recipe.observe.num_samples, recipe.repair.num_samples))
        self.parity_batches = take_calib(self.calib, _NUM_PARITY_SAMPLES)
        self.inputs = take(self.calib[0][0], 2)
        self.converted: ModelFile | None = None  # in the precision that ships, where that is not fp32
        self.device = {
            "fingerprint": describe_environment(target.num_threads).device_fingerprint,
            "gpu": this_machine().gpus,
            "driver": this_machine().driver,
            "ability": self.ability.verdict,
            "runtime": [target.runtime, target.provider, target.provider_options, target.allow_cpu_fallback],
            "engine": [target.batches, target.dynamic_dims, target.workspace, target.compute_capabilities],
            "batch": target.batch_size,
            "threads": target.num_threads,
            "samples": target.num_latency_samples,
        }
        self.fingerprint = model_fingerprint(model)
        self.origin = {
            "model": self.fingerprint,
            "data": fingerprint(splits),
            "source": source,
            "packages": {package: version(package) for package in PACKAGES},
            "seed": recipe.seed,
        }

    def baseline(self) -> Measurement:
        """The dense network, exported and measured by the method used at the end; `file` is the ONNX file."""

        def compute(work: Path) -> Measurement:
            file = export_onnx(self.model, self.parity_batches, work / _DENSE, self.recipe.export)
            counts = count_macs(self.model, self.inputs)
            opened = as_model_file(file, build_engine(work / _DENSE, self.target, work)) if self.builds else file
            if self.ability.verdict != "run":
                return unmeasured(file, counts)
            measured = measure(
                opened,
                folder=work,
                batches=self.splits.val,
                task=self.task,
                target=self.target,
                counts=counts,
                notify=self.run.notify,
            )
            return replace(measured, file=file)

        inputs = {**self.origin, "device": self.device, "export": self.recipe.export}
        return self.run.remember("baseline", inputs, compute, Measurement)

    def structures(self) -> Structures:
        keep, constraints = self.recipe.keep, self.recipe.constraints
        return self.run.remember(
            "structures",
            {**self.origin, "keep": keep, "constraints": constraints},
            lambda _: list_structures(self.model, self.inputs, keep, constraints),
            Structures,
        )

    def observe(self, structures: Structures) -> tuple[Moments, Moments]:
        loss = self.task.loss if needs_derivatives(self.recipe.score) else None

        def compute(work: Path) -> Observation:
            settings, seed = self.recipe.observe, self.recipe.seed
            halves = observe_halves(
                self.model,
                structures,
                self.calib,
                settings,
                loss=loss,
                real_tokens=self.task.real_tokens,
                seed=seed,
                notify=self.run.notify,
            )
            for name, half in zip(_HALVES, halves, strict=True):
                save_moments(half, work / name)
            return Observation(num_samples=sum(half.num_samples for half in halves), skipped=halves[0].skipped)

        inputs = {
            **self.origin,
            "structures": replace(structures, constraints=ResolvedConstraints()),  # they bound what is chosen later
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
            "constraints": structures.constraints,
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
            reference = _candidate(dense, self.dense_opened(dense), self._dense_accuracy(dense))
            judge = Judge(
                dense=self.model,
                dense_onnx=self.run.files("baseline") / _DENSE,
                dense_file=self.run.files("baseline") / self.dense_opened(dense).path,
                dense_p50_ms=reference.latency_p50_ms,
                builds_engines=self.builds,
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
                reference,
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
                real_tokens=self.task.real_tokens,
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
            file = export_onnx(
                tuned,
                self.parity_batches,
                work / _COMPRESSED,
                self.recipe.export,
                origin={"plan": digest(plan), "recipe": digest(self.recipe), "dense_model": self.fingerprint},
                class_names=self.task.class_names,
            )
            return replace(file, from_dense=compare_networks(self.model, tuned, self.parity_batches))

        inputs = {
            "finetune": self.run.key("finetune"),
            "recipe": self.recipe,  # its hash goes into the file
            "class_names": self.task.class_names,
        }
        return self.run.remember("export", inputs, compute, ModelFile)

    def precision(self, file: ModelFile) -> PrecisionChoice | None:
        """None where the target takes fp32 only. file: the compressed network's, or the dense one's."""
        if self.target.precisions == ("fp32",):
            return None
        folder = self.fp32_file.parent

        def compute(work: Path) -> PrecisionChoice:
            def as_opened(path: Path) -> Path:
                if not self.builds:
                    return path
                engines = work / path.stem
                engines.mkdir()
                return engines / build_engine(path, self.target, engines).path

            return choose_precision(
                file,
                folder,
                work,
                calib=take_calib(self.splits.calib, self.recipe.export.int8.num_calib_samples + _NUM_HELD_OUT),
                val=self.splits.val,
                task=self.task,
                target=self.target,
                settings=self.recipe.export,
                runtime=make_runtime(self.target) if self.ability.verdict == "run" else None,
                as_opened=as_opened,
                notify=self.run.notify,
            )

        inputs = {
            "file": file.sha256,
            "precisions": self.target.precisions,
            "export": self.recipe.export,
            "device": self.device,
            **self.origin,
        }
        choice = self.run.remember("precision", inputs, compute, PrecisionChoice)
        if choice.chosen != "fp32":
            self.converted = choice.file
        return choice

    @property
    def fp32_file(self) -> Path:
        """Of the compressed network, or of the dense one where nothing had to go."""
        if "export" in self.run.stages:
            return self.run.files("export") / _COMPRESSED
        return self.run.files("baseline") / _DENSE

    @property
    def onnx_file(self) -> Path:
        """The ONNX file that ships, or that the engine is built from."""
        return self.run.files("precision") / self.converted.path if self.converted else self.fp32_file

    def dense_opened(self, dense: Measurement) -> ModelFile:
        """What the device opens of the dense network: the ONNX file, or an engine."""
        if not self.builds:
            return dense.file
        return as_model_file(dense.file, load_record(self.run.files("baseline") / _DENSE_ENGINE))

    @property
    def engine_file(self) -> Path:
        """The engine that ships, as `onnx_file`."""
        if "engine" in self.run.stages:
            return self.run.files("engine") / _ENGINE
        return self.run.files("baseline") / _DENSE_ENGINE

    def engine(self) -> EngineFile | None:
        """None where the target takes none, or where this machine cannot build it."""
        if not self.builds:
            return None
        if self.onnx_file == self.run.files("baseline") / _DENSE:
            return load_record(self.engine_file)
        inputs = {"onnx": file_sha256(self.onnx_file), "device": self.device, "packages": self.origin["packages"]}
        return self.run.remember(
            "engine", inputs, lambda work: build_engine(self.onnx_file, self.target, work), EngineFile
        )

    def benchmark(
        self, dense: Measurement, file: ModelFile, engine: EngineFile | None, counts: tuple[int, int], stand_in: str
    ) -> BenchmarkReport:
        """Both files in one process, on the test split; engines where they are what the device runs."""
        dense_file = _placed(self.dense_opened(dense), self.run.stages["baseline"])
        compressed = dense_file
        if self.onnx_file != self.run.files("baseline") / _DENSE:
            compressed = _placed(file, self.onnx_file.parent.name)
        if engine and "engine" in self.run.stages:
            compressed = _placed(as_model_file(file, engine), self.run.stages["engine"])

        def compute(_: Path) -> BenchmarkReport:
            report = benchmark(
                dense_file,
                compressed,
                folder=self.run.path,
                test_batches=self.splits.test,
                task=self.task,
                target=self.target,
                counts=((dense.num_params, dense.num_macs), counts),
                notify=self.run.notify,
            )
            notes = [stand_in] if stand_in else []
            if is_built(self.target) and not engine:
                notes.append("no engine was built: file sizes are those of the ONNX files")
            return replace(report, notes=(*report.notes, *notes))

        inputs = {"dense": dense_file.sha256, "compressed": compressed.sha256, "device": self.device, **self.origin}
        return self.run.remember("benchmark", inputs, compute, BenchmarkReport)

    def golden(self, file: ModelFile) -> Golden:
        """The ONNX file that ships, with samples that it can be checked by: a folder for `deploypipe verify`."""

        def compute(work: Path) -> Golden:
            place_file(self.onnx_file, work / MODEL)
            for entry in file.data:
                place_file(self.onnx_file.with_name(entry.name), work / entry.name)
            return write_golden(work, {MODEL: file}, self.parity_batches)

        inputs = {"file": file.sha256, "data": self.origin["data"], "packages": self.origin["packages"]}
        return self.run.remember("golden", inputs, compute, Golden)

    def _batch_macs(self) -> int:
        """Multiply-accumulates of the dense network on one batch of the training split."""
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(self.splits.train), None)
        return num_samples(batch[0]) * count_macs(self.model, self.inputs)[1] if batch else 0

    def _dense_accuracy(self, dense: Measurement) -> float:
        """On val: of the exported file where it runs here, of the network itself elsewhere, as a search needs it."""
        if dense.accuracy is not None:
            return dense.accuracy.value
        return float(evaluate_module(self.model, self.splits.val, self.task).mean())

    def restored(self, plan: PruningPlan, stage: str) -> nn.Module:
        """The pruned network with the weights a stage left."""
        pruned = apply_plan(self.model, plan)
        pruned.load_state_dict(load_file(self.run.files(stage) / "weights.safetensors"))
        return pruned


def _placed(file: ModelFile, folder: str) -> ModelFile:
    return replace(file, path=f"{folder}/{file.path}")


def search_limits(limits: dict[str, Limit], ability: Ability) -> tuple[dict[str, Limit], str]:
    """The limits a search can hold a candidate to, and what stands in for those that cannot be measured here.

    MACs do, at the same share of the dense network's, or at half of them for a bound in ms or MiB; a limit of MACs
    that the user gave stays. The gate goes by the target's own limits, and finds these UNKNOWN.
    """
    unmeasured_ones = [name for name in ("latency_p50", "peak_memory") if name in limits]
    if ability.verdict == "run" or not unmeasured_ones:
        return limits, ""
    shares = [limits[name].value if limits[name].is_relative else _STAND_IN for name in unmeasured_ones]
    kept = {name: limit for name, limit in limits.items() if name not in unmeasured_ones}
    told = f"{' and '.join(unmeasured_ones)} cannot be measured here, and the search went by MACs instead"
    if "macs" in kept:
        return kept, f"{told}: those of budget.macs"
    share = min(shares)
    return {**kept, "macs": Limit(value=share, is_relative=True)}, f"{told}, at {share:g}x those of the dense network"


def _candidate(dense: Measurement, opened: ModelFile, accuracy: float) -> Candidate:
    """The dense network's own figures, as a search compares them."""
    return Candidate(
        accuracy=accuracy,
        latency_p50_ms=dense.latency.p50_ms.value if dense.latency else None,
        peak_memory_mib=dense.peak_memory_mib,
        file_size_mib=opened.size_bytes / 2**20,
        num_params=dense.num_params,
        num_macs=dense.num_macs,
    )


def _is_over_budget(dense: Measurement, opened: ModelFile, limits: Mapping[str, Limit]) -> bool:
    candidate = _candidate(dense, opened, accuracy=0.0)  # no budget of the search is about it
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
