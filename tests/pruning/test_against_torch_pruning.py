"""Independent check of coupled channels: torch_pruning's dependency graph finds the same ones."""

import networks
import pytest
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from deploypipe.pruning.modules.module_kinds import has_two_sides
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ChannelGroup

torch_pruning = pytest.importorskip("torch_pruning")

KNOWN = nn.Linear | _ConvNd | _NormBase  # layers that both know index by index
# Groups that torch_pruning gets wrong or does not have; every other group of every network must agree.
WRONG_THERE = {
    ("pad_resnet", "conv1"): "it overlooks the zero channels that option A pads with, so its indices are shifted",
    ("encoder", "embed"): "it takes an attention for one layer, and does not name the output projection inside",
    ("encoder", "layers.0.self_attn:heads"): "it cuts an attention's embedding, not its heads",
    ("encoder", "layers.1.self_attn:heads"): "it cuts an attention's embedding, not its heads",
}


def ours(model: nn.Module, group: ChannelGroup, unit: int) -> set[tuple[str, str, int]]:
    return {
        (member.module, member.side, index)
        for member in group.members
        if isinstance(model.get_submodule(member.module), KNOWN)
        for index in member.units[unit]
    }


def theirs(graph: object, model: nn.Module, root: str, indices: tuple[int, ...]) -> set[tuple[str, str, int]]:
    """What torch_pruning removes with these output channels; "out" if both sides are the same, as in a norm."""
    names = {module: name for name, module in model.named_modules()}
    layer = model.get_submodule(root)
    found = set()
    for dependency, gone in graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, idxs=list(indices)
    ):
        module = dependency.target.module
        if isinstance(module, KNOWN):
            is_out = not has_two_sides(module) or graph.is_out_channel_pruning_fn(dependency.handler)
            found |= {(names[module], "out" if is_out else "in", index) for index in gone}
    return found


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_units_touch_what_torch_pruning_finds(name: str) -> None:
    model, inputs = networks.build(name)
    groups = list_structures(model, inputs).groups
    assert {group for network, group in WRONG_THERE if network == name} <= {group.name for group in groups}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
    compared = [group for group in groups if (name, group.name) not in WRONG_THERE]
    assert compared
    for group in compared:
        root = next(m for m in group.members if m.side == "out" and has_two_sides(model.get_submodule(m.module)))
        for unit in range(group.num_units):
            found = theirs(graph, model, root.module, root.units[unit])
            assert found == ours(model, group, unit), (group.name, unit)
