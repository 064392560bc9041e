"""Check the bytes of an untrusted ONNX file before any other parser reads it.

A file can be cut off, declare tensors far larger than itself, nest without end, or point to files outside its folder.
Standard library only, so that it works on a device. What a graph computes is not checked here: the limits of the
process that runs it (`limited_process`) stop a graph that builds a huge tensor or never ends.
"""

import mmap
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias

from deploypipe.errors import ModelError
from deploypipe.untrusted_files import protobuf_reader
from deploypipe.untrusted_files.protobuf_reader import Refused, Value

_MAX_BYTES = 2**31  # of one protobuf message
_MAX_OPSET = 99
_MAX_NODES = 1_000_000
_MAX_DEPTH = 16  # of graphs within nodes
MAX_RANK = 32  # of a tensor
_IN_MEMORY = "_ORT_MEM_ADDR_"  # onnxruntime reads the offset of such a "file" as a memory address
_MAX_ELEMENTS = 2**40  # of a tensor whose shape is declared without data
# TensorProto.DataType -> bits of one element; strings have no size of their own.
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 8: 0, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64}
ELEMENT_BITS |= {15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
_TYPED_DATA = {4: 4, 5: 1, 6: 1, 7: 1, 10: 8, 11: 1}  # TensorProto's field -> least bytes of one packed entry
_MAX_PER_ENTRY = 4  # elements in one entry of int32_data, for 2-bit types


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedFile:
    """An ONNX file that holds what it declares."""

    opset: int
    num_nodes: int
    data: tuple[str, ...]  # names of the files next to it that hold weights


@dataclass(slots=True)
class _State:
    folder: Path
    num_nodes: int = 0
    data: set[str] = field(default_factory=set)


_Check: TypeAlias = Callable[[memoryview, _State, int], None]


def check_onnx_file(path: Path) -> CheckedFile:
    """Raise ModelError if `path` is missing, cut off, not ONNX, inconsistent, or reads files outside its folder."""
    try:
        if not path.is_file():
            raise Refused("is not a file" if path.exists() else "is missing")
        size = path.stat().st_size
        if not 0 < size < _MAX_BYTES:
            raise Refused(f"has {size} bytes, which is not an ONNX file")
        with path.open("rb") as stream:
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        state = _State(path.parent)
        opset = _check_model(content, state)
    except Refused as error:
        raise ModelError(f"{path}: {error}; get the file again from its source") from None
    return CheckedFile(opset=opset, num_nodes=state.num_nodes, data=tuple(sorted(state.data)))


def size_with_data(path: Path) -> int:
    """Bytes of a model file and of the files with its weights; of a file that is not ONNX, its own."""
    names = check_onnx_file(path).data if path.suffix == ".onnx" else ()
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def _check_model(content: memoryview, state: _State) -> int:
    graph: Value | None = None
    opsets: dict[bytes, int] = {}
    ir_version = 0
    for number, value in protobuf_reader.fields(content):
        if number == 1:
            ir_version = protobuf_reader.number(value)
        elif number == 7:
            if graph is not None:
                raise Refused("holds two graphs")
            graph = value
        elif number == 8:
            domain, version = _opset(protobuf_reader.content(value))
            opsets[domain] = version
        elif number == 20:
            _check_parts(protobuf_reader.content(value), {1: _check_graph, 2: _check_graph}, state, 0)
        elif number == 25:
            _check_function(protobuf_reader.content(value), state)
    if graph is None or ir_version < 1 or not opsets:
        raise Refused("is cut off, or not an ONNX file")
    _check_graph(protobuf_reader.content(graph), state, 0)
    return opsets.get(b"", 0)


def _opset(content: memoryview) -> tuple[bytes, int]:
    domain, version = b"", 0
    for number, value in protobuf_reader.fields(content):
        if number == 1:
            domain = bytes(protobuf_reader.content(value))
        elif number == 2:
            version = protobuf_reader.number(value)
    if not 1 <= version <= _MAX_OPSET:
        raise Refused(f"needs version {version} of the operators {domain[:40].decode(errors='replace')!r}")
    return (b"" if domain == b"ai.onnx" else domain), version


def _check_parts(content: memoryview, checks: Mapping[int, _Check], state: _State, depth: int) -> None:
    for number, value in protobuf_reader.fields(content):
        if number in checks:
            checks[number](protobuf_reader.content(value), state, depth)


def _check_function(content: memoryview, state: _State) -> None:
    _check_parts(content, {7: _check_node, 11: _check_attribute, 12: _check_value}, state, 0)


def _check_graph(content: memoryview, state: _State, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Refused(f"nests graphs more than {_MAX_DEPTH} deep")
    checks = {
        1: _check_node,
        5: _check_tensor,
        11: _check_value,
        12: _check_value,
        13: _check_value,
        15: _check_sparse,
    }
    _check_parts(content, checks, state, depth)


def _check_node(content: memoryview, state: _State, depth: int) -> None:
    state.num_nodes += 1
    if state.num_nodes > _MAX_NODES:
        raise Refused(f"holds more than {_MAX_NODES} nodes")
    _check_parts(content, {5: _check_attribute}, state, depth)


def _check_attribute(content: memoryview, state: _State, depth: int) -> None:
    seen = set()
    for number, value in protobuf_reader.fields(content):
        if number in (5, 6, 22) and number in seen:  # a parser would merge them and see something unchecked
            raise Refused("holds an attribute with two values")
        seen.add(number)
        if number in (5, 10):
            _check_tensor(protobuf_reader.content(value), state, depth)
        elif number in (6, 11):
            _check_graph(protobuf_reader.content(value), state, depth + 1)
        elif number in (22, 23):
            _check_sparse(protobuf_reader.content(value), state, depth)


def _check_sparse(content: memoryview, state: _State, depth: int) -> None:
    """Check a sparse tensor by its dense size, because runtimes make it dense."""
    dims: list[int] = []
    kinds = set()
    for number, value in protobuf_reader.fields(content):
        if number in (1, 2):
            if number in kinds:
                raise Refused("holds a sparse tensor with two sets of values")
            kinds.add(number)
            _check_tensor(protobuf_reader.content(value), state, depth)
        elif number == 3:
            dims += protobuf_reader.numbers(value)
    if _count(dims, "a sparse tensor") >= _MAX_BYTES:
        raise Refused(f"holds a sparse tensor of shape {dims}")


def _check_value(content: memoryview, state: _State, depth: int) -> None:
    """A declared input, output or intermediate: ValueInfoProto, its TypeProto, the tensor's type, its shape."""
    for number, declared in protobuf_reader.fields(content):
        if number != 2:
            continue
        for kind, tensor in protobuf_reader.fields(protobuf_reader.content(declared)):
            if kind not in (1, 8):
                continue
            for part, shape in protobuf_reader.fields(protobuf_reader.content(tensor)):
                if part == 2:
                    _check_shape(protobuf_reader.content(shape))


def _check_shape(content: memoryview) -> None:
    dims = [
        protobuf_reader.number(value)
        for number, dim in protobuf_reader.fields(content)
        if number == 1
        for kind, value in protobuf_reader.fields(protobuf_reader.content(dim))
        if kind == 1
    ]
    if _count([max(dim, 1) if dim >= 0 else dim for dim in dims], "a value") > _MAX_ELEMENTS:
        raise Refused(f"declares a value of shape {dims}")


@dataclass(slots=True)
class _Tensor:
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw_bytes: int | None = None
    entries: int = 0  # of the typed lists; at most
    name: str = ""
    is_external: bool = False
    place: dict[str, str] = field(default_factory=dict)


def _check_tensor(content: memoryview, state: _State, depth: int) -> None:
    tensor = _read_tensor(content)
    what = f"tensor {tensor.name!r}"
    count = _count(tensor.dims, what)
    if tensor.data_type not in ELEMENT_BITS:
        raise Refused(f"{what} is of the unknown type {tensor.data_type}")
    expected = -(-count * ELEMENT_BITS[tensor.data_type] // 8)
    if tensor.is_external or tensor.place:
        if not tensor.is_external:
            raise Refused(f"{what} is stored in a file of its own but is not marked as external")
        _check_external(tensor, expected, state)
    elif tensor.raw_bytes is not None:
        if tensor.raw_bytes != expected:
            raise Refused(f"{what} of shape {tensor.dims} needs {expected} bytes and holds {tensor.raw_bytes}")
    elif count > tensor.entries * _MAX_PER_ENTRY:
        raise Refused(f"{what} of shape {tensor.dims} holds {tensor.entries} values")


def _read_tensor(content: memoryview) -> _Tensor:
    tensor = _Tensor()
    for number, value in protobuf_reader.fields(content):
        if number == 1:
            tensor.dims += protobuf_reader.numbers(value)
        elif number == 2:
            tensor.data_type = protobuf_reader.number(value)
        elif number in _TYPED_DATA:
            tensor.entries += 1 if isinstance(value, int) or number == 6 else len(value) // _TYPED_DATA[number]
        elif number == 8:
            tensor.name = protobuf_reader.text(value)[:80]
        elif number == 9:
            tensor.raw_bytes = len(protobuf_reader.content(value))
        elif number == 13:
            _read_place(protobuf_reader.content(value), tensor.place)
        elif number == 14:
            tensor.is_external = protobuf_reader.number(value) == 1
    return tensor


def _read_place(content: memoryview, place: dict[str, str]) -> None:
    entry = {
        number: protobuf_reader.text(value) for number, value in protobuf_reader.fields(content) if number in (1, 2)
    }
    key = entry.get(1, "")
    if key in place:
        raise Refused(f"names the {key!r} of a tensor's data twice")
    place[key] = entry.get(2, "")


def _check_external(tensor: _Tensor, expected: int, state: _State) -> None:
    location = tensor.place.get("location", "")
    parts = PurePosixPath(location).parts
    if _IN_MEMORY in location:
        raise Refused(f"tensor {tensor.name!r} is stored at an address in memory")
    is_inside = parts and not PurePosixPath(location).is_absolute() and ".." not in parts and "\\" not in location
    if not is_inside or "\0" in location or PureWindowsPath(location).drive:
        raise Refused(f"tensor {tensor.name!r} is stored at {location!r}, which is not a file next to the model")
    path = state.folder
    for part in parts:
        path = path / part
        mode = path.lstat().st_mode if path.exists() or path.is_symlink() else 0
        if stat.S_ISLNK(mode):
            raise Refused(f"{location!r}, which holds weights, is a link; put the file itself next to the model")
    if not path.is_file():
        raise Refused(f"{location!r}, which holds weights, is missing or not a file")
    offset, length = _place_number(tensor.place, "offset"), _place_number(tensor.place, "length", expected)
    if length != expected or offset + length > path.stat().st_size:
        raise Refused(
            f"tensor {tensor.name!r} of shape {tensor.dims} needs {expected} bytes, but {location!r} does not have "
            f"{length} from byte {offset} for it"
        )
    state.data.add(str(PurePosixPath(location)))


def _place_number(place: dict[str, str], key: str, default: int = 0) -> int:
    text = place.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Refused(f"the {key} of a tensor's data is {text[:40]!r}")
    return int(text)


def _count(dims: list[int], what: str) -> int:
    if len(dims) > MAX_RANK or any(dim < 0 or dim >= 2**63 for dim in dims):
        raise Refused(f"{what} has the shape {dims[:MAX_RANK]}")
    return prod(dims)
