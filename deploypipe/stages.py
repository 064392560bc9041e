"""The stages of a run, one method each: what it depends on, and so the key it is remembered by, and what it does."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from deploypipe.recipe import Finetune, Magnitude, Mpruner, Recipe
from deploypipe.records import (
    BenchmarkReport,
    Curves,
    EngineFile,
    Event,
    Golden,
    Measurement,
    ModelFile,
    Observation,
    Origin,
    PrecisionChoice,
    PrecisionRow,
    Progress,
    PruneOutcome,
    PruningPlan,
    RepairReport,
    ResolvedConstraints,
    ScoreTable,
    SearchResult,
    Structures,
    TimedNetworks,
    TrainLog,
    Trial,
    silent,
)
from deploypipe.runs import RunFolder, digest, place_file
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.ability import can
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.machine import this_machine
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search.accuracies import Accuracies
from deploypipe.search.allocate import Allocation, allowed_widths
from deploypipe.search.basis import Basis, Tools
from deploypipe.search.candidates import Candidates
from deploypipe.search.curves import measure_curves
from deploypipe.search.duration import duration_text, predict_seconds
from deploypipe.search.finalists import confirm, with_finalists, with_tuned
from deploypipe.search.judge import Judge
from deploypipe.search.limits import (
    bounded_shares,
    candidate_of,
    fill_range,
    memory_limit_mib,
    share_to_confirm,
    with_margin,
)
from deploypipe.search.looks import draw_parts
from deploypipe.search.measuring import OwnMeasuring, SharedMeasuring
from deploypipe.search.propose import Proposer
from deploypipe.search.reach import find_reach, reach_text
from deploypipe.search.sites import find_sites
from deploypipe.search.storage import Storage
from deploypipe.search.study import rules, search
from deploypipe.search.timing import time_networks
from deploypipe.search.trials import History, judge_plan, violations
from deploypipe.target import Limit, Target
from deploypipe.task import Splits, Task, num_samples, take, take_calib
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.training.together import finetune_together

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
        self,
        model: nn.Module,
        splits: Splits,
        task: Task,
        recipe: Recipe,
        target: Target,
        run: RunFolder,
        source: str,
        storage: Storage | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.splits, self.task = copy.deepcopy(model).cpu().eval(), splits, task
        self.recipe, self.target, self.run = recipe, target, run
        self.storage, self.ranks = storage, ranks
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
        self.origin: dict[str, Any] = {
            "model": self.fingerprint,
            "data": fingerprint(splits),
            "source": source,
            "packages": {package: version(package) for package in PACKAGES},
            "seed": recipe.seed,
        }

    def described_origin(self) -> Origin:
        packages = {**self.origin["packages"], "deploypipe": version("deploypipe")}
        return Origin(
            model=self.fingerprint, data=self.origin["data"], source=digest(self.origin["source"]), packages=packages
        )

    def dense_export(self) -> ModelFile:
        """The dense network's ONNX file, and beside it the template that candidates are cut out of."""

        def compute(work: Path) -> ModelFile:
            template = work / _TEMPLATE
            return export_onnx(self.model, self.parity_batches, work / _DENSE, self.recipe.export, template=template)

        inputs = {**self.origin, "export": self.recipe.export}
        return self.run.remember("dense_export", inputs, compute, ModelFile, is_shared=True)

    def baseline(self, file: ModelFile) -> Measurement:
        """The dense network's file, measured by the method used at the end."""

        def compute(work: Path) -> Measurement:
            for path in self.run.files("dense_export").iterdir():
                place_file(path, work / path.name)
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

        inputs = {**self.origin, "device": self.device, "file": file.sha256}
        return self.run.remember("baseline", inputs, compute, Measurement)

    def structures(self) -> Structures:
        keep, constraints = self.recipe.keep, self.recipe.constraints
        return self.run.remember(
            "structures",
            {**self.origin, "keep": keep, "constraints": constraints},
            lambda _: list_structures(self.model, self.inputs, keep, constraints),
            Structures,
            is_shared=True,
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
        self.run.remember("observe", inputs, compute, Observation, is_shared=True)
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
            is_shared=True,
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
        return self.run.remember("curves", inputs, compute, Curves, is_shared=True)

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
            measuring=SharedMeasuring(self.storage, digest(self.device)) if self.storage else OwnMeasuring(),
        )

    def timed_networks(
        self,
        structures: Structures,
        scores: ScoreTable,
        curves: Curves,
        candidates: Candidates,
        limits: Mapping[str, Limit],
    ) -> TimedNetworks | None:
        """Networks timed on the target, for a latency model to learn from; None where nothing asks for latency, or it
        cannot be taken here."""
        is_asked_for = "latency_p50" in limits or "latency" in self.recipe.search.objectives
        if self.ability.verdict != "run" or not is_asked_for:
            return None

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

    def search(self, basis: Basis) -> SearchResult:
        """The trials and their winner; with a shared storage, this process is one of those at work on them."""
        inputs = self._search_inputs(basis)

        def compute(work: Path) -> SearchResult:
            tools = self._tools(basis, work)
            reach, typical = find_reach(tools.proposer, tools.shares)
            num_trials = self.recipe.search.num_trials
            lasting = duration_text(predict_seconds(tools.judge, typical, num_trials), num_trials)
            self._note(f"{reach_text(reach, tools.shares)}; {lasting}")
            if self.storage:
                self._invite_workers(self.storage)
            found = self._run_trials(tools, inputs, self.storage or self._own_storage(inputs))
            return replace(found, reach=reach, latency_fit=tools.proposer.latency_fit(found.trials))

        return self.run.remember("search", inputs, compute, SearchResult)

    def confirm(self, basis: Basis, found: SearchResult, part: float = 1.0) -> SearchResult:
        """The best trials that are within `part` of the latency limit when they are timed once more."""
        wanted = self.recipe.search.num_finalists
        if not basis.timed or "latency_p50" not in basis.limits:
            return with_finalists(found, wanted)

        def compute(work: Path) -> SearchResult:
            tools = self._tools(basis, work)

            def narrow(trial: Trial, number: int, share: float) -> Trial:
                shares = {**tools.shares, "latency_p50": share / trial.knobs["fill"]}
                plan = replace(tools.proposer, shares=shares)(trial.knobs, found.trials)
                excess_of = partial(violations, dense=tools.reference, limits=tools.limits)
                history = History(trials=[], results={})
                objectives = self.recipe.search.objectives
                return judge_plan(number, trial.knobs, plan, tools.judge, excess_of, objectives, history)[0]

            limit = part * share_to_confirm(basis.limits, found.dense)
            return confirm(found, limit, lambda plan: basis.candidates.ratio_anew(plan, work), narrow, wanted)

        inputs = {"search": self.run.key("search"), "part": part}
        return self.run.remember("confirm", inputs, compute, SearchResult)

    def help_search(self, basis: Basis, storage: Storage) -> SearchResult:
        """Do trials of the search that another process began, until all of them are done."""
        with TemporaryDirectory(dir=self.run.path) as work:
            tools = self._tools(basis, Path(work))
            return self._run_trials(tools, self._search_inputs(basis), storage)

    def about(self) -> dict[str, str]:
        """What all workers of a search have to have the same, by name."""
        return {
            "deploypipe": version("deploypipe"),
            **self.origin["packages"],
            "model": self.fingerprint,
            "data": self.origin["data"],
            "source": digest(self.origin["source"]),
            "device": digest(self.device),
            "seed": str(self.recipe.seed),
        }

    def _search_inputs(self, basis: Basis) -> dict[str, object]:
        return {
            "curves": self.run.key("curves"),
            "baseline": self.run.key("baseline"),
            "latency": self.run.key("latency") if basis.timed else "",
            "precision": basis.shipping.file,
            "budget": self.target.budget,
            "search": self.recipe.search,
            "repair": self.recipe.repair,
            "device": self.device,
        }

    def _tools(self, basis: Basis, work: Path) -> Tools:
        dense, shipping, structures = basis.dense, basis.shipping, basis.structures
        reference = candidate_of(dense, self.dense_opened(dense), self._dense_accuracy(dense))
        tight = with_margin(basis.limits)
        shipped_mib = (shipping.file.size_bytes if shipping.file else dense.file.size_bytes) / 2**20
        shares = bounded_shares(tight, reference, shipped_mib, is_timed=basis.timed is not None)
        proposer = Proposer(
            dense=self.model,
            inputs=self.inputs,
            structures=structures,
            scores=basis.scores,
            magnitudes=score_magnitudes(self.model, structures),
            curves=basis.curves,
            channel_multiple=self.target.channel_multiple,
            shares=shares,
            reference=reference,
            sites=find_sites(self.model, structures, self.inputs),
            timed=basis.timed.rows if basis.timed else (),
            measure=lambda plan: basis.candidates.ratio_of(plan, work),
        )
        judge = Judge(
            candidates=basis.candidates,
            dense_p50_ms=reference.latency_p50_ms,
            calib=self.calib,
            parts=draw_parts(self.splits.val, self.recipe.seed),
            task=self.task,
            recipe=self.recipe,
            memory_limit_mib=memory_limit_mib(tight, reference, self.recipe.search.objectives),
            work=work,
            accuracies=self._accuracies(),
        )
        return Tools(
            reference=reference,
            limits=tight,
            shares=shares,
            proposer=proposer,
            judge=judge,
        )

    def _accuracies(self) -> Accuracies:
        """Of the repaired networks that this search, or one for another target or budget, has judged."""
        settings = {"repair": self.recipe.repair, "num_samples": self.recipe.search.num_repair_samples}
        key = digest([self.origin, self.run.key("observe"), settings])
        return Accuracies((self.run.shared or self.run.path) / f"accuracies-{key}")

    def _run_trials(self, tools: Tools, inputs: Mapping[str, object], storage: Storage) -> SearchResult:
        settings = self.recipe.search
        return search(
            tools.proposer,
            tools.judge,
            tools.reference,
            tools.limits,
            fill_range(tools.shares, tools.limits, settings.objectives),
            settings,
            magnitude=(0.0, 0.0) if isinstance(self.recipe.score, Magnitude) else (0.0, 1.0),
            storage=storage,
            origin={**self.about(), **{name: value for name, value in inputs.items() if name != "device"}},
            seed=self.recipe.seed,
            notify=self.run.notify,
        )

    def _own_storage(self, inputs: Mapping[str, object]) -> Storage:
        """Beside the stages: a search for more trials goes on with those there are."""
        key = digest([self.about(), {**inputs, "search": rules(self.recipe.search)}])
        return Storage.own(self.run.path / f"study-{key}.db")

    def _invite_workers(self, storage: Storage) -> None:
        self.run.publish(storage.stages)
        at_once = self.recipe.search.num_parallel
        self._note(
            f"{at_once} {'workers find' if at_once > 1 else 'worker finds'} work at a time (search.num_parallel); to "
            f"start one: deploypipe worker --storage {storage.shown} --run {storage.study}"
        )

    def _note(self, text: str) -> None:
        self.run.notify(Event(stage="search", message=f"NOTE: {text}"))

    def _plan(self, structures: Structures, scores: ScoreTable, chosen: Allocation) -> PruningPlan:
        return make_plan(structures, scores, chosen.widths, chosen.blocks, self.target.channel_multiple)

    def finalists(self, found: SearchResult) -> SearchResult:
        """The winner by what a short training makes of the best trials."""
        if len(found.finalists) < 2 or self.recipe.finetune.num_epochs == 0:
            return found
        return with_tuned(found, {str(number): self._finalist(found, number) for number in found.finalists})

    def _finalist(self, found: SearchResult, number: int) -> float:
        """The accuracy on val that a short training brings a trial to."""
        plan = found.trials[number].plan
        short = replace(self.recipe.finetune, num_epochs=self.recipe.search.finalist_epochs)
        told = f"trial {number}, {found.finalists.index(number) + 1} of {len(found.finalists)}"

        def compute(work: Path) -> TrainLog:
            repaired, _ = self._repaired(plan, silent)
            checkpoint = work / "checkpoints"
            checkpoint.mkdir(exist_ok=True)

            def notify(event: Event) -> None:
                self.run.notify(replace(event, stage="finalist", message=told))

            _, log = self._tuned(plan, repaired, short, checkpoint, notify)
            shutil.rmtree(checkpoint)
            return log

        inputs = {
            **self.origin,
            "plan": plan,
            "calib": self.run.key("observe"),
            "finetune": short,
            "repair": self.recipe.repair,
        }
        log = self.run.remember("finalist", inputs, compute, TrainLog, is_shared=True)
        return log.epochs[log.chosen_epoch].val_accuracy

    def prune(self, plan: PruningPlan) -> PruneOutcome:
        def compute(work: Path) -> PruneOutcome:
            report = describe(self.model, apply_plan(self.model, plan), plan, self.inputs)
            repaired, repairs = self._repaired(plan, lambda event: self.run.notify(replace(event, stage="prune")))
            save_file(own_weights(repaired), work / "weights.safetensors")
            return PruneOutcome(prune=report, repair=repairs)

        inputs = {**self.origin, "plan": plan, "calib": self.run.key("observe"), "repair": self.recipe.repair}
        return self.run.remember("prune", inputs, compute, PruneOutcome, is_shared=True)

    def _repaired(self, plan: PruningPlan, notify: Progress) -> tuple[nn.Module, RepairReport]:
        pruned, real_tokens = apply_plan(self.model, plan), self.task.real_tokens
        settings, seed = self.recipe.repair, self.recipe.seed
        return repair(self.model, pruned, plan, self.calib, settings, real_tokens=real_tokens, seed=seed, notify=notify)

    def finetune(self, plan: PruningPlan) -> TrainLog:
        def compute(work: Path) -> TrainLog:
            checkpoints = work / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            repaired = self.restored(plan, "prune")
            tuned, log = self._tuned(plan, repaired, self.recipe.finetune, checkpoints, self.run.notify)
            save_pruned(tuned, plan, self.inputs, work)
            shutil.rmtree(checkpoints)
            return log

        inputs = {"prune": self.run.key("prune"), "finetune": self.recipe.finetune}
        return self.run.remember("finetune", inputs, compute, TrainLog, is_shared=True)

    def _tuned(
        self, plan: PruningPlan, repaired: nn.Module, settings: Finetune, checkpoint: Path, notify: Progress
    ) -> tuple[nn.Module, TrainLog]:
        with one_thread_if_small(self._batch_macs()):
            return finetune_together(
                repaired,
                plan,
                self.model,
                self.splits,
                self.task,
                settings,
                checkpoint=checkpoint,
                seed=self.recipe.seed,
                notify=notify,
                ranks=self.ranks,
            )

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
        dense_file = _placed(self.dense_opened(dense), self.run.files("baseline").name)
        compressed = dense_file
        if shipped.path != self.run.files("baseline") / _DENSE:
            compressed = _placed(shipped.file, shipped.path.parent.name)
        if engine and "engine" in self.run.stages:
            compressed = _placed(as_model_file(shipped.file, engine), self.run.files("engine").name)

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
