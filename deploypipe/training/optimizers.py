"""Choose and make the optimizer of a fine-tuning: the task's own, AdamW or SGD."""

from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deploypipe.errors import ConfigError, PipelineError
from deploypipe.recipe import Finetune
from deploypipe.task import Task

# Peaks. SGD: a larger first step destroys the repair (pipelines/LOG.md). AdamW steps by its rate for any gradient.
_LEARNING_RATES = {"sgd": 0.006, "adamw": 1e-4}
_WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 0.01}
_TITLES = {"sgd": "SGD", "adamw": "AdamW"}
_OTHER_NORMS = (
    nn.modules.batchnorm._BatchNorm,  # and instance norms, which are subclasses
    nn.GroupNorm,
)


def find_optimizer(network: nn.Module) -> tuple[Literal["sgd", "adamw"], str]:
    """The optimizer that networks of this kind are usually trained with, and why.

    AdamW if attention modules and layer norms (RMS norms too) outnumber batch and group norms; SGD otherwise. SGD
    trains transformers poorly, because the gradients of their parts differ in size by orders of magnitude
    (arXiv:2402.16788).
    """
    kinds = [type(module).__name__ for module in network.modules()]
    attentions = sum("Attention" in kind for kind in kinds)
    layer_norms = sum("LayerNorm" in kind or "RMSNorm" in kind for kind in kinds)
    others = sum(isinstance(module, _OTHER_NORMS) for module in network.modules())
    seen = f"{attentions} attention modules and {layer_norms} layer norms, {others} batch or group norms"
    return ("adamw" if attentions + layer_norms > others else "sgd"), seen


def with_optimizer(settings: Finetune, network: nn.Module, task: Task) -> Finetune:
    """The settings with "auto" replaced by the network's optimizer, and None by that optimizer's defaults.

    ConfigError if both the recipe and the task choose an optimizer.
    """
    if task.optimizer is not None and settings.optimizer != "auto":
        raise ConfigError(
            "recipe",
            "finetune.optimizer",
            f"is {settings.optimizer!r}, but task() returns an optimizer of its own",
            "write 'auto', or leave Task(optimizer=...) out",
        )
    name = settings.optimizer if settings.optimizer != "auto" else find_optimizer(network)[0]
    return replace(
        settings,
        optimizer=name if task.optimizer is None else "auto",
        learning_rate=_LEARNING_RATES[name] if settings.learning_rate is None else settings.learning_rate,
        weight_decay=_WEIGHT_DECAYS[name] if settings.weight_decay is None else settings.weight_decay,
    )


def choice_text(settings: Finetune, network: nn.Module, task: Task) -> str:
    """A note that names the optimizer of fine-tuning and why; "" if the recipe chose it."""
    if task.optimizer is not None:
        return "fine-tuning uses the optimizer of task()"
    if settings.optimizer != "auto":
        return ""
    name, seen = find_optimizer(network)
    return f"fine-tuning uses {_TITLES[name]}: the network has {seen} (finetune.optimizer chooses another)"


def default_rate(name: str) -> float:
    """The peak learning rate of "sgd" or "adamw" that is used if the recipe gives none."""
    return _LEARNING_RATES[name]


def method_text(task: Task, settings: Finetune, schedule: LRScheduler) -> str:
    """Optimizer and schedule for a training log: "AdamW, cosine", or the classes made by the task's functions."""
    optimizer = f"{type(schedule.optimizer).__name__} of task()" if task.optimizer else _TITLES[settings.optimizer]
    parts = [optimizer, f"{type(schedule).__name__} of task()" if task.schedule else settings.schedule]
    return ", ".join([*parts, "training_step of task()"] if task.training_step else parts)


def make_optimizer(student: nn.Module, task: Task, settings: Finetune) -> Optimizer:
    """The optimizer of a training. settings: as `with_optimizer` returns them.

    PipelineError if the task's optimizer holds parameters of another network.
    """
    if task.optimizer is not None:
        optimizer: Optimizer = task.optimizer(student)
        own = {id(parameter) for parameter in student.parameters()}
        if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise PipelineError(
                "task().optimizer returned an optimizer with parameters of another network; make it from the "
                "parameters of the network that it is given: lambda model: AdamW(model.parameters())"
            )
        return optimizer
    assert settings.learning_rate is not None and settings.weight_decay is not None
    if settings.optimizer == "adamw":
        return AdamW(_decay_groups(student, settings.weight_decay), lr=settings.learning_rate)
    return SGD(
        student.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )


def untrained_text(optimizer: Optimizer, network: nn.Module) -> str:
    """A note on the trainable parameters that the optimizer does not hold; "" if it holds all of them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    sizes = {id(p): p.numel() for p in network.parameters() if p.requires_grad}
    trained, total = sum(size for key, size in sizes.items() if key in held), sum(sizes.values())
    if trained == total:
        return ""
    return (
        f"the optimizer of task() holds {trained:,} of {total:,} trainable parameters ({trained / total:.1%}); "
        "fine-tuning leaves the others as they are: give it model.parameters() to train all"
    )


def _decay_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels decay; biases, norms and other vectors do not, as transformers are trained."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
