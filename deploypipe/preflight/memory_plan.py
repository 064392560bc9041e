"""Choose the batches of observing and repair so that they fit into the recipe's memory, and say what they will take."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from deploypipe.memory_budget import allowed_bytes, gibibytes, tree_bytes
from deploypipe.observe.fit_to_memory import fit_observe
from deploypipe.pruning.repair.fit_to_memory import fit_repair, repair_text
from deploypipe.recipe import Recipe
from deploypipe.records import MemoryPlan
from deploypipe.scoring import needs_derivatives
from deploypipe.task import Batch, Task, num_samples
from deploypipe.text.memory_sizes import parse_gib


def plan_memory(
    dense: nn.Module,
    calib: Sequence[Batch],
    task: Task,
    recipe: Recipe,
    device: torch.device,
    *,
    count: int | None = None,
) -> MemoryPlan:
    """Measure the network's activations on two samples, and fit what a run does with it into `recipe.memory`.

    calib: the calibration samples, which are held in any case and count. count: how many there are, if these are not
    all.
    """
    allowed = allowed_bytes(parse_gib("memory", recipe.memory), device)
    held = sum(num_samples(inputs) for inputs, _ in calib)
    wanted = max(recipe.observe.num_samples, recipe.repair.num_samples)
    data = tree_bytes(*calib) * min(count or held, wanted) // held
    room = allowed - data if device.type == "cpu" else allowed
    loss = task.loss if needs_derivatives(recipe.score) else None
    trials = replace(recipe.repair, num_samples=recipe.search.num_repair_samples)
    return MemoryPlan(
        allowed_bytes=allowed,
        data_bytes=data,
        observe=fit_observe(dense, calib, room, loss=loss),
        repair=fit_repair(dense, calib, recipe.repair, room, count=count, device=device),
        trial_repair=fit_repair(dense, calib, trials, room, count=count, device=device),
    )


def memory_text(plan: MemoryPlan) -> str:
    """What the stages will take, for people, and what was changed so that they do not take more."""
    needs = f"calib {gibibytes(plan.data_bytes)}, observe {gibibytes(plan.observe.num_bytes)}"
    needs += f", repair {gibibytes(plan.repair.num_bytes)} of {gibibytes(plan.allowed_bytes)} allowed"
    changes = []
    if plan.observe.max_samples:
        changes.append(f"observe passes at most {plan.observe.max_samples} samples at once")
    if text := repair_text(plan.repair):
        changes.append(f"repair reads {text} (all at once would take {gibibytes(plan.repair.whole_bytes)})")
    return "; ".join([needs, *changes])


def excess_text(plan: MemoryPlan) -> str:
    """Which stage takes more than is allowed, and what to do; "" if none does."""
    needs = {"observing": plan.observe.num_bytes, "repair": plan.repair.num_bytes}
    name = max(needs, key=lambda stage: needs[stage])
    total = plan.data_bytes + needs[name]
    if total <= plan.allowed_bytes:
        return ""
    allowed = gibibytes(plan.allowed_bytes)
    return (
        f"{name} takes about {gibibytes(total)} with the calibration samples, more than recipe.memory, {allowed}; "
        "set memory higher, or lower repair.num_samples and observe.num_samples"
    )
