"""Let other projects choose widths, for `search.py`, and express their choice as one of our plans."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch_pruning as tp
from torch import nn

from deploypipe.pruning.modules.module_kinds import has_two_sides
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.records import ChannelGroup, Member, PruningPlan, ScoreTable, Structures
from deploypipe.task import Batch, num_samples, stack_batches, take_batch

# Torch-Pruning does not change a layer if a step would remove all of its channels. With a single step of a large ratio
# that happens to many layers, so a larger ratio would remove less.
NUM_STEPS = 20
NUM_BATCHES = 50  # with fewer, FastNAS only warns and does not re-estimate batch norms


class NotExpressedError(Exception):
    """A rival's choice cannot be expressed as one of our plans."""


def torch_pruning_plan(
    dense: nn.Module, inputs: Any, structures: Structures, ratio: float, round_to: int | None
) -> PruningPlan:
    """Prune by magnitude with Torch-Pruning, all layers ranked together, restricted to our groups.

    Raises NotExpressedError if it cut channels that are not in our groups.
    """
    network = deepcopy(dense)
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # it traces with autograd
    producers = {m.module for group in structures.groups for m in group.members if m.side == "out"}
    names = {module: name for name, module in network.named_modules()}
    pruner = tp.pruner.BasePruner(
        network,
        inputs,
        tp.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=round_to,
        iterative_steps=NUM_STEPS,
        ignored_layers=[m for name, m in network.named_modules() if has_two_sides(m) and name not in producers],
        in_channel_groups={},  # its default dictionaries are shared by all pruners of a process
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    writers = [_writer(group) for group in structures.groups]
    left = {writer.module: sorted(chain.from_iterable(writer.units)) for writer in writers}
    for _ in range(NUM_STEPS):
        for group in pruner.step(interactive=True):
            _forget(left, {names.get(d.target.module, ""): set(i) for d, i in group if _is_out(pruner, d)})
            group.prune()
    plan = _plan_with(structures, {group.name: _kept_units(group, left) for group in structures.groups})
    require_same_shapes(network, apply_plan(dense, plan))
    return plan


def _writer(group: ChannelGroup) -> Member:
    return next(m for m in group.members if m.module == group.name.partition(":")[0] and m.side == "out")


def _is_out(pruner: Any, dependency: Any) -> bool:
    return bool(pruner.DG.is_out_channel_pruning_fn(dependency.handler))


def _forget(left: dict[str, list[int]], gone: dict[str, set[int]]) -> None:
    """Take out of each module's dense numbers those that stand where `gone` says."""
    for name in left.keys() & gone.keys():
        left[name] = [number for place, number in enumerate(left[name]) if place not in gone[name]]


def _kept_units(group: ChannelGroup, left: dict[str, list[int]]) -> tuple[bool, ...]:
    writer = _writer(group)
    present = set(left[writer.module])
    return tuple(not present.isdisjoint(unit) for unit in writer.units)


def _plan_with(structures: Structures, kept: dict[str, tuple[bool, ...]]) -> PruningPlan:
    scores = {name: tuple(map(float, units)) for name, units in kept.items()}
    widths = {name: sum(units) for name, units in kept.items()}
    return make_plan(structures, ScoreTable(scorer="torch-pruning", channels=scores), widths)


def fastnas(
    dense: nn.Module,
    inputs: Any,
    structures: Structures,
    num_macs: int,
    channel_multiple: int,
    calib: Sequence[Batch],
    accuracy: Callable[[nn.Module], float],
) -> tuple[nn.Module, dict[str, int]]:
    """Find a network within a number of MACs with Model Optimizer's FastNAS; return it and the widths of our groups.

    accuracy: the function to maximise. Raises ImportError if the package is not installed, and NotExpressedError if it
    cut channels that are not in our groups.
    """
    import modelopt.torch.prune as mtp  # imported here: without it, the others can still be compared
    from modelopt.torch.prune.fastnas import FastNASConfig

    try:
        found, _ = mtp.prune(
            model=deepcopy(dense),
            mode=[("fastnas", _in_steps(FastNASConfig().model_dump(), channel_multiple))],
            constraints={"flops": 2.0 * num_macs},  # it counts a multiplication and an addition as two
            dummy_input=inputs,
            config={"data_loader": _in_batches(calib, NUM_BATCHES), "score_func": accuracy, "verbose": False},
        )
    except ValueError as error:
        if "satisfied" not in str(error):
            raise
        raise NotExpressedError(f"its search space holds no network of {num_macs:,} multiply-accumulates") from None
    modules = dict(found.named_modules())
    widths = {group.name: int(modules[group.name].weight.shape[0]) for group in structures.groups}
    return found.eval(), widths


def _in_batches(calib: Sequence[Batch], count: int) -> list[Batch]:
    """The same samples, divided into the given number of batches."""
    inputs, target = stack_batches([i for i, _ in calib]), stack_batches([t for _, t in calib])
    size = num_samples(inputs) // count
    ends = range(size, size * count + 1, size)
    return [take_batch((inputs, target), end, end - size) for end in ends]


def _in_steps(config: dict[str, Any], channel_multiple: int) -> dict[str, Any]:
    """Set its step of channels: its default of 32 leaves almost no choice in networks for small images."""
    for rules in config.values():
        for rule in rules.values():
            for name in ("channel_divisor", "feature_divisor"):
                if name in (rule or {}):
                    rule[name] = channel_multiple
    return config


def require_same_shapes(network: nn.Module, ours: nn.Module) -> None:
    """Raise NotExpressedError unless both networks have parameters of the same shapes."""
    if [p.shape for p in network.parameters()] != [p.shape for p in ours.parameters()]:
        raise NotExpressedError("the network was cut where we cut nothing")
