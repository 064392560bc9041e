"""Check model, data, task, recipe and target before a run: report all problems at once, write nothing."""

import time

import torch
from torch import Tensor, nn

from deploypipe.checked_splits import CheckedSplit, wrap_splits
from deploypipe.compute_device import find_device
from deploypipe.distillation_loss import with_outputs_class
from deploypipe.errors import ConfigError, DeploypipeError, ModelError, RuntimeUnavailableError
from deploypipe.export.onnx_export.export_onnx import require_fp32
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.preflight.findings import CheckReport, Findings, Tried
from deploypipe.preflight.memory_plan import excess_text, memory_text, plan_memory
from deploypipe.preflight.split_checks import (
    Survey,
    differs_from_calib,
    remarks,
    survey,
    too_few_samples,
    unlike_the_file,
)
from deploypipe.preflight.trial_passes import (
    NUM_TRAINED,
    Samples,
    run_network,
    try_export,
    try_extremes,
    try_inference,
    try_training,
)
from deploypipe.provider_options import require_harmless_options
from deploypipe.pruning.tracing.structures import require_trainable
from deploypipe.recipe import Recipe
from deploypipe.runtimes.ability_for_target import can
from deploypipe.scoring import needs_derivatives
from deploypipe.target import Target
from deploypipe.task import Splits, Task, take_batch
from deploypipe.training.train_step import mixing_note
from deploypipe.training.trial_step import has_own_training, try_own_training
from deploypipe.user_code_errors import wrap_forward_errors, wrap_task

__all__ = ["CheckReport", "Tried", "check", "check_inputs"]

_SECONDS = 3.0  # of reading each split, twice
_SECONDS_OF_A_RUN = 1.0


@wrap_forward_errors()
def check(model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target) -> CheckReport:
    """Try all that a run for `target` needs, on one batch of each split, and list everything that is wrong.

    Tried: the forward pass, loss and backward pass (on a copy), metric, slices, distillation loss, real tokens, the
    export with its parity, and one run on the runtime. Within a few seconds a split: sizes, labels, NaN and the order
    of batches. Nothing is written, and `model` does not change.
    """
    model, findings = unwrapped(model), Findings()
    try:
        splits, task = wrap_splits(splits), wrap_task(task)
    except DeploypipeError as error:
        findings.add(error)
        return findings.report()
    surveys = _examine(findings, model, splits, task, recipe, target, _SECONDS)
    if not findings.errors:
        calib, val = surveys["calib"].first, surveys["val"].first
        outputs = run_network(model, take_batch(val, 2)[0], val[0], "val")
        batch, shapes = take_batch(calib, 8), [s for name in ("calib", "val") for s in surveys[name].shapes.inputs()]
        _try_memory(findings, model, surveys["calib"], task, recipe)
        try_export(
            findings,
            model,
            with_outputs_class(task, outputs),
            recipe,
            target,
            Samples(calib=batch, val=val, shapes=(val[0], *shapes)),
        )
    return findings.report()


def check_inputs(
    model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target, notes: list[str] | None = None
) -> None:
    """`check` without the export, which a run does soon anyway: raise one DeploypipeError that lists all problems."""
    findings = Findings()
    _examine(findings, model, splits, task, recipe, target, _SECONDS_OF_A_RUN)
    findings.raise_all()
    if notes is not None:
        notes += findings.notes


def _examine(
    findings: Findings, model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target, seconds: float
) -> dict[str, Survey]:
    with findings.trying("target", target.name or target.runtime):
        _check_target(target)
    _check_device(findings, recipe)
    with findings.trying("weights", f"{sum(p.numel() for p in model.parameters()):,} parameters"):
        _check_weights(model)
    if any(isinstance(error, ModelError) for error in findings.errors):
        return {}
    surveys: dict[str, Survey] = {}
    for name in ("calib", "val", "test", *(["train"] if recipe.finetune.num_epochs else [])):
        found = _survey(findings, getattr(splits, name), name, seconds)
        if found is None:
            continue
        surveys[name] = found
        findings.notes += remarks(found, name)
        try_inference(findings, model, task, name, found)
        is_fine = findings.went_well(f"{name}: forward")
        if is_fine and (name == "train" or (name == "calib" and needs_derivatives(recipe.score))):
            try_training(findings, model, task, name, found)
            is_fine = findings.went_well(f"{name}: loss and backward")
        if name == "train" and (note := mixing_note(found.first[0], task, recipe.finetune)):
            findings.notes.append(note)
        if is_fine and name == "train" and has_own_training(task):
            with findings.trying("train: the task's own training functions"):
                batch, length = take_batch(found.first, NUM_TRAINED), found.num_batches
                findings.notes += try_own_training(model, task, recipe.finetune, batch, length)
        if is_fine:
            try_extremes(findings, model, task, name, found, seconds)
        if is_fine and name in ("val", "test") and "calib" in surveys:
            findings.add_if(differs_from_calib(surveys["calib"], found, name))
    if not findings.errors:
        with findings.trying("test: sizes"):
            findings.add_if(unlike_the_file(model, surveys, recipe.export))
    return surveys


def _survey(findings: Findings, split: CheckedSplit, name: str, seconds: float) -> Survey | None:
    found: Survey | None = None
    what = f"{name}: read twice" if name != "train" else "train: read"
    with findings.trying(what):
        found = survey(split, seconds)
        if name != "train":
            findings.add_if(too_few_samples(found, name))
    if found and findings.went_well(what):
        last = findings.tried.pop()
        findings.tried.append(Tried(what=last.what, detail=str(found), seconds=last.seconds))
    return found


def _try_memory(findings: Findings, model: nn.Module, calib: Survey, task: Task, recipe: Recipe) -> None:
    """Say what observing and repair will take, if calib is as large as it seems."""
    begun = time.perf_counter()
    count = calib.num_samples or max(recipe.observe.num_samples, recipe.repair.num_samples)
    plan = plan_memory(model, [calib.first], task, recipe, find_device(recipe.device).device, count=count)
    seconds = time.perf_counter() - begun
    findings.tried.append(Tried(what="memory", detail=memory_text(plan), seconds=seconds))
    if problem := excess_text(plan):
        findings.notes.append(problem)


def _check_weights(model: nn.Module) -> None:
    require_trainable(model)
    require_fp32(model)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"weight {name!r} holds NaN or infinity; load or train the network again")


def _check_device(findings: Findings, recipe: Recipe) -> None:
    try:
        found = find_device(recipe.device)
    except ConfigError as error:
        findings.add(error)
        return
    findings.tried.append(Tried(what="computed on", detail=found.text, seconds=0.0))


def _check_target(target: Target) -> None:
    """Raise if the runtime is missing on the device itself. Any other machine can still export for the device."""
    require_harmless_options(target)
    ability = can(target)
    source = f"target {target.name!r}" if target.name else "target"
    if ability.is_the_device and ability.verdict != "run":
        raise RuntimeUnavailableError(f"{source}: runtime {target.runtime!r}: {ability.reason}")
    if target.runtime == "eager":
        raise ConfigError(
            source, "runtime", "a run ships ONNX files, but eager torch loads .pt2 programs", "write 'onnxruntime'"
        )
