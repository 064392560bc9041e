"""What can be told of a run before any work is done: the first mistake found ends it, and nothing is written."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.answers import with_divergence
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.errors import ConfigError, DataError, ModelError, RuntimeUnavailableError
from deploypipe.exhaustion import raise_if_exhausted
from deploypipe.provider_options import require_harmless_options
from deploypipe.pruning.structures import require_trainable
from deploypipe.recipe import Recipe
from deploypipe.runtimes.ability import can
from deploypipe.runtimes.packing import name_outputs
from deploypipe.target import Target
from deploypipe.task import Batch, Splits, Task, empty_split, forward, num_samples, take_batch
from deploypipe.trees import tensors


def check_inputs(model: nn.Module, splits: Splits, task: Task, recipe: Recipe, target: Target) -> None:
    """Raise the DeploypipeError that names what is wrong with these inputs; costs four small forward passes."""
    _check_target(target)
    require_trainable(model)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"weight {name!r} holds NaN or infinity; load or train the network again")
    for name in ("calib", "val", "test", *(["train"] if recipe.finetune.num_epochs else [])):
        pair = take_batch(_first(getattr(splits, name), name), 2)
        outputs = _try(model, pair[0], name)
        if name == "calib" and not all(torch.isfinite(tensor).all() for tensor in name_outputs(outputs).values()):
            raise DataError(
                "the network's output holds NaN or infinity on the calib split; check its weights and its data"
            )
        if name == "val":
            evaluate_module(model, [pair], task)
            with_divergence(task, outputs, pair[1])


def _check_target(target: Target) -> None:
    """A machine that is not the device may still export for it; one that is has to have the runtime."""
    require_harmless_options(target)
    ability = can(target)
    source = f"target {target.name!r}" if target.name else "target"
    if ability.is_the_device and ability.verdict != "run":
        raise RuntimeUnavailableError(f"{source}: runtime {target.runtime!r}: {ability.reason}")
    if target.runtime == "eager":
        raise ConfigError(
            source, "runtime", "a run ships ONNX files, and eager torch takes .pt2 programs", "write 'onnxruntime'"
        )


def _first(split: Iterable[Batch], name: str) -> Batch:
    for batch in split:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"the {name} split gives a {type(batch).__name__}; each batch is a pair (inputs, target)")
        inputs, target = batch
        if not tensors(inputs):
            raise DataError(f"the {name} split gives inputs of type {type(inputs).__name__}; give tensors")
        if num_samples(inputs):
            return inputs, target
    raise empty_split(name)


def _try(model: nn.Module, inputs: Any, name: str) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return forward(model, inputs)
    except Exception as error:  # the user's own network on the user's own data: whatever it is, it is not ours
        raise_if_exhausted(error)
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(inputs))
        said = str(error).strip().splitlines()
        raise ModelError(
            f"{type(model).__name__} fails on two samples of the {name} split ({shapes}): {type(error).__name__}"
            f"{': ' + said[0] if said else ''}; make build_model() and load_data() fit each other"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
