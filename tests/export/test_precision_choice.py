"""Which precision ships: it must be faster on the device, within its limits, and measured."""

from pathlib import Path

import pytest
import tiny_pipeline as tiny

from deploypipe.errors import ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.quantization.precision_choice import choose_precision, decide_precision
from deploypipe.recipe import Export, Int8
from deploypipe.records import Interval, PrecisionChoice
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.target import Precision, Target


def about(value: float, width: float = 0.02) -> Interval:
    return Interval(value=value, low=value - width, high=value + width, confidence=0.95)


ALL: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@pytest.mark.parametrize(
    ("allowed", "ratios", "chosen"),
    [
        (ALL, {"fp32": 1.0, "fp16": 0.9, "int8": 0.5}, "int8"),
        (ALL, {"fp32": 1.0, "fp16": 1.3, "int8": 1.6}, "fp32"),
        (ALL, {"fp32": 1.0, "fp16": 0.99, "int8": 1.6}, "fp32"),  # not distinguishable from fp32
        (("fp16", "int8"), {"fp32": 1.0, "fp16": 1.3, "int8": 1.6}, "fp16"),  # fp32 was not asked for
        (("fp32", "int8"), {"fp32": 1.0, "int8": 0.9}, "int8"),
        (("int8", "fp16"), {}, "int8"),  # not timed: the target's order
        (("fp16",), {}, "fp16"),
    ],
)
def test_the_fastest_precision_is_chosen(allowed: tuple[Precision, ...], ratios: dict[str, float], chosen: str) -> None:
    decided, why = decide_precision(allowed, {name: about(value) for name, value in ratios.items()})
    assert decided == chosen and why


def choose(folder: Path, *precisions: Precision, settings: Export = Export(), runs: bool = True) -> PrecisionChoice:  # noqa: B008
    splits = tiny.load_data()
    calib, val = list(splits.calib), list(splits.val)
    source = export_onnx(tiny.build_model(), calib[:1], folder / "model.onnx", settings)
    (folder / "work").mkdir()
    return choose_precision(
        source,
        folder,
        folder / "work",
        calib=calib,
        val=val,
        task=tiny.task(),
        target=Target(runtime="onnxruntime", precisions=precisions, num_latency_samples=200),
        settings=settings,
        runtime=OnnxRuntime() if runs else None,
    )


def test_every_precision_is_converted_evaluated_and_timed(tmp_path: Path) -> None:
    choice = choose(tmp_path, *ALL)
    assert [row.precision for row in choice.rows] == list(ALL)
    assert all(row.latency_ratio and (row.precision == "fp32" or row.conversion) for row in choice.rows)
    assert choice.file.precision == choice.chosen
    for row in choice.rows[1:]:
        assert row.file and (tmp_path / "work" / row.file.path).stat().st_size == row.file.size_bytes
        assert row.conversion and row.conversion.accuracy is not None


def test_nothing_is_timed_for_an_absent_device(tmp_path: Path) -> None:
    choice = choose(tmp_path, "int8", "fp32", runs=False)
    assert choice.chosen == "int8" and "nothing was timed" in choice.reason
    assert not any(row.latency_ratio for row in choice.rows)


def test_a_precision_that_misses_its_limits_is_a_row_with_the_reason(tmp_path: Path) -> None:
    strict = Export(max_abs_error_fp16=0.0, int8=Int8(max_drop_pp=0.0))
    choice = choose(tmp_path, "fp32", "fp16", settings=strict, runs=False)
    fp16 = next(row for row in choice.rows if row.precision == "fp16")
    assert choice.chosen == "fp32" and fp16.file is None and "max_abs_error_fp16" in fp16.reason


def test_an_error_if_no_precision_is_within_its_limits(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"no precision of the target.*fp16.*target\.precisions"):
        choose(tmp_path, "fp16", settings=Export(max_abs_error_fp16=0.0), runs=False)
