"""What a run is about: the same for all of its stages."""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deploypipe.benchmark.environment import describe_environment
from deploypipe.distillation_loss import with_distillation_loss, with_outputs_class
from deploypipe.export.onnx_export.input_sizes import Extremes, other_sizes
from deploypipe.export.tensorrt_engine.build_engine import is_built
from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import digest
from deploypipe.installed_packages import find_package, package_versions
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.tracing.structures import model_fingerprint
from deploypipe.recipe import Recipe
from deploypipe.records import Event, Origin
from deploypipe.runs.store import RunFolder
from deploypipe.runtimes.device_ability import can
from deploypipe.runtimes.this_machine import this_machine
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.target import Target
from deploypipe.task import Splits, Task, first_of, forward, take, take_calib
from deploypipe.tensor_batches import fingerprints
from deploypipe.training.ranks import ALONE, Ranks
from deploypipe.training.training_precision import with_precision

PACKAGES = ("torch", "optuna", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy")
_NUM_PARITY_SAMPLES = 64
_DATA = "data.hashes"  # in the run folder: a hash of each split


class Job:
    """One run's inputs, and what they come to. `calib` holds the samples of observation and repair."""

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
        self.model, self.splits = copied(model).cpu().eval(), splits
        self.task = _with_distillation_loss(task, self.model, splits)
        self.recipe = replace(recipe, finetune=with_precision(recipe.finetune))  # so keys hold it
        self.target, self.run = target, run
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
        extremes = Extremes()
        self.fingerprint = model_fingerprint(model)
        self.origin: dict[str, Any] = {
            "model": self.fingerprint,
            "data": self._data(extremes),
            "source": source,
            "packages": package_versions(*PACKAGES),
            "seed": recipe.seed,
        }

        # The network must work at these sizes too, whatever is removed from it, and the exported file as well.
        self.other_inputs = other_sizes(self.model, self.inputs, extremes.inputs(), recipe.export, target.dynamic_dims)

    def _data(self, extremes: Extremes) -> str:
        """A hash of the splits. Says which of them are others than those of the folder's last run."""
        found = fingerprints(self.splits, see=extremes.see)
        path = self.run.path / _DATA
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        changed = [name for name in found if isinstance(before, dict) and before.get(name, found[name]) != found[name]]
        if changed:
            told = f"the data of {' and '.join(changed)} changed since the last run in this folder"
            self.run.notify(Event(stage="check", message=f"NOTE: {told}: what depends on it is computed again"))
        write_atomically(path, (json.dumps(found, sort_keys=True) + "\n").encode())
        return digest(found)

    def described_origin(self) -> Origin:
        packages = {**self.origin["packages"], "deploypipe": find_package("deploypipe").version}
        return Origin(
            model=self.fingerprint, data=self.origin["data"], source=digest(self.origin["source"]), packages=packages
        )

    def about(self) -> dict[str, str]:
        """What all workers of a search have to have the same, by name."""
        return {
            "deploypipe": find_package("deploypipe").version,
            **self.origin["packages"],
            "model": self.fingerprint,
            "data": self.origin["data"],
            "source": digest(self.origin["source"]),
            "device": digest(self.device),
            "seed": str(self.recipe.seed),
        }


def _with_distillation_loss(task: Task, model: nn.Module, splits: Splits) -> Task:
    inputs, target = first_of(splits.val, "val")
    with torch.no_grad():
        outputs = forward(model, inputs)
    return with_outputs_class(with_distillation_loss(task, outputs, target), outputs)
