"""What is predicted is what the graph holds, and it ranks real files as measuring does."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.errors import DataError, ModelError
from deploypipe.search.cost_models.memory_model import fit_memory
from deploypipe.search.cost_models.onnx_memory_plan import Footprint, GraphTensor, Step, footprint, peak_bytes
from deploypipe.target import Target

IMAGE = ["batch", 3, 8, 8]


def floats(*shape: int) -> GraphTensor:
    return GraphTensor(shape=shape, bits=32)


def conv(weight: str, source: str, out: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [out], pads=[1, 1, 1, 1])


def array(name: str, *shape: int, dtype: str = "float32") -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    shape: Sequence[str | int] = IMAGE,
    outputs: Sequence[str] = ("y",),
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[Step], dict[str, GraphTensor], set[str]]:
    """Every tensor of a shape of its own, so that none can take another's memory."""
    steps: list[Step] = []
    names: list[str] = []
    for i in range(draw(st.integers(1, 8))):
        reads = draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []
        writes = [f"t{i}.{k}" for k in range(draw(st.integers(1, 2)))]
        steps.append(Step(reads=tuple(reads), writes=tuple(writes), is_in_place=draw(st.booleans())))
        names += writes
    sizes = draw(st.lists(st.integers(1, 50), min_size=len(names), max_size=len(names), unique=True))
    kept = draw(st.sets(st.sampled_from(names)))
    return steps, {name: floats(size) for name, size in zip(names, sizes, strict=True)}, kept


@given(dags())
def test_liveness_is_what_counting_at_every_step_finds(
    dag: tuple[list[Step], dict[str, GraphTensor], set[str]],
) -> None:
    steps, tensors, kept = dag

    def held(name: str, now: int) -> bool:
        written = next(i for i, step in enumerate(steps) if name in step.writes)
        is_read_later = any(name in step.reads for step in steps[now:])
        return written == now or (written < now and (is_read_later or name in kept))

    peaks = [sum(t.num_bytes for name, t in tensors.items() if held(name, now)) for now in range(len(steps))]
    assert peak_bytes(steps, tensors, kept) == max(peaks)


def test_memory_is_shared_by_views_by_outputs_in_place_and_by_the_next_of_a_shape() -> None:
    def peak(*steps: Step, shapes: dict[str, int]) -> int:
        return peak_bytes(steps, {name: floats(size) for name, size in shapes.items()}, {"d"})

    a, b = Step(reads=(), writes=("a",)), Step(reads=("a",), writes=("b",))
    assert peak(a, b, shapes={"a": 5, "b": 7}) == 4 * 12
    assert peak(a, b, shapes={"a": 5, "b": 5}) == 4 * 10  # a is read while b is written
    in_place = Step(reads=("a",), writes=("b",), is_in_place=True)
    assert peak(a, in_place, shapes={"a": 5, "b": 5}) == 4 * 5
    also_read = Step(reads=("a", "b"), writes=("c",))
    assert peak(a, in_place, also_read, shapes={"a": 5, "b": 5, "c": 1}) == 4 * 11
    view = Step(reads=("a",), writes=("b",), is_view=True)
    assert peak(a, view, also_read, shapes={"a": 5, "b": 5, "c": 1}) == 4 * 6
    chain = (a, b, Step(reads=("b",), writes=("c",)), Step(reads=("c",), writes=("d",)))
    assert peak(*chain, shapes={"a": 5, "b": 7, "c": 9, "d": 1}) == 4 * (7 + 9)
    assert peak(*chain, shapes={"a": 5, "b": 7, "c": 9, "d": 5}) == 4 * (5 + 7 + 9)  # a's is held for d
    assert peak(*chain, shapes={"a": 5, "b": 7, "c": 5, "d": 1}) == 4 * (5 + 7)  # c lies where a lay


def test_chain_of_known_shapes(tmp_path: Path) -> None:
    nodes = [
        conv("w1", "x", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        conv("w2", "b", "c"),
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([0, -1]))),
        helper.make_node("Reshape", ["c", "shape"], ["y"]),
    ]
    path = save(tmp_path / "chain.onnx", nodes, [array("w1", 16, 3, 3, 3), array("w2", 4, 16, 3, 3)])
    weights = 4 * (16 * 3 * 9 + 4 * 16 * 9) + 2 * 8
    for batch_size in (1, 5):
        expected = Footprint(weight_bytes=weights, activation_bytes=4 * batch_size * 64 * (16 + 4))
        assert footprint(path, batch_size) == expected


def test_weights_beside_the_file_count_and_are_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "inside.onnx", [conv("w", "x", "y")], [array("w", 64, 3, 3, 3)])
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(path), outside, save_as_external_data=True, location="data", size_threshold=0)
    assert footprint(outside, 2) == footprint(path, 2)
    assert footprint(outside, 2).weight_bytes == (tmp_path / "data").stat().st_size


def test_8_bits_between_quantised_operators_and_32_for_halves(tmp_path: Path) -> None:
    scale, zero = array("s"), array("z", dtype="uint8")

    def quantised(name: str) -> list[onnx.NodeProto]:
        linear = [("QuantizeLinear", name, f"{name}.q"), ("DequantizeLinear", f"{name}.q", f"{name}.d")]
        return [helper.make_node(kind, [source, "s", "z"], [out]) for kind, source, out in linear]

    weight = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["w.d"])
    nodes = [weight, *quantised("x"), conv("w.d", "x.d", "a"), helper.make_node("Relu", ["a"], ["b"]), *quantised("b")]
    tail = helper.make_node("GlobalAveragePool", ["b.d"], ["y"])
    path = save(tmp_path / "q.onnx", [*nodes, tail], [array("w", 16, 3, 3, 3, dtype="uint8"), scale, zero])
    # GlobalAveragePool writes floats, so that it reads floats too
    assert footprint(path, 2) == Footprint(weight_bytes=16 * 27 + 5, activation_bytes=2 * 16 * 64 * (1 + 4))
    inner = [*nodes, conv("v.d", "b.d", "c"), *quantised("c"), helper.make_node("GlobalAveragePool", ["c.d"], ["y"])]
    inner.insert(0, helper.make_node("DequantizeLinear", ["v", "s", "z"], ["v.d"]))
    weights = [array(name, 16, n, 3, 3, dtype="uint8") for name, n in (("w", 3), ("v", 16))]
    path = save(tmp_path / "q2.onnx", inner, [*weights, scale, zero])
    # the first 8-bit tensor's memory is taken again by none: of b only b.q is made, then c.q, then c.d in floats
    assert footprint(path, 2).activation_bytes == 2 * 16 * 64 * (1 + 4)

    cast = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    back = helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)
    half = save(tmp_path / "h.onnx", [cast, conv("w", "h", "i"), back], [array("w", 16, 3, 3, 3, dtype="float16")])
    assert footprint(half, 1) == Footprint(weight_bytes=4 * 16 * 27, activation_bytes=4 * 64 * (3 + 16))


def test_axes_of_any_size(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [conv("w", "x", "y")], [array("w", 2, 3, 3, 3)], ["n", 3, "height", 8])
    assert footprint(path, 3, {"height": 10}).activation_bytes == 4 * 3 * 2 * 10 * 8
    with pytest.raises(ModelError, match=r"axis 2 of input 'x' has any size.*'height'.*`dynamic`"):
        footprint(path, 3)
    fixed = save(tmp_path / "f.onnx", [conv("w", "x", "y")], [array("w", 2, 3, 3, 3)], [4, 3, 8, 8])
    assert footprint(fixed, 4).activation_bytes == 4 * 4 * 2 * 64
    with pytest.raises(ModelError, match="takes batches of 4, not 1"):
        footprint(fixed, 1)


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    unknown = save(tmp_path / "u.onnx", [helper.make_node("Own", ["x"], ["y"], name="own", domain="other")], [])
    with pytest.raises(ModelError, match="Own 'own' writes a tensor of unknown shape; measure"):
        footprint(unknown, 1)
    branch = helper.make_graph([], "b", [], [])
    looped = save(
        tmp_path / "l.onnx", [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)], []
    )
    with pytest.raises(ModelError, match="If '' holds graphs of its own"):
        footprint(looped, 1)
    clash = save(tmp_path / "c.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [array("w", 5, 5)])
    with pytest.raises(ModelError, match=r"c\.onnx: its shapes do not fit together .*MatMul"):
        footprint(clash, 1)
    with pytest.raises(ModelError, match="is absent"):
        footprint(tmp_path / "absent.onnx", 1)


def of(weights_mib: float, activations_mib: float) -> Footprint:
    return Footprint(weight_bytes=round(weights_mib * 2**20), activation_bytes=round(activations_mib * 2**20))


def test_fit_finds_what_made_the_peaks() -> None:
    files = [of(w, a) for w, a in ((400, 50), (200, 300), (100, 20), (30, 90), (10, 500))]
    peaks = [12 + 1.4 * f.weight_bytes / 2**20 + 3.1 * f.activation_bytes / 2**20 for f in files]
    model = fit_memory(files, peaks)
    assert model == fit_memory(files, peaks)
    assert (model.per_weight, model.per_activation) == pytest.approx((1.4, 3.1), rel=0.02)
    predicted = model.predict(of(150, 150))
    assert predicted.value == pytest.approx(12 + 150 * 4.5, rel=0.02)
    assert predicted.low < predicted.value < predicted.high


def test_one_file_fixes_the_base_and_is_less_sure() -> None:
    one = fit_memory([of(10, 4)], [40.0])
    assert (one.per_weight, one.per_activation) == pytest.approx((2.0, 2.6))
    assert one.base_mib == pytest.approx(40 - 20 - 4 * 2.6)
    two = fit_memory([of(10, 4), of(5, 2)], [40.0, 40 - 10 - 5.2])

    def width(model: object, file: Footprint) -> float:
        interval = model.predict(file)  # type: ignore[attr-defined]
        return float(interval.high - interval.low)

    assert width(two, of(5, 2)) < width(one, of(5, 2))
    assert width(one, of(10, 4)) < width(one, of(5, 2)) < width(one, of(1, 1))
    off = fit_memory([of(10, 4), of(5, 2), of(10, 4)], [40.0, 24.8, 50.0])
    assert width(off, of(5, 2)) > width(two, of(5, 2))
    shrinking = fit_memory([of(10, 1), of(100, 1)], [40.0, 20.0])  # weights do not free memory
    assert shrinking.per_weight == 0


def test_fit_refuses_what_was_not_measured() -> None:
    with pytest.raises(DataError, match="0 footprints and 0 measured peaks"):
        fit_memory([], [])
    with pytest.raises(DataError, match="1 footprints and 2 measured peaks"):
        fit_memory([of(1, 1)], [1.0, 2.0])
    with pytest.raises(DataError, match="measured peaks are"):
        fit_memory([of(1, 1)], [float("nan")])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is measured on Linux only")
def test_prediction_is_near_what_a_process_takes(tmp_path: Path) -> None:
    """Fitted on two files with few weights; the others have up to 200 times as many, and other activations."""
    target = Target(runtime="onnxruntime", batch_size=4)
    files = []
    for width, size in ((64, 64), (128, 128), (1024, 32), (2048, 8)):
        weights = [array("w1", 32, 3, 3, 3), array("w2", width, 32, 3, 3), array("w3", width, width)]
        nodes = [
            conv("w1", "x", "a"),
            conv("w2", "a", "b"),
            helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "w3"], ["y"]),
        ]
        path = save(tmp_path / f"{width}.onnx", nodes, weights, ["batch", 3, size, size])
        peak, _ = measure_peak_memory(path, {"x": np.ones((4, 3, size, size), np.float32)}, target)
        assert peak is not None
        files.append((footprint(path, 4), peak))
    model = fit_memory([f for f, _ in files[:2]], [peak for _, peak in files[:2]])
    for held_out, measured in files[2:]:
        assert measured > 1.5 * files[0][1]
        assert model.predict(held_out).value == pytest.approx(measured, rel=0.3)
