"""The context that all stages of one run share: the network, the data, the settings, the device and the run folder."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploypipe.benchmark.environment import describe_environment
from deploypipe.compute_device import CPU, ComputeDevice, device_for
from deploypipe.distillation_loss import with_distillation_loss, with_outputs_class
from deploypipe.export.onnx_export.input_sizes import Extremes, UsualInputs, other_sizes, usual_inputs
from deploypipe.export.tensorrt_engine.build_engine import is_built
from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import digest
from deploypipe.installed_packages import find_package, package_versions
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.networks.model_copies import copied
from deploypipe.preflight.memory_plan import excess_text, memory_text, plan_memory
from deploypipe.recipe import Recipe
from deploypipe.records import MemoryPlan, Note, Origin, Warned, reported
from deploypipe.runs.store import DATA_HASHES, RunFolder
from deploypipe.runtimes.ability_for_target import Ability, can
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.scoring import needs_derivatives
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.split_fingerprints import fingerprints
from deploypipe.target import Target
from deploypipe.task import Batch, Splits, Task, first_of, forward, take, take_calib
from deploypipe.training.optimizers import choice_text, with_optimizer
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.training.training_precision import with_precision

PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_NUM_PARITY_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)  # no slots, because `memory` is kept
class RunContext:
    """The inputs and settings that all stages of one run share. `prepare_run` makes it."""

    model: nn.Module  # a copy of the user's, on the CPU, in eval mode
    splits: Splits
    task: Task
    recipe: Recipe
    target: Target
    run: RunFolder
    storage: Storage | None  # where other processes may do trials of the search
    ranks: Ranks
    ability: Ability  # what this machine can do for the target
    compute: ComputeDevice  # where networks are observed, repaired, judged and trained
    builds: bool  # the target runs engines, and this machine can build them
    calib: list[Batch]  # the samples of observation and repair
    parity_batches: list[Batch]  # the samples that exported files are compared on
    inputs: Any  # two samples
    other_inputs: tuple[Any, ...]  # the network and its file must work at these sizes too, whatever is removed
    usual: UsualInputs | None  # what files are timed on, if they have dynamic axes
    device: dict[str, Any]  # stages that measure depend on it
    origin: dict[str, Any]  # every stage depends on it: network, data, code, packages and seed

    @cached_property
    def memory(self) -> MemoryPlan:
        """How observing and repair fit into the recipe's memory. Planned when a stage first asks for it.

        Remembered: a run that is resumed while less is free must not make another network.
        """
        inputs = {
            **self.origin,
            "observe": self.recipe.observe,
            "repair": self.recipe.repair,
            "trials": self.recipe.search.num_repair_samples,
            "derivatives": needs_derivatives(self.recipe.score),
            "memory": self.recipe.memory,
            "computed on": self.compute.device.type,
        }

        def compute(_: Path) -> MemoryPlan:
            plan = plan_memory(self.model, self.calib, self.task, self.recipe, self.compute.device)
            self.run.notify(Note(stage="memory", text=memory_text(plan)))
            if problem := excess_text(plan):
                self.run.notify(Warned(stage="memory", text=problem))
            return plan

        return self.run.remember("memory", inputs, compute, MemoryPlan, is_shared=True).record

    def timed_on(self, split: Iterable[Batch]) -> Iterable[Batch]:
        """The inputs that files are timed on: a split's first batch, or one usual size for all measurements."""
        return split if self.usual is None else [(self.usual.inputs, None)]

    def described_origin(self) -> Origin:
        """The origin as the result states it."""
        packages = {**self.origin["packages"], "deploypipe": find_package("deploypipe").version}
        return Origin(
            model=self.origin["model"],
            data=self.origin["data"],
            source=digest(self.origin["source"]),
            packages=packages,
            computed_on=self.compute.text,
        )

    def result_settings(self) -> Recipe:
        """The recipe without where it is computed and in how much memory: no key holds the device, and the keys of
        repaired networks hold only what the memory changed.

        A GPU's results differ from the CPU's by rounding, as those of two processors do, and no key holds these.
        So a run goes on when it is moved, and only measurements are taken again.
        """
        return replace(self.recipe, device="auto", memory="auto")

    def identity(self) -> dict[str, str]:
        """The facts that must be equal in all workers of a search, by name."""
        return {
            "deploypipe": find_package("deploypipe").version,
            **self.origin["packages"],
            "model": self.origin["model"],
            "data": self.origin["data"],
            "source": digest(self.origin["source"]),
            "device": digest(self.device),
            "seed": str(self.recipe.seed),
            "computed on": self.compute.device.type,  # trials that differ by rounding would not be comparable
        }


def prepare_run(
    model: nn.Module,
    splits: Splits,
    task: Task,
    recipe: Recipe,
    target: Target,
    run: RunFolder,
    *,
    source: str = "",
    storage: Storage | None = None,
    ranks: Ranks = ALONE,
) -> RunContext:
    """Copy the network, hash network and data, and find out what this machine can do for the target.

    Warns where nothing can be measured here, and notes which splits changed since the last run in this folder.
    """
    dense = copied(model).cpu().eval()
    ability = can(target)
    if ability.verdict != "run":
        problem = f"nothing can be measured for {target.name or target.runtime} here, so the run will end in HOLD"
        run.notify(Warned(stage="check", text=f"{problem}: {ability.reason}"))
    calib = take_calib(splits.calib, max(recipe.observe.num_samples, recipe.repair.num_samples))
    inputs, extremes = take(calib[0][0], 2), Extremes()
    with reported(run.notify, "fingerprints"):
        origin: dict[str, Any] = {
            "model": model_fingerprint(model),
            "data": _hash_data(splits, run, extremes),
            "source": source,
            "packages": package_versions(*PACKAGES),
            "seed": recipe.seed,
            **({"fast_dev_run": True} if recipe.fast_dev_run else {}),  # no real run finds its results
        }
    compute, problem = device_for(dense, inputs, recipe.device)
    if problem:
        run.notify(Warned(stage="check", text=problem))
    if compute.device != CPU:
        run.notify(Note(stage="check", text=f"networks are computed on {compute.text}"))
    finetune = with_optimizer(with_precision(recipe.finetune, compute.accelerator), dense, task)
    if finetune.num_epochs and (chosen := choice_text(recipe.finetune, dense, task)):
        run.notify(Note(stage="check", text=chosen))
    return RunContext(
        model=dense,
        splits=splits,
        task=_with_distillation_loss(task, dense, splits),
        recipe=replace(recipe, finetune=finetune),  # so keys hold what "auto" stands for
        target=target,
        run=run,
        storage=storage,
        ranks=ranks,
        ability=ability,
        compute=compute,
        builds=is_built(target) and ability.verdict != "export only",
        calib=calib,
        parity_batches=take_calib(calib, _NUM_PARITY_SAMPLES),
        inputs=inputs,
        other_inputs=other_sizes(dense, inputs, extremes.inputs(), recipe.export, target.dynamic_dims),
        usual=usual_inputs(dense, calib[0][0], extremes.inputs(), recipe.export, target.dynamic_dims),
        device=_describe_device(target, ability),
        origin=origin,
    )


def _describe_device(target: Target, ability: Ability) -> dict[str, Any]:
    """The properties of target and machine that a measurement depends on, besides the file."""
    return {
        "fingerprint": describe_environment(target.num_threads).device_fingerprint,
        "gpu": this_machine().gpus,
        "driver": this_machine().driver,
        "ability": ability.verdict,
        "runtime": [target.runtime, target.provider, target.provider_options, target.allow_cpu_fallback],
        "engine": [target.batches, target.dynamic_dims, target.workspace, target.compute_capabilities],
        "batch": target.batch_size,
        "cuda_graph": target.cuda_graph,
        "threads": target.num_threads,
        "samples": target.num_latency_samples,
    }


def _hash_data(splits: Splits, run: RunFolder, extremes: Extremes) -> str:
    """A hash of the splits. Notes which of them changed since the last run in this folder."""
    found = fingerprints(splits, see=extremes.see)
    path = run.path / DATA_HASHES
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    changed = [name for name in found if isinstance(before, dict) and before.get(name, found[name]) != found[name]]
    if changed:
        change = f"the data of {' and '.join(changed)} changed since the last run in this folder"
        run.notify(Note(stage="check", text=f"{change}: what depends on it is computed again"))
    write_atomically(path, (json.dumps(found, sort_keys=True) + "\n").encode())
    return digest(found)


def _with_distillation_loss(task: Task, model: nn.Module, splits: Splits) -> Task:
    inputs, target = first_of(splits.val, "val")
    with torch.no_grad():
        outputs = forward(model, inputs)
    return with_outputs_class(with_distillation_loss(task, outputs, target), outputs)
