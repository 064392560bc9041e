"""A finished run whose model is real and tiny, so that it can be released and replayed."""

from dataclasses import replace
from pathlib import Path

import finished_runs
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from deploypipe import records as r
from deploypipe.export.onnx_export.golden_samples import write_golden
from deploypipe.export.onnx_export.parity import limit_of
from deploypipe.files.hashing import file_sha256
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.release.gate import decide
from deploypipe.runs.result import RunResult, save_result
from deploypipe.target import Budget

MODEL = "model.onnx"


def write_model(path: Path, seed: int = 0) -> r.ModelFile:
    """A linear layer."""
    weight = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return r.ModelFile(
        path=path.name,
        sha256=file_sha256(path),
        size_bytes=path.stat().st_size,
        precision="fp32",
        opset=20,
        max_abs_error=0.0,
        input_names=("input",),
        output_names=("output",),
    )


def write_run(folder: Path, *, seed: int = 0, num_wrong: int = 0, **budget: float) -> RunResult:
    """A run folder; `num_wrong` of 500 test samples more are wrong than in the dense network."""
    folder.mkdir(parents=True)
    file = write_model(folder / MODEL, seed)
    golden = write_golden(folder, {MODEL: file}, [(torch.randn(4, 4), torch.zeros(4))])
    made = finished_runs.finished_run()
    right = (1.0,) * (490 - num_wrong) + (0.0,) * (10 + num_wrong)
    exported = replace(file, path="10-export-0123456789abcdef/compressed.onnx")  # where a real run has it
    report = replace(
        made.benchmark,
        compressed=replace(made.benchmark.compressed, file=exported, per_sample_metric=right),
        accuracy_drop_pp=interval_of_drop_pp(made.benchmark.dense.per_sample_metric, right),
        slices={"class 0": tuple(range(250)), "class 1": tuple(range(250, 500))},
        test_data="digits",
        measured_at="2026-11-20T12:00:00+00:00",
    )
    target = replace(made.target, budget=Budget(latency_p50="0.7x", accuracy_drop_pp=2.0, **budget))
    origin = r.Origin(model="m", data="d", source="s", packages={"torch": "2.13.0", "deploypipe": "0.1"})
    result = replace(made, benchmark=report, target=target, golden=golden, origin=origin)
    result = replace(result, decision=decision_of(result))
    save_result(folder, result)
    return result


def decision_of(result: RunResult) -> r.GateDecision:
    """By the gate, as a run has it."""
    limit = limit_of(result.recipe.export, result.benchmark.compressed.file.precision)
    return decide(result.benchmark, result.target.budget, parity_limit=limit)
