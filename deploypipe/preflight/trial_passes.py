"""Try one batch of each split: forward pass, the task's functions, one training step, the export."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.benchmark.accuracy import evaluate_file, evaluate_module
from deploypipe.distillation_loss import with_distillation_loss
from deploypipe.errors import DataError, DeploypipeError, ModelError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.input_sizes import other_sizes, usual_inputs
from deploypipe.export.tensorrt_engine.build_engine import is_built
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.batch_trees import map_tensors, tensors
from deploypipe.networks.model_copies import copied
from deploypipe.preflight.findings import Findings, described
from deploypipe.preflight.split_checks import Survey, check_labels
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.recipe import Recipe
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.ability_for_target import can
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.target import Target
from deploypipe.task import (
    Batch,
    Task,
    evaluating,
    find_real_tokens,
    find_slices,
    forward,
    is_classification,
    num_samples,
    require_logits,
    take,
    take_batch,
)
from deploypipe.training.epochs import least_samples

NUM_TRAINED = 4  # samples: a batch norm needs more than one


def try_inference(findings: Findings, model: nn.Module, task: Task, name: str, seen: Survey) -> None:
    """Try the forward pass and, on val and test, the metric and slices; on val, the distillation loss."""
    pair = take_batch(seen.first, 2)
    detail = described(pair[0])
    with findings.trying(f"{name}: forward", detail):
        before = _stored_buffers(model)
        outputs = run_network(model, pair[0], seen.first[0], name)
        _require_parameters(model, pair[0], outputs, name)
        _require_same_buffers(model, before)
        _require_finite(outputs, name, "")
        _require_repeatable(model, pair[0], outputs, name)
        _try_suspect(model, task, name, seen)
        if is_classification(task):
            logits = require_logits(outputs)
            _check_class_names(task, logits)
            if name != "calib" and logits.dim() == 2:
                check_labels(pair[1], name, logits.shape[1], seen.labels)
        if name == "calib":
            real = find_real_tokens(pair[0], task.real_tokens)
            if real is not None and not real.any():
                raise DataError(
                    "task().real_tokens is False at every position of two samples; return False for padding only"
                )
        if name in ("val", "test"):
            evaluate_module(model, [pair], task)
            find_slices([pair], task.slices)
        if name == "val":
            with_distillation_loss(task, outputs, pair[1])


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    own = dict(model.named_buffers())
    return {name: own[name].clone() for name in model.state_dict() if name in own}


def _require_same_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise if a forward pass changed buffers: a plan fits only the weights and buffers that it was made for."""
    now = model.state_dict()
    changed = [n for n, t in before.items() if n not in now or now[n].shape != t.shape or not now[n].equal(t)]
    changed += [name for name in _stored_buffers(model) if name not in before]
    if changed:
        raise ModelError(
            f"{type(model).__name__} changes {', '.join(map(repr, changed))} in evaluation mode; change buffers only "
            "`if self.training`, or register them with persistent=False"
        )


def _check_class_names(task: Task, logits: Tensor) -> None:
    if task.class_names and len(task.class_names) != logits.shape[1]:
        raise DataError(
            f"task().class_names has {len(task.class_names)} names, but the network has {logits.shape[1]} outputs; "
            "give one name for each output"
        )


def run_network(model: nn.Module, inputs: Any, whole: Any, name: str, where: str = "") -> Any:
    """The outputs for two samples; ModelError with shapes and advice if the network fails."""
    with evaluating(model), torch.no_grad():
        try:
            return forward(model, inputs)
        except Exception as error:  # the user's network on the user's data may raise anything
            raise_if_exhausted(error)
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
            advice = "make build_model() and load_data() fit each other"
            if isinstance(error, TypeError) and (members := _unknown_members(model, inputs)):
                advice = members
            elif _works(model, as_floats := map_tensors(lambda tensor: tensor.float(), inputs)):
                odd = next(o for o, f in zip(tensors(inputs), tensors(as_floats), strict=True) if o.dtype != f.dtype)
                advice = f"it needs float32, but load_data() gives {odd.dtype}: write x.float()"
            elif num_samples(whole) > 2 and _works(model, whole):
                advice = (
                    f"the whole batch of {num_samples(whole)} works: if one of its members has as many rows but no "
                    "batch axis, choose another batch size, or make that member a buffer of the network"
                )
            seen = f"two samples of the {name} split{where} ({described(inputs)})"
            raise ModelError(f"{type(model).__name__} fails on {seen}: {text}; {advice}") from error


def _unknown_members(model: nn.Module, inputs: Any) -> str:
    """The advice for members of a batch that forward() has no parameter for; "" if there are none."""
    parameters = signature(model.forward).parameters
    unknown = [key for key in inputs if key not in parameters] if isinstance(inputs, Mapping) else []
    if not unknown or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values()):
        return ""
    known = [key for key in inputs if key in parameters]
    chosen = known or (unknown[0] if len(unknown) == 1 else unknown)
    passed = "pass it by position" if not known and len(unknown) == 1 else "leave it out or rename it"
    return (
        f"forward() has no parameter {', '.join(map(repr, unknown))}: {passed}, with Pairs(loader, inputs={chosen!r}, "
        "target=...) from deploypipe.data"
    )


def _require_parameters(model: nn.Module, inputs: Any, outputs: Any, name: str) -> None:
    """Raise if forward() takes members of a batch by **kwargs, for which a file has no inputs."""
    parameters = signature(model.forward).parameters.values()
    known = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD]
    swallowed = [key for key in inputs if key not in known] if isinstance(inputs, Mapping) else []
    if not swallowed or len(known) == len(parameters):
        return
    kept = {key: value for key, value in inputs.items() if key in known}
    is_one = len(swallowed) == 1
    if _gives_the_same(model, kept, outputs):
        remedy = f"leave {'it' if is_one else 'them'} out: Pairs(loader, inputs={list(kept)!r}, target=...)"
        remedy += " from deploypipe.data"
    else:
        remedy = (
            f"the network reads {'it' if is_one else 'them'}: write def forward(self, {', '.join(inputs)}, **kwargs)"
        )
    raise ModelError(
        f"{', '.join(map(repr, swallowed))} {'is no parameter' if is_one else 'are no parameters'} of forward(), which "
        f"takes such members of the {name} split by **kwargs; the exported file cannot: {remedy}"
    )


def _gives_the_same(model: nn.Module, inputs: Any, outputs: Any) -> bool:
    """Whether the network works without the other members, and gives the same."""
    with evaluating(model), torch.no_grad():
        if not inputs or not _works(model, inputs):
            return False
        pairs = (name_outputs(outputs), name_outputs(forward(model, inputs)))
    return pairs[0].keys() == pairs[1].keys() and all(
        torch.allclose(tensor, pairs[1][key], equal_nan=True) for key, tensor in pairs[0].items()
    )


def _works(model: nn.Module, inputs: Any) -> bool:
    try:
        forward(model, inputs)
    except Exception:  # as above
        return False
    return True


def _require_finite(outputs: Any, name: str, where: str) -> None:
    for output, tensor in name_outputs(outputs).items():
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"the network's output {output!r} holds NaN or infinity on the {name} split{where}; check weights and "
                "data"
            )


def _require_repeatable(model: nn.Module, inputs: Any, outputs: Any, name: str) -> None:
    again = name_outputs(run_network(model, inputs, inputs, name))
    for output, tensor in name_outputs(outputs).items():
        if not torch.allclose(tensor.float(), again[output].float(), rtol=1e-3, atol=1e-3 * float(tensor.abs().max())):
            raise ModelError(
                f"forward() returned a different {output!r} the second time for the same samples of the {name} split; "
                "write F.dropout(x, p, training=self.training), draw no random numbers in evaluation mode, and do not "
                "change inputs or buffers in place"
            )


def _try_suspect(model: nn.Module, task: Task, name: str, seen: Survey) -> None:
    """Try a sample that holds NaN or infinity; DataError if the network or the task cannot handle it."""
    if seen.suspect is None:
        return
    number, sample = seen.suspect
    if num_samples(sample[0]) < 1:
        return
    where = f", batch {number}: a sample's inputs or targets hold NaN or infinity"
    with evaluating(model), torch.no_grad():
        outputs = forward(model, sample[0])
        _require_finite(outputs, name, where)
        value = task.loss(outputs, sample[1]) if name == "train" else torch.zeros(())
        if name in ("val", "test"):
            value = task.metric(outputs, sample[1])
    if not torch.isfinite(value).all():
        raise DataError(f"the {name} split{where}; leave such samples out, or write torch.nan_to_num(...)")


def try_training(findings: Findings, model: nn.Module, task: Task, name: str, seen: Survey) -> None:
    """Try one training step on a copy of the network: forward, loss and backward."""
    inputs, target = take_batch(seen.first, NUM_TRAINED)
    with findings.trying(f"{name}: loss and backward", described(target, "target")):
        student = copied(model).train()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            try:
                outputs = forward(student, inputs)
            except Exception as error:  # as in run_network
                raise_if_exhausted(error)
                lines = str(error).strip().splitlines()
                hint = " (a batch norm needs at least two samples: write drop_last=True, or use larger batches)"
                raise ModelError(
                    f"{type(model).__name__} fails in training mode on {num_samples(inputs)} samples of the {name} "
                    f"split: {type(error).__name__}{': ' + lines[0] if lines else ''}; correct forward()"
                    f"{hint if num_samples(inputs) < 2 else ''}"
                ) from error
            if not any(tensor.requires_grad for tensor in tensors(outputs)):
                raise ModelError("forward() cannot be differentiated; use no no_grad(), detach() or numpy in it")
            loss = task.loss(outputs, target)
            if not torch.isfinite(loss):
                raise DataError(f"task().loss is {loss.item()} on the first batch of the {name} split; check both")
            if not loss.requires_grad:
                raise ModelError("task().loss cannot be differentiated; use no detach(), argmax() or no_grad() in it")
            if (
                task.distillation_loss is not None
                and not task.distillation_loss(outputs, map_tensors(Tensor.detach, outputs), 1.0).requires_grad
            ):
                raise ModelError(
                    "task().distillation_loss cannot be differentiated; use no detach() or no_grad() in it"
                )
            loss.backward()  # type: ignore[no-untyped-call]
    if min(seen.sizes) == 1 and least_samples(model, inputs) > 1:
        findings.notes.append(
            f"the {name} split has a batch of one sample, on which the network cannot be trained: fine-tuning leaves "
            "it out; write drop_last=True, or use another batch size"
        )


def try_extremes(findings: Findings, model: nn.Module, task: Task, name: str, seen: Survey, seconds: float) -> None:
    """Try samples of other shapes and with the largest and smallest whole numbers, for at most `seconds`."""
    begun = time.perf_counter()
    with findings.trying(f"{name}: extremes", f"{len(seen.extremes)} of sizes and whole numbers"):
        for extreme in seen.extremes.values():
            inputs, target = extreme.samples
            where = f", batch {extreme.number}{f', {extreme.what}' if extreme.what else ''}"
            outputs = run_network(model, inputs, inputs, name, where)
            try:
                if name == "train":
                    task.loss(outputs, target)
                elif name != "calib":
                    task.metric(outputs, target)
            except DeploypipeError as error:
                raise DataError(f"the {name} split{where}: {error}") from error
            if time.perf_counter() - begun > seconds:
                return


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Samples for trying the export."""

    calib: Batch
    val: Batch
    shapes: tuple[Any, ...]  # inputs of every size that calib and val have


def try_export(
    findings: Findings, model: nn.Module, task: Task, recipe: Recipe, target: Target, samples: Samples
) -> None:
    """Export the ONNX file, compare it with the network, and run it if the target's runtime is on this machine."""
    with TemporaryDirectory() as folder, findings.trying("export and parity", f"opset {recipe.export.opset}"):
        path, network = Path(folder) / "model.onnx", with_slim_attention(model).cpu().eval()
        few = [take(inputs, NUM_TRAINED) for inputs in samples.shapes]
        others = other_sizes(network, samples.calib[0], few, recipe.export, target.dynamic_dims)
        export_onnx(network, [samples.calib], path, recipe.export, other_inputs=others)
        usual = usual_inputs(network, samples.calib[0], few, recipe.export, target.dynamic_dims)
        findings.notes += [str(usual)] if usual else []
        if can(target).verdict == "run" and not is_built(target):
            evaluate_file(path, [take_batch(samples.val, 2)], task, make_runtime(target), target.num_threads)
        else:
            findings.notes.append(
                f"{target.runtime} was not tried: a check builds no engine, and runs nothing on another device"
            )
