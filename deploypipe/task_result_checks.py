"""Check what the functions of a task return. Each returns the problem as text that follows "returned ", or ""."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def metric_problem(value: Any) -> str:
    if not isinstance(value, Tensor) or value.is_complex():
        return f"{kind_of(value)}; return a tensor with one real value per sample"
    return ""


def slices_problem(value: Any) -> str:
    wanted = "return a dict of names and bool tensors, one bool for each sample"
    if not isinstance(value, Mapping):
        return f"{kind_of(value)}; {wanted}"
    for name, mask in value.items():
        if not isinstance(name, str):
            return f"the slice name {name!r:.40}, which is not text; write str(...)"
        if not isinstance(mask, Tensor):
            return f"{kind_of(mask)} for slice {name!r}; {wanted}"
    return ""


def distillation_loss_problem(value: Any) -> str:
    if not isinstance(value, Tensor) or value.dim():
        return f"{kind_of(value)}; return one finite number, a mean over the samples, as a tensor without dimensions"
    return ""


def real_tokens_problem(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{kind_of(value)}; return a tensor of shape (samples, tokens), False for padding"
    return ""


def optimizer_problem(value: Any) -> str:
    if not isinstance(value, Optimizer):
        return f"{kind_of(value)}; return an optimizer, such as torch.optim.AdamW(model.parameters(), lr=1e-4)"
    if not all("lr" in group for group in value.param_groups):
        return f"a {type(value).__name__} without a learning rate ('lr') in its groups; return one that has it"
    return ""


def schedule_problem(value: Any) -> str:
    if not isinstance(value, LRScheduler):
        return f"{kind_of(value)}; return a schedule of torch.optim.lr_scheduler, such as OneCycleLR(optimizer, ...)"
    return ""


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    return "None" if value is None else f"a {type(value).__name__}"
