"""Find the first module whose output differs between a network and its exported file, by bisection over the graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from deploypipe.errors import DeploypipeError
from deploypipe.export.onnx_graphs.file_metadata import module_of
from deploypipe.files.atomic import place_file
from deploypipe.numerics.output_differences import difference
from deploypipe.runtimes import Array
from deploypipe.runtimes.named_arrays import feed
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import forward
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One value of the graph that is a module's output in its `call`-th call, from 0."""

    value: str
    module: str  # "": the network itself
    call: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """The first module whose values differ by more than the limit."""

    module: str
    op_type: str  # of the node that gives the value
    max_abs_error: float  # relative to the largest magnitude of the value

    def __str__(self) -> str:
        where = f"module {self.module!r}" if self.module else "the network's own forward()"
        return f"they first differ in {where} (ONNX {self.op_type}), by {self.max_abs_error:.3g} of its largest output"


def module_outputs(
    program: torch.export.ExportedProgram, network: nn.Module, output_names: Sequence[str]
) -> tuple[Point, ...]:
    """List the modules that return one tensor, in the order of execution, with the exporter's name of that tensor.

    A value that a module only passes on from an inner module counts for the inner one.
    """
    given = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    renamed = dict(zip(given, output_names, strict=False))
    nodes = list(program.graph.nodes)
    scopes = {node: scopes_of(node) for node in nodes}
    order: dict[str, tuple[int, ...]] = {}  # scope -> positions of the values that leave it
    for i, node in enumerate(nodes):
        for scope, _ in scopes[node]:
            leaves = any(scope not in {name for name, _ in scopes[user]} for user in node.users)
            order[scope] = (*order.get(scope, ()), *((i,) if leaves and _is_tensor(node) else ()))
    calls: dict[int, int] = {}
    points: dict[str, tuple[int, Point]] = {}
    paths = {scope: path for pairs in scopes.values() for scope, path in pairs}
    for scope, positions in order.items():
        module = _submodule(network, paths[scope])
        call = calls[id(module)] = calls.get(id(module), -1) + 1
        if module is not None and len(positions) == 1:
            # Outer scopes come first, so an inner one replaces them.
            value = renamed.get(nodes[positions[0]].name, nodes[positions[0]].name)
            points[value] = (positions[0], Point(value=value, module=paths[scope], call=call))
    return tuple(point for _, point in sorted(points.values(), key=lambda pair: pair[0]))


def scopes_of(node: torch.fx.Node) -> list[tuple[str, str]]:
    """(key of the call, path of the module), from the network itself inwards."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, path) for key, (path, _) in stack.items() if key.startswith("L__self__")]


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _submodule(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def find_mismatch(
    network: nn.Module, inputs: Any, file: Path, points: Sequence[Point], limit: float
) -> Mismatch | None:
    """Compare `file` with the modules of `network` on one batch of inputs; None if no module differs by `limit`.

    Each step runs both. The cost is about log2(number of modules) runs.
    """
    graph = onnx.load(file, load_external_data=False)

    def error_at(point: Point) -> float | None:
        expected = _module_output(network, inputs, point)
        return None if expected is None else _error(expected, _value(graph, file, point.value, inputs))

    return _search(graph.graph, points, error_at, limit)


def find_mismatch_of_files(reference: Path, file: Path, inputs: Any, limit: float) -> Mismatch | None:
    """Compare two files: `file` was made from `reference` and kept the names of its values."""
    first, second = (onnx.load(path, load_external_data=False) for path in (reference, file))
    known = {name for node in second.graph.node for name in node.output}
    points = [
        Point(value=node.output[0], module=module_of(node.name)) for node in first.graph.node if node.output[0] in known
    ]

    def error_at(point: Point) -> float | None:
        expected = _value(first, reference, point.value, inputs)
        return None if expected is None else _error(expected, _value(second, file, point.value, inputs))

    return _search(second.graph, points, error_at, limit)


def _search(
    graph: onnx.GraphProto, points: Sequence[Point], error_at: Callable[[Point], float | None], limit: float
) -> Mismatch | None:
    """Start from a value near the end that differs, bisect among the values it is computed from, and repeat.

    The graph's order alone does not suffice: a value between them may lie on another branch, and agree.
    """
    producers = {name: node for node in graph.node for name in node.output}
    candidates = [point for point in points if point.value in producers]
    error_of = cache(error_at)
    found = None
    while (bad := _find_bad_end(candidates, producers, error_of, limit)) is not None:
        upstream = _upstream(producers, bad.value)
        found = _bisect([*(p for p in candidates if p.value in upstream), bad], error_of, limit)
        upstream = _upstream(producers, found.value)
        candidates = [point for point in candidates if point.value in upstream]
    if found is None:
        return None
    error = error_of(found)
    assert error is not None  # it was above the limit
    return Mismatch(module=found.module, op_type=producers[found.value].op_type, max_abs_error=error)


def _find_bad_end(
    candidates: Sequence[Point],
    producers: Mapping[str, onnx.NodeProto],
    error_of: Callable[[Point], float | None],
    limit: float,
) -> Point | None:
    """Find a differing value among those that no other candidate is computed from, leaving out incomparable ones."""
    while candidates:
        ends = _ends(candidates, producers)
        bad = next((point for point in ends if not _is_within(error_of(point), limit)), None)
        unknown = [point for point in ends if error_of(point) is None]
        if bad is not None or not unknown:
            return bad
        candidates = [point for point in candidates if point not in unknown]
    return None


def _bisect(points: list[Point], error_of: Callable[[Point], float | None], limit: float) -> Point:
    """Find a point that differs and follows one that does not, or is the first. The last of `points` must differ."""
    low, high = -1, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        error = error_of(points[middle])
        if error is None:
            del points[middle]
            high -= 1
        elif _is_within(error, limit):
            low = middle
        else:
            high = middle
    return points[high]


def _is_within(error: float | None, limit: float) -> bool:
    """Values that cannot be compared (None) count as within the limit; NaN does not."""
    return error is None or error <= limit


def _upstream(producers: Mapping[str, onnx.NodeProto], value: str) -> set[str]:
    """The values that `value` is computed from."""
    found: set[str] = set()
    waiting = list(producers[value].input)
    while waiting:
        name = waiting.pop()
        if name in producers and name not in found:
            found.add(name)
            waiting += producers[name].input
    return found


def _ends(points: Sequence[Point], producers: Mapping[str, onnx.NodeProto]) -> list[Point]:
    """Those of `points` (in order) that no other point is computed from, the last one first."""
    inner: set[str] = set()
    ends = []
    for point in reversed(points):
        if point.value not in inner:
            ends.append(point)
            inner |= _upstream(producers, point.value)
    return ends


def _module_output(network: nn.Module, inputs: Any, point: Point) -> Array | None:
    """The module's output in that call; None if it is not called, or returns something other than a tensor."""
    with _recorded(network.get_submodule(point.module)) as outputs, torch.no_grad():
        forward(network, inputs)
    if point.call >= len(outputs) or not isinstance(outputs[point.call], Tensor):
        return None
    value: Array = outputs[point.call].numpy()
    return value


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[Any]]:
    outputs: list[Any] = []
    handle = module.register_forward_hook(
        lambda _, __, output: outputs.append(output.clone() if isinstance(output, Tensor) else output)
    )
    try:
        yield outputs
    finally:
        handle.remove()


def _value(proto: onnx.ModelProto, file: Path, name: str, inputs: Any) -> Array | None:
    """One value of the graph; None if the runtime cannot return it."""
    alone = onnx.ModelProto()
    alone.CopyFrom(proto)
    del alone.graph.output[:]
    alone.graph.output.append(onnx.ValueInfoProto(name=name))
    with TemporaryDirectory(dir=file.parent, prefix=".value.") as folder:
        for data in check_onnx_file(file).data:
            place_file(file.parent / data, Path(folder) / data)
        path = Path(folder) / file.name
        path.write_bytes(alone.SerializeToString())
        try:
            with OnnxRuntime().open(path, num_threads=1) as session:
                return session.run(feed(inputs, session.input_names))[0]
        except DeploypipeError:
            return None


def _error(expected: Array, seen: Array | None) -> float | None:
    if seen is None or seen.shape != expected.shape:
        return None
    return difference([[expected]], [[seen]]).max_abs_error
