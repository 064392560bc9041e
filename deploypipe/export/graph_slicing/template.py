"""Read the graph that `onnx_export.export_template` wrote: what `sliced_files` makes files of pruned networks from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor, nn

from deploypipe.export.graph_slicing.resize_graph import Facts, propagate
from deploypipe.export.onnx_export.export_template import BLOCKS
from deploypipe.runtimes import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The template's graph, and the sizes of all its tensors on one batch."""

    graph: onnx.ModelProto  # without the network's tensors
    tensors: frozenset[str]  # initialisers that are the network's own
    blocks: Mapping[str, tuple[tuple[str, str], ...]]  # module -> (input value, output value) of every call
    facts: Facts


def open_template(path: Path, network: nn.Module, feed: Mapping[str, Array]) -> Template:
    """Read the template at `path`, which was made of `network`. feed: a batch, by the names of the graph's inputs."""
    proto = onnx.load(path, load_external_data=False)  # the weights are named there, and not held
    blocks = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == BLOCKS))
    facts = propagate(proto, feed)
    own = tensors_of(network)
    names = frozenset(weight.name for weight in proto.graph.initializer if weight.name in own)
    others = [weight for weight in proto.graph.initializer if weight.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(others)
    del proto.metadata_props[:]
    return Template(
        graph=proto,
        tensors=names,
        blocks={name: tuple((given, gave) for given, gave in calls) for name, calls in blocks.items()},
        facts=facts,
    )


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
