"""`deploypipe bench` on real files: what it measures, what it prints, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from typer.testing import CliRunner

from deploypipe.benchmark import BenchResult, bench_file
from deploypipe.benchmark.bench_file import PARTS, compare
from deploypipe.benchmark.input_batches import load_inputs, make_inputs, read_specs
from deploypipe.benchmark.latency import ROUND, schedule
from deploypipe.benchmark.operator_times import read_profile
from deploypipe.benchmark.sweeps import batch_sizes, count_cores, thread_counts
from deploypipe.cli import app
from deploypipe.errors import ConfigError, DataError, ModelError, RuntimeUnavailableError
from deploypipe.files.json_records import from_json, to_json
from deploypipe.records import Event, Interval, Started
from deploypipe.report.bench_tables import figure_rows, layer_rows, missing_lines, sweep_rows, verdict_lines
from deploypipe.target import Target

TARGET = Target(runtime="onnxruntime", name="here", batch_size=2)
NUM_ROWS = 7


def save(path: Path, nodes: list[Any], inputs: list[Any], constants: dict[str, np.ndarray]) -> Path:
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    values = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def dense(path: Path, batch: int | str = "N", width: int = 8, name: str = "x") -> Path:
    generator = np.random.default_rng(0)
    constants = {f"w{i}": generator.standard_normal((8, 8)).astype(np.float32) for i in range(2)}
    return save(
        path,
        [
            helper.make_node("MatMul", [name, "w0"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="between"),
            helper.make_node("MatMul", ["b", "w1"], ["y"], name="last"),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width])],
        constants,
    )


def tokens(path: Path) -> Path:
    """Looks `ids` up in a table of `NUM_ROWS`: a larger number fails."""
    return save(
        path,
        [
            helper.make_node("Gather", ["table", "ids"], ["found"]),
            helper.make_node("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["weights", "axes"], ["columns"]),
            helper.make_node("Mul", ["found", "columns"], ["y"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("ids", "mask")],
        {"table": np.ones((NUM_ROWS, 4), dtype=np.float32), "axes": np.array([2])},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    dense(folder / "dense.onnx")
    dense(folder / "fixed.onnx", batch=3)
    dense(folder / "other.onnx", name="z")
    tokens(folder / "tokens.onnx")
    (folder / "cut.onnx").write_bytes((folder / "dense.onnx").read_bytes()[:300])
    (folder / "here.toml").write_text('runtime = "onnxruntime"\nbatch_size = 2\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(files: Path) -> tuple[BenchResult, list[Event]]:
    """Everything there is to measure, of a file against itself."""
    events: list[Event] = []
    result = bench_file(files / "dense.onnx", TARGET, files / "dense.onnx", num_samples=80, notify=events.append)
    return result, events


def test_every_part_is_measured_or_has_a_reason(whole: tuple[BenchResult, list[Event]]) -> None:
    result, events = whole
    assert from_json(BenchResult, to_json(result), "result") == result
    assert [e.stage for e in events if isinstance(e, Started)] == list(PARTS)
    for file in (result.file, result.against):
        assert file is not None
        assert file.latency is not None and len(file.latency.samples_ms) == 80
        assert file.latency.p90_ms is not None and file.latency.p99_ms is None
        assert file.latency.throughput == pytest.approx(2e3 / file.latency.p50_ms.value)
        assert file.cold_start is not None and file.cold_start.repeats == 5
        least, middle, most = file.cold_start.total_ms
        assert 0 < least <= middle <= most
        assert [layer.op_type for layer in sorted(file.layers, key=lambda layer: layer.name)].count("MatMul") >= 1
        assert sum(layer.share for layer in file.layers) == pytest.approx(1)
        assert [point.batch_size for point in file.batches] == [1, 2, 4, 8, 16, 32, 64]
        assert all(point.throughput for point in (*file.batches, *file.threads))
        assert file.threads[0].num_threads == 1
        assert (file.energy is None) == ("energy" in file.missing)
    assert result.latency_ratio is not None
    assert result.comparison == compare(result.latency_ratio, result.conditions)
    assert result.conditions.verdict in ("steady", "throttled", "noisy")
    assert [(i.name, i.dtype, i.shape, i.source) for i in result.inputs] == [("x", "float32", (2, 8), "random")]


def test_tables_show_what_was_found(whole: tuple[BenchResult, list[Event]]) -> None:
    result, _ = whole
    heads, rows = figure_rows(result)
    cells = {row[0]: row for row in rows}
    assert heads == ("", "file", "against", "file / against")
    assert cells["latency p99"][1] == "needs 662 samples, has 80"
    assert cells["file size"][3] == "1.000x"
    assert {"latency p50", "latency p90", "throughput", "cold start"} <= cells.keys()
    shown = layer_rows(result.file.layers, most=1)
    assert len(shown) == 2 and shown[1][0].endswith(" more")
    assert len(sweep_rows(result.file.batches, (), by_threads=False)[0]) == 3
    assert result.against is not None
    assert len(sweep_rows(result.file.threads, result.against.threads, by_threads=True)[0]) == 5
    assert "at 95%" in verdict_lines(result)[0]
    if result.file.energy is None:
        assert any(line.startswith("energy: not measured: ") for line in missing_lines(result))


def test_only_the_parts_asked_for(files: Path) -> None:
    result = bench_file(files / "fixed.onnx", TARGET, parts=("batches", "layers"))
    assert result.file.latency is None and result.file.cold_start is None
    assert result.batch_size == 3 and "the batch is 3" in result.notes[0]
    assert "first axis" in result.file.missing["batches"]
    assert [row[0] for row in figure_rows(result)[1]] == ["file size"]
    for bad in ({"parts": ("speed",)}, {"parts": ()}, {"num_samples": 10}):
        with pytest.raises(ConfigError):
            bench_file(files / "dense.onnx", TARGET, **bad)


def test_inputs_are_made_to_fit_what_the_graph_takes(files: Path) -> None:
    path = files / "tokens.onnx"
    specs = read_specs(path)
    made = make_inputs(path, specs, 2, {"ids": (3, 50), "mask": (3, 50)})
    assert made["ids"].dtype == np.int64 and 1 < made["ids"].max() < NUM_ROWS
    assert made["mask"].min() == 1
    with pytest.raises(DataError, match=r"--shape ids=2x128 --shape mask=2x128"):
        make_inputs(path, specs, 2, {})
    with pytest.raises(DataError, match="no input words"):
        make_inputs(path, specs, 2, {"words": (1,)})
    with pytest.raises(DataError, match=r"takes x float32 \[3, 8\], and x is float32 \[4, 8\]"):
        make_inputs(files / "fixed.onnx", read_specs(files / "fixed.onnx"), 4, {"x": (4, 8)})
    result = bench_file(path, TARGET, shapes={"ids": (4, 5), "mask": (4, 5)}, parts=("latency",), num_samples=80)
    assert result.batch_size == 4


def test_the_users_own_inputs(files: Path, tmp_path: Path) -> None:
    batch = {"x": np.ones((5, 8), dtype=np.float32)}
    np.savez(tmp_path / "x.npz", **batch)
    save_file(batch, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.npz", tmp_path / "x.safetensors"):
        np.testing.assert_array_equal(load_inputs(path)["x"], batch["x"])
        result = bench_file(files / "dense.onnx", TARGET, inputs=path, parts=("layers",))
        assert (result.batch_size, result.inputs[0].source) == (5, str(path))
    assert bench_file(files / "dense.onnx", TARGET, inputs=batch, parts=("layers",)).inputs[0].source == "arrays"
    with pytest.raises(ConfigError, match="have their own shapes"):
        bench_file(files / "dense.onnx", TARGET, inputs=batch, shapes={"x": (1, 8)})


def test_profile_counts_the_last_runs_only() -> None:
    def node(name: str, begin: int, duration: int, op: str = "Conv") -> dict[str, Any]:
        about = {"op_name": op, "provider": "CPUExecutionProvider"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": duration, "args": about}

    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_loading", "ts": 0, "dur": 5}]
    for begin, slow in ((10, 90), (200, 3), (300, 5)):
        events.append({"cat": "Session", "name": "model_run", "ts": begin, "dur": 95})
        events += [node("a", begin + 1, slow), node("b", begin + 92, 1, "Relu"), node("b", begin + 94, 1, "Relu")]
    layers = read_profile(events, num_runs=2)
    assert [(x.name, x.op_type, x.time_us) for x in layers] == [("a", "Conv", 4.0), ("b", "Relu", 2.0)]
    assert layers[0].share == pytest.approx(2 / 3)
    assert read_profile([], num_runs=2) == ()


def test_schedule_opens_files_equally_often_in_every_order() -> None:
    for count, expected in ((80, (4, 20)), (400, (20, 20)), (662, (36, 20)), (4000, (40, 100))):
        assert schedule(count) == expected
        assert expected[0] % 4 == 0 and expected[1] % ROUND == 0
    assert schedule(400, most=8) == (8, 60)


def test_sweep_points(tmp_path: Path) -> None:
    assert batch_sizes() == [1, 2, 4, 8, 16, 32, 64]
    assert batch_sizes(2, 12) == [2, 4, 8]
    assert thread_counts(1) == [1]
    assert thread_counts(6) == [1, 2, 4, 6]
    cpuinfo = tmp_path / "cpuinfo"
    blocks = [f"processor\t: {i}\nphysical id\t: 0\ncore id\t\t: {i // 2}\nflags\t: a: b" for i in range(8)]
    cpuinfo.write_text("\n\n".join(blocks), encoding="utf-8")
    assert count_cores(8, cpuinfo) == 4
    assert count_cores(2, cpuinfo) == 2
    cpuinfo.write_text("processor\t: 0\n", encoding="utf-8")  # Arm
    assert count_cores(3, cpuinfo) == count_cores(3, tmp_path / "absent") == 3


def test_comparison_needs_the_whole_interval_on_one_side() -> None:
    assert compare(Interval(value=0.9, low=0.8, high=0.99)) == "faster"
    assert compare(Interval(value=1.1, low=1.01, high=1.2)) == "slower"
    assert compare(Interval(value=1.1, low=1.0, high=1.2)) == "no difference"


@pytest.mark.parametrize("verdict", ["throttled", "noisy"])
def test_a_comparison_on_a_machine_that_was_not_steady_is_unknown(
    verdict: Literal["throttled", "noisy"], whole: tuple[BenchResult, list[Event]]
) -> None:
    ratio, shaky = Interval(value=0.5, low=0.4, high=0.6), replace(whole[0].conditions, verdict=verdict)
    assert compare(ratio, shaky) == "unknown"
    assert compare(ratio, replace(shaky, verdict="steady")) == "faster"
    shown = verdict_lines(replace(whole[0], latency_ratio=ratio, comparison="unknown", conditions=shaky))[0]
    assert shown == f"unknown at 95%, as the machine was {verdict}: the time is 0.500x (0.400 to 0.600)"


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(files: Path, *arguments: str) -> Any:
    target = str(files / "here.toml")
    words = [str(files / word) if word.endswith(".onnx") else word for word in arguments]
    return CliRunner().invoke(app, ["bench", words[0], target, *words[1:]])


def test_command_prints_rows_and_writes_json(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--samples", "80", "--parts", "latency,layers,threads", "--json", str(out)]
    done = invoke(files, "dense.onnx", "--against", "fixed.onnx", "--shape", "x=3x8", *options)
    assert done.exit_code == 0, done.output
    for words in ("latency p50", "Slowest operators", "MatMul", "By threads", "The machine meanwhile", "conditions: "):
        assert words in done.output
    assert json.loads(out.read_text())["comparison"] in ("faster", "slower", "no difference", "unknown")
    assert from_json(BenchResult, out.read_text(), str(out)).batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.onnx"], "absent"),
        (["cut.onnx"], "cut.onnx: "),
        (["dense.onnx", "--against", "cut.onnx"], "cut.onnx: "),
        (["dense.onnx", "--against", "other.onnx"], "other.onnx: takes z float32 [N, 8], and z is missing"),
        (["tokens.onnx"], "--shape ids=2x128"),
        (["dense.onnx", "--shape", "x=0x8"], "--shape: x=0x8: is not a shape"),
        (["dense.onnx", "--shape", f"x={'1x' * 40}1"], "1x1: is not a shape"),
        (["dense.onnx", "--shape", f"x={'9' * 5000}"], "99: is not a shape"),
        (["dense.onnx", "--samples", "9" * 30], "too many; ask for 10,000,000 or fewer"),
        (["dense.onnx", "--shape", "x=2x9"], "x is float32 [2, 9]"),
        (["dense.onnx", "--parts", "latency,speed"], "--parts: speed: no such part"),
        (["dense.onnx", "--samples", "3"], "--samples: 3: too few"),
    ],
)
def test_bad_requests_end_with_two(files: Path, arguments: list[str], message: str) -> None:
    done = invoke(files, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_bad_input_files_end_with_two(files: Path, tmp_path: Path) -> None:
    arrays = {
        "wrong_name.npz": {"q": np.ones((2, 8), np.float32)},
        "wrong_type.npz": {"x": np.ones((2, 8))},
        "wrong_shape.npz": {"x": np.ones((2, 9), np.float32)},
        "wrong_rank.npz": {"x": np.ones(8, np.float32)},
        "empty.npz": {"x": np.ones((0, 8), np.float32)},
        "pickled.npz": {"x": np.array([{}], dtype=object)},
    }
    for name, batch in arrays.items():
        np.savez(tmp_path / name, **batch)
    np.save(tmp_path / "single.npy", np.ones(3))
    for name in ("text.npz", "text.safetensors"):
        (tmp_path / name).write_text("not arrays", encoding="utf-8")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wrong_type.npz").read_bytes()[:100])
    for path in (*sorted(tmp_path.iterdir()), tmp_path / "absent.npz", tmp_path / "absent.safetensors", tmp_path):
        done = invoke(files, "dense.onnx", "--inputs", str(path), "--parts", "latency")
        assert (done.exit_code, "Traceback" in done.output) == (2, False), f"{path}: {done.output}"
        assert done.output.startswith("error: "), done.output


def test_a_target_on_another_device(files: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(files / "dense.onnx"), "no_such_target"])
    assert (done.exit_code, "no target of this name" in done.output) == (2, True)
    with pytest.raises(RuntimeUnavailableError):
        bench_file(files / "dense.onnx", Target(runtime="tensorrt"))
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        bench_file(tmp_path / "absent.onnx", TARGET)
