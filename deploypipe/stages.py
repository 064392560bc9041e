"""The stages of a run, one method each: what it depends on, and so the key it is remembered by, and what it does."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.benchmark import benchmark, measure, unmeasured
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.benchmark.environment import describe_environment
from deploypipe.data import fingerprint
from deploypipe.export.choice import choose_precision
from deploypipe.export.engine import as_model_file, build_engine, is_built
from deploypipe.export.golden import write_golden
from deploypipe.export.onnx_file import export_onnx
from deploypipe.export.parity import compare_networks
from deploypipe.observe.moments import Moments, load_moments, save_moments
from deploypipe.observe.stream import observe_halves
from deploypipe.pruning.apply import apply_plan, describe
from deploypipe.pruning.calls import one_thread_if_small
from deploypipe.pruning.plan import make_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.saved import own_weights, save_pruned
from deploypipe.pruning.structures import count_macs, list_structures, model_fingerprint
from deploypipe.recipe import Mpruner, Recipe
from deploypipe.records import (
    BenchmarkReport,
    Curves,
    EngineFile,
    Event,
    Golden,
    Measurement,
    ModelFile,
    Observation,
    PrecisionChoice,
    PrecisionRow,
    PruneOutcome,
    PruningPlan,
    ResolvedConstraints,
    ScoreTable,
    SearchResult,
    Structures,
    TimedNetworks,
    TrainLog,
)
from deploypipe.runs import RunFolder, digest, place_file
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.ability import can
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.machine import this_machine
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.search.allocate import Allocation, allowed_widths
from deploypipe.search.candidates import Candidates
from deploypipe.search.curves import measure_curves
from deploypipe.search.judge import Judge
from deploypipe.search.limits import bounded_shares, candidate_of, fill_range, memory_limit_mib, with_margin
from deploypipe.search.looks import draw_parts
from deploypipe.search.propose import Proposer
from deploypipe.search.reach import find_reach, reach_text
from deploypipe.search.sites import find_sites
from deploypipe.search.study import search
from deploypipe.search.timing import time_networks
from deploypipe.search.trials import confirm
from deploypipe.target import Limit, Target
from deploypipe.task import Splits, Task, num_samples, take, take_calib
from deploypipe.training.finetune import finetune

MODEL = "model.onnx"
PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_DENSE, _COMPRESSED = "dense.onnx", "compressed.onnx"
_TEMPLATE = "template.onnx"
_DENSE_ENGINE, _ENGINE = "dense.engine", "compressed.engine"
_NUM_PARITY_SAMPLES = 64
_NUM_HELD_OUT = 128  # samples beside those of `export.int8`, for its errors
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """The ONNX file that ships, or that the engine is built from."""

    file: ModelFile
    path: Path


class Stages:
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
            template = work / _TEMPLATE
            file = export_onnx(self.model, self.parity_batches, work / _DENSE, self.recipe.export, template=template)
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
            measured = measure_curves(
                self.model,
                structures,
                scores,
                moments,
                self.calib,
                self.recipe.search,
                channel_multiple=self.target.channel_multiple,
                notify=self.run.notify,
            )
            if not settings.prune_blocks or not structures.blocks:
                return measured
            ranking = rank_blocks(self.model, structures, moments, self.calib, Mpruner())
            return replace(measured, block_importance=ranking.importance)

        settings = self.recipe.search
        inputs = {
            "score": self.run.key("score"),
            "search": [settings.num_curve_samples, settings.num_levels, settings.prune_blocks],
            "block_importance": Mpruner(),
            "multiple": self.target.channel_multiple,
            "constraints": structures.constraints,
        }
        return self.run.remember("curves", inputs, compute, Curves)

    def candidates(self, dense: Measurement, shipping: PrecisionRow) -> Candidates:
        """Files of pruned networks in the precision that ships, which is that of the row, and their latency."""
        baseline = self.run.files("baseline")
        return Candidates(
            dense=self.model,
            dense_onnx=baseline / _DENSE,
            dense_opened=baseline / self.dense_opened(dense).path,
            template=baseline / _TEMPLATE,
            precision=shipping,
            calib=self.calib,
            target=self.target,
            builds_engines=self.builds,
            export=self.recipe.export,
        )

    def timed_networks(
        self, structures: Structures, scores: ScoreTable, curves: Curves, candidates: Candidates
    ) -> TimedNetworks:
        """Networks timed on the target, for a latency model to learn from."""

        def compute(work: Path) -> TimedNetworks:
            return time_networks(
                candidates,
                structures,
                allowed_widths(structures, curves),
                lambda chosen: self._plan(structures, scores, chosen),
                work,
                count=self.recipe.search.num_timed,
                seed=self.recipe.seed,
                notify=self.run.notify,
            )

        inputs = {
            "baseline": self.run.key("baseline"),
            "curves": self.run.key("curves"),
            "precision": candidates.precision.file,
            "count": self.recipe.search.num_timed,
            "device": self.device,
        }
        return self.run.remember("latency", inputs, compute, TimedNetworks)

    def search(
        self,
        structures: Structures,
        scores: ScoreTable,
        curves: Curves,
        dense: Measurement,
        limits: Mapping[str, Limit],
        shipping: PrecisionRow,
    ) -> SearchResult:
        candidates = self.candidates(dense, shipping)
        objectives = self.recipe.search.objectives
        is_timed = self.ability.verdict == "run" and ("latency_p50" in limits or "latency" in objectives)
        timed = self.timed_networks(structures, scores, curves, candidates) if is_timed else None
        inputs = {
            "curves": self.run.key("curves"),
            "baseline": self.run.key("baseline"),
            "latency": self.run.key("latency") if timed else "",
            "precision": shipping.file,
            "budget": self.target.budget,
            "search": self.recipe.search,
            "repair": self.recipe.repair,
            "device": self.device,
        }

        def compute(work: Path) -> SearchResult:
            reference = candidate_of(dense, self.dense_opened(dense), self._dense_accuracy(dense))
            tight = with_margin(limits)
            shipped_mib = (shipping.file.size_bytes if shipping.file else dense.file.size_bytes) / 2**20
            shares = bounded_shares(tight, reference, shipped_mib, is_timed=is_timed)
            proposer = Proposer(
                dense=self.model,
                inputs=self.inputs,
                structures=structures,
                scores=scores,
                curves=curves,
                channel_multiple=self.target.channel_multiple,
                shares=shares,
                reference=reference,
                sites=find_sites(self.model, structures, self.inputs),
                timed=timed.rows if timed else (),
                measure=lambda plan: candidates.ratio_of(plan, work),
            )
            reach = find_reach(proposer, shares)
            self.run.notify(Event(stage="search", message=reach_text(reach, shares)))
            judge = Judge(
                candidates=candidates,
                dense_p50_ms=reference.latency_p50_ms,
                calib=self.calib,
                parts=draw_parts(self.splits.val, self.recipe.seed),
                task=self.task,
                recipe=self.recipe,
                memory_limit_mib=memory_limit_mib(tight, reference, objectives),
                work=work,
            )
            found = search(
                proposer,
                judge,
                reference,
                tight,
                fill_range(shares, tight, objectives),
                self.recipe.search,
                storage=work / "study.db",
                origin={**self.origin, **inputs},
                seed=self.recipe.seed,
                notify=self.run.notify,
            )
            if is_timed and "latency_p50" in limits and reference.latency_p50_ms:
                limit = limits["latency_p50"].absolute(reference.latency_p50_ms) / reference.latency_p50_ms
                found = confirm(found, limit, lambda plan: candidates.ratio_anew(plan, work))
            return replace(found, reach=reach, latency_fit=proposer.latency_fit(found.trials))

        return self.run.remember("search", inputs, compute, SearchResult)

    def _plan(self, structures: Structures, scores: ScoreTable, chosen: Allocation) -> PruningPlan:
        return make_plan(structures, scores, chosen.widths, chosen.blocks, self.target.channel_multiple)

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

    def dense_precision(self, dense: Measurement) -> PrecisionChoice | None:
        """Which precision of the dense network ships, and so the one that candidates are timed in; None where the
        target takes fp32 only."""
        return self._precision("dense_precision", dense.file, self.run.files("baseline"))

    def precision(self, file: ModelFile) -> PrecisionChoice | None:
        """The same for the compressed network's file."""
        return self._precision("precision", file, self.run.files("export"))

    def _precision(self, stage: str, file: ModelFile, folder: Path) -> PrecisionChoice | None:
        if self.target.precisions == ("fp32",):
            return None

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
        return self.run.remember(stage, inputs, compute, PrecisionChoice)

    def shipped(self, file: ModelFile, stage: str, chosen: PrecisionChoice | None) -> Shipped:
        """file: in fp32, of the stage "baseline" or "export"; chosen: by the stage that converted it, if any did."""
        if chosen and chosen.chosen != "fp32":
            converted_by = "precision" if stage == "export" else "dense_precision"
            return Shipped(file=chosen.file, path=self.run.files(converted_by) / chosen.file.path)
        return Shipped(file=file, path=self.run.files(stage) / file.path)

    def dense_opened(self, dense: Measurement) -> ModelFile:
        """What the device opens of the dense network: the ONNX file, or an engine."""
        if not self.builds:
            return dense.file
        return as_model_file(dense.file, load_record(self.run.files("baseline") / _DENSE_ENGINE))

    @property
    def engine_file(self) -> Path:
        """The engine that ships."""
        if "engine" in self.run.stages:
            return self.run.files("engine") / _ENGINE
        return self.run.files("baseline") / _DENSE_ENGINE

    def engine(self, shipped: Shipped) -> EngineFile | None:
        """None where the target takes none, or where this machine cannot build it."""
        if not self.builds:
            return None
        if shipped.path == self.run.files("baseline") / _DENSE:
            return load_record(self.engine_file)
        inputs = {"onnx": shipped.file.sha256, "device": self.device, "packages": self.origin["packages"]}
        return self.run.remember(
            "engine", inputs, lambda work: build_engine(shipped.path, self.target, work), EngineFile
        )

    def benchmark(
        self, dense: Measurement, shipped: Shipped, engine: EngineFile | None, counts: tuple[int, int], stand_in: str
    ) -> BenchmarkReport:
        """Both files in one process, on the test split; engines where they are what the device runs."""
        dense_file = _placed(self.dense_opened(dense), self.run.stages["baseline"])
        compressed = dense_file
        if shipped.path != self.run.files("baseline") / _DENSE:
            compressed = _placed(shipped.file, shipped.path.parent.name)
        if engine and "engine" in self.run.stages:
            compressed = _placed(as_model_file(shipped.file, engine), self.run.stages["engine"])

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

    def golden(self, shipped: Shipped) -> Golden:
        """The ONNX file that ships, with samples that it can be checked by: a folder for `deploypipe verify`."""

        def compute(work: Path) -> Golden:
            place_file(shipped.path, work / MODEL)
            for entry in shipped.file.data:
                place_file(shipped.path.with_name(entry.name), work / entry.name)
            return write_golden(work, {MODEL: shipped.file}, self.parity_batches)

        inputs = {"file": shipped.file.sha256, "data": self.origin["data"], "packages": self.origin["packages"]}
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
