"""The stages of a run, one method each: what it depends on, and so the key it is remembered by, and what it does."""

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
from deploypipe.recipe import Recipe
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
    PruneOutcome,
    PruningPlan,
    ResolvedConstraints,
    ScoreTable,
    SearchResult,
    Structures,
    TrainLog,
)
from deploypipe.runs import RunFolder, digest, file_sha256, place_file
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.ability import can
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.machine import this_machine
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.search.allocate import Allocation, allocate_to, uniform
from deploypipe.search.curves import measure_curves
from deploypipe.search.judge import Judge
from deploypipe.search.limits import candidate_of, macs_bounds, with_margin
from deploypipe.search.looks import draw_parts
from deploypipe.search.study import search
from deploypipe.target import Limit, Target
from deploypipe.task import Splits, Task, num_samples, take, take_calib
from deploypipe.training.finetune import finetune

MODEL = "model.onnx"
PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_DENSE, _COMPRESSED = "dense.onnx", "compressed.onnx"
_DENSE_ENGINE, _ENGINE = "dense.engine", "compressed.engine"
_NUM_PARITY_SAMPLES = 64
_NUM_HELD_OUT = 128  # samples beside those of `export.int8`, for its errors
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples


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

        inputs = {
            "curves": self.run.key("curves"),
            "baseline": self.run.key("baseline"),
            "budget": self.target.budget,
            "search": self.recipe.search,
            "repair": self.recipe.repair,
            "device": self.device,
        }

        def compute(work: Path) -> SearchResult:
            reference = candidate_of(dense, self.dense_opened(dense), self._dense_accuracy(dense))
            judge = Judge(
                dense=self.model,
                dense_onnx=self.run.files("baseline") / _DENSE,
                dense_file=self.run.files("baseline") / self.dense_opened(dense).path,
                dense_p50_ms=reference.latency_p50_ms,
                builds_engines=self.builds,
                calib=self.calib,
                parts=draw_parts(self.splits.val, self.recipe.seed),
                task=self.task,
                recipe=self.recipe,
                target=self.target,
                work=work,
            )
            return search(
                propose,
                judge,
                reference,
                with_margin(limits),
                macs_bounds(structures, curves, limits),
                self.recipe.search,
                storage=work / "study.db",
                origin={**self.origin, **inputs},
                seed=self.recipe.seed,
                notify=self.run.notify,
            )

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
