"""Untrusted files: a sound one passes; a truncated, inconsistent or hostile one is refused before it is loaded."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploypipe.errors import ModelError
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file

Make = Callable[[Path], onnx.ModelProto]


def model(*initializers: onnx.TensorProto, nodes: int = 1) -> onnx.ModelProto:
    """y = x + w, and more nodes that do nothing."""
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y0"])]
        + [helper.make_node("Identity", [f"y{i}"], [f"y{i + 1}"]) for i in range(nodes - 1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info(f"y{nodes - 1}", TensorProto.FLOAT, ["n", 3])],
        [weight, *initializers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def tensor(dims: list[int], data_type: int = TensorProto.FLOAT, raw: bytes | None = b"") -> onnx.TensorProto:
    made = TensorProto(name="t", data_type=data_type, dims=dims)
    if raw is not None:
        made.raw_data = raw
    return made


def outside(location: str, **more: str) -> onnx.TensorProto:
    made = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        made.external_data.add(key=key, value=value)
    return made


def save(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_sound_file(tmp_path: Path) -> None:
    checked = check_onnx_file(save(tmp_path / "m.onnx", model(nodes=5)))
    assert (checked.opset, checked.num_nodes, checked.data) == (20, 5, ())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3), np.float32),
        np.array(["a", "b"], dtype=object),
        np.array([True, False]),
        np.zeros(5, np.float16),
        np.zeros((2, 2), np.complex64),
    ],
    ids=str,
)
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_all_kinds(array: np.ndarray, raw: bool, tmp_path: Path) -> None:  # type: ignore[type-arg]
    if raw:
        made = numpy_helper.from_array(array, "t")
    else:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        made = helper.make_tensor("t", kind, array.shape, array.ravel().tolist())
    check_onnx_file(save(tmp_path / "m.onnx", model(made)))


def test_four_bits(tmp_path: Path) -> None:
    check_onnx_file(save(tmp_path / "m.onnx", model(helper.make_tensor("t", TensorProto.INT4, [3], [1, 2, 3]))))


def test_data_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(32))
    proto = model(outside("w.bin", offset="16", length="16"))
    assert check_onnx_file(save(tmp_path / "m.onnx", proto)).data == ("w.bin",)


HOSTILE: dict[str, tuple[onnx.TensorProto, str]] = {
    "larger than the file": (tensor([10_000, 10_000], raw=bytes(8)), "needs 400000000 bytes and holds 8"),
    "no data": (tensor([1 << 40], raw=None), "holds 0 values"),
    "overflow": (tensor([2**62, 2**62, 4], raw=bytes(4)), "needs"),
    "overflow to zero": (tensor([2**32, 2**32], raw=b""), "needs"),
    "negative": (tensor([-1, 4], raw=b""), "has the shape"),
    "two negatives": (tensor([-2, -2], raw=bytes(16)), "has the shape"),
    "many axes": (tensor([1] * 1000, raw=bytes(4)), "has the shape"),
    "type": (tensor([1], data_type=99, raw=bytes(4)), "unknown type 99"),
    "absolute": (outside("/etc/passwd"), "not a file next to the model"),
    "parent": (outside("../secret.bin"), "not a file next to the model"),
    "parent inside": (outside("a/../../secret.bin"), "not a file next to the model"),
    "windows": (outside("..\\secret.bin"), "not a file next to the model"),
    "drive": (outside("C:secret.bin"), "not a file next to the model"),
    "nothing": (outside(""), "not a file next to the model"),
    "zero byte": (outside("w.bin\0.txt"), "not a file next to the model"),
    "memory address": (outside("*/_ORT_MEM_ADDR_/*", offset="4096", length="16"), "an address in memory"),
    "absent": (outside("absent.bin"), "missing"),
    "folder": (outside("folder"), "not a file"),
    "link": (outside("link.bin"), "is a link"),
    "linked folder": (outside("linked/secret.bin"), "is a link"),
    "beyond the end": (outside("w.bin", offset="8", length="16"), "does not have"),
    "short": (outside("w.bin", length="8"), "does not have"),
    "offset": (outside("w.bin", offset="-8"), "offset of a tensor's data is '-8'"),
    "huge offset": (outside("w.bin", offset="9" * 5000), "offset of a tensor's data"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function"])
def test_hostile_tensors(name: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "inner" / "folder").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "inner" / "w.bin").write_bytes(bytes(16))
    (tmp_path / "inner" / "link.bin").symlink_to(tmp_path / "secret.bin")
    (tmp_path / "inner" / "linked").symlink_to(tmp_path)
    made, message = HOSTILE[name]
    proto = model(*([made] if where == "initializer" else []))
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=made))
    if where == "attribute":
        proto.graph.node.append(constant)
    elif where == "subgraph":
        body = helper.make_graph([], "body", [], [], [made])
        proto.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body))
    elif where == "function":
        proto.functions.append(onnx.FunctionProto(name="f", domain="d", node=[constant]))
    path = save(tmp_path / "inner" / "m.onnx", proto)
    with pytest.raises(ModelError, match=message) as caught:
        check_onnx_file(path)
    assert str(path) in str(caught.value) and "get the file again" in str(caught.value)


@pytest.mark.parametrize("dims", [[1], [2**40, 2], [-1], [1] * 33], ids=str)
def test_packed_dims(dims: list[int], tmp_path: Path) -> None:
    """Some writers pack what the schema does not, and parsers take both."""
    packed = b"".join(_varint(dim % 2**64) for dim in dims)
    made = TensorProto.FromString(b"\x0a" + _varint(len(packed)) + packed)
    assert list(made.dims) == dims
    raw = b"\x0a" + _varint(len(packed)) + packed + tensor([], raw=bytes(4)).SerializeToString()
    node = b"\x2a" + _varint(len(raw)) + raw  # AttributeProto.t
    attribute = b"\x2a" + _varint(len(node)) + node  # NodeProto.attribute
    function = b"\x3a" + _varint(len(attribute)) + attribute  # FunctionProto.node
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString() + b"\xca\x01" + _varint(len(function)) + function)
    if dims == [1]:
        check_onnx_file(path)
    else:
        with pytest.raises(ModelError, match=r"needs|has the shape|axes"):
            check_onnx_file(path)


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def huge_input() -> onnx.ModelProto:
    proto = model()
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2**40, 2**40]))
    return proto


def nested() -> onnx.ModelProto:
    proto = model()
    body = helper.make_graph([], "body", [], [])
    for _ in range(20):
        body = helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=body)], "body", [], [])
    proto.graph.node.extend(body.node)
    return proto


def sparse() -> onnx.ModelProto:
    proto = model()
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, int))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**20, 2**20]))
    return proto


def with_opset(version: int) -> onnx.ModelProto:
    proto = model()
    proto.opset_import[0].version = version
    return proto


def without(field: str) -> onnx.ModelProto:
    proto = model()
    proto.ClearField(field)
    return proto


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (huge_input, "declares a value of shape"),
        (nested, "nests graphs more than 16 deep"),
        (sparse, "sparse tensor of shape"),
        (lambda: with_opset(10**6), "version 1000000 of the operators"),
        (lambda: with_opset(-1), "version -1 of the operators"),
        (lambda: without("graph"), "is cut off"),
        (lambda: without("opset_import"), "is cut off"),
        (lambda: without("ir_version"), "is cut off"),
    ],
    ids=["input", "nested", "sparse", "opset", "negative opset", "no graph", "no opset", "no version"],
)
def test_hostile_models(make: Callable[[], onnx.ModelProto], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        check_onnx_file(save(tmp_path / "m.onnx", make()))


def test_too_many_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploypipe.untrusted_files.onnx_file_check._MAX_NODES", 10)
    check_onnx_file(save(tmp_path / "m.onnx", model(nodes=10)))
    with pytest.raises(ModelError, match="more than 10 nodes"):
        check_onnx_file(save(tmp_path / "m.onnx", model(nodes=11)))


def test_what_a_parser_would_merge(tmp_path: Path) -> None:
    """Two graphs, of which each is sound and both together may not be."""
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString() + without("opset_import").SerializeToString())
    with pytest.raises(ModelError, match="two graphs"):
        check_onnx_file(path)


@pytest.mark.parametrize("content", [b"", b"\x00", b"PK\x03\x04 something else", b"\xff" * 64, bytes(100)])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX file"):
        check_onnx_file(path)
    for absent in (tmp_path, tmp_path / "absent.onnx"):
        with pytest.raises(ModelError, match=r"is not a file|is missing"):
            check_onnx_file(absent)


CONTENT = model(nodes=4).SerializeToString()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for end in range(0, len(CONTENT), 3):
        path.write_bytes(CONTENT[:end])
        with pytest.raises(ModelError):
            check_onnx_file(path)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_refused_or_harmless(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Whatever the bytes: an answer within a second, and no other exception than ours."""
    damaged = bytearray(CONTENT)
    for position, value in changes:
        damaged[position] = value
    path = tmp_path / f"{os.getpid()}.onnx"
    path.write_bytes(damaged)
    try:
        check_onnx_file(path)
    except ModelError as error:
        assert str(path) in str(error)


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dims=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6), size=st.integers(0, 64))
def test_a_tensor_has_the_size_it_declares(dims: list[int], size: int, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", model(tensor(dims, raw=bytes(size))))
    count = 1
    for dim in dims:
        count *= dim
    if all(dim >= 0 for dim in dims) and 4 * count == size:
        check_onnx_file(path)
    else:
        with pytest.raises(ModelError):
            check_onnx_file(path)
