"""Figures come from the files themselves, in the order of the samples, and have a reason if they are missing."""

import fcntl
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.benchmark import compare_files, first_batch, latency, measure, memory
from deploypipe.benchmark.accuracy import evaluate_file, evaluate_module
from deploypipe.benchmark.child_processes.run_child import run_child
from deploypipe.benchmark.described_split import DescribedSplit
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import (
    BLOCK,
    Timings,
    find_doubts,
    find_unsteadiness,
    read_state,
    summarise,
    time_file,
    time_interleaved,
    time_steadily,
)
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.errors import DataError, ModelError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.files.json_records import from_json, to_json
from deploypipe.recipe import Export
from deploypipe.records import BenchmarkReport, Event, MachineState, ModelFile, Progress
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.scheduling.exclusive_measurement import shared_machine, try_lock
from deploypipe.split_fingerprints import fingerprint_of
from deploypipe.target import Target
from deploypipe.task import Batch, classification, find_slices

TARGET = Target(runtime="onnxruntime", batch_size=2, num_latency_samples=205)


def mlp(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4096), nn.Linear(4096, 4)
    )


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 16, generator=generator), torch.arange(n) % 4) for n in (5, 1, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def large(folder: Path) -> ModelFile:
    return export_onnx(mlp(2048), batches(), folder / "large.onnx", Export())


@pytest.fixture(scope="module")
def small(folder: Path) -> ModelFile:
    return export_onnx(mlp(64), batches(), folder / "small.onnx", Export())


def test_report(folder: Path, large: ModelFile, small: ModelFile) -> None:
    report = compare_files(
        large,
        small,
        folder=folder,
        test_batches=batches(),
        task=classification(),
        target=TARGET,
        counts=((100, 1000), (10, 50)),
    )
    assert from_json(BenchmarkReport, to_json(report), "report") == report
    for measured, model, counts in ((report.dense, mlp(2048), (100, 1000)), (report.compressed, mlp(64), (10, 50))):
        assert (measured.num_params, measured.num_macs) == counts
        assert measured.latency is not None
        assert len(measured.latency.samples_ms) >= 205
        assert measured.latency.p90_ms is not None
        np.testing.assert_array_equal(measured.per_sample_metric, evaluate_module(model, batches(), classification()))
    assert report.latency_ratio is not None
    assert 0 < report.latency_ratio.low <= report.latency_ratio.value <= report.latency_ratio.high
    assert report.conditions is not None
    assert set(report.conditions.reasons) <= set(report.notes)
    assert report.accuracy_drop_pp is not None
    assert report.dense.peak_memory_mib is not None
    assert report.compressed.peak_memory_mib is not None
    weights_mib = (large.size_bytes - small.size_bytes) / 2**20  # about 32 MiB
    assert report.dense.peak_memory_mib - report.compressed.peak_memory_mib > 0.9 * weights_mib


def test_an_unsteady_measurement_is_repeated(folder: Path, small: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["it drifted"])
    monkeypatch.setattr(latency, "find_unsteadiness", lambda _: next(said, ""))
    monkeypatch.setattr(latency, "_PAUSE_SECONDS", 0)
    told: list[Event] = []
    measure(
        small,
        folder=folder,
        batches=batches(),
        task=classification(),
        target=TARGET,
        counts=(1, 1),
        notify=told.append,
    )
    assert told.count(Progress(stage="latency", message="the machine was not steady: measuring again")) == 1


def test_runtime_that_is_absent_measures_nothing(folder: Path, large: ModelFile, small: ModelFile) -> None:
    report = compare_files(
        large,
        small,
        folder=folder,
        test_batches=batches(),
        task=classification(),
        target=replace(TARGET, runtime="tensorrt"),
        counts=((1, 1), (1, 1)),
    )
    assert (report.latency_ratio, report.accuracy_drop_pp, report.dense.accuracy) == (None, None, None)
    assert (report.compressed.latency, report.compressed.peak_memory_mib) == (None, None)
    assert "tensorrt" in report.notes[0]


def test_a_split_is_described_while_it_is_read() -> None:
    passes = []

    class Split:
        def __iter__(self) -> Iterator[Batch]:
            passes.append(None)
            yield from batches()

    split = DescribedSplit(Split(), classification().slices)
    next(iter(split))
    assert not split.digest and not split.slices  # a part of it says nothing
    first, again = list(split), list(split)
    assert (split.digest, split.slices) == (fingerprint_of(batches()), find_slices(batches(), classification().slices))
    assert len(split.slices) > 1 and len(passes) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    without = DescribedSplit(batches(), None)
    assert list(without) and without.slices == {} and without.digest == split.digest


def test_a_measurement_runs_alone(
    folder: Path, small: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs, seen = folder / small.path, {"input": np.zeros((1, 16), dtype=np.float32)}, []

    def is_alone() -> bool:
        with next(tmp_path.glob("*-work.lock")).open("w") as room:
            return not try_lock(room, fcntl.LOCK_SH)

    def watched_child(*arguments: Any, **settings: Any) -> list[str]:
        seen.append(is_alone())
        return run_child(*arguments, **settings)

    monkeypatch.setattr(memory, "run_child", watched_child)
    with shared_machine(tmp_path):
        assert not is_alone()
        time_interleaved([path], inputs, OnnxRuntime(), TARGET, lambda event: seen.append(is_alone()), num_samples=20)
        in_time = len(seen)
        measure_peak_memory(path, inputs, TARGET)
        assert not is_alone()
    assert in_time and len(seen) > in_time and all(seen)


def test_memory_that_cannot_be_measured(folder: Path, small: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inputs = folder / small.path, {"input": np.zeros((1, 16), dtype=np.float32)}
    with pytest.raises(ModelError, match=r"absent\.onnx.*a process that runs it failed"):
        measure_peak_memory(folder / "absent.onnx", inputs, TARGET)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert measure_peak_memory(path, inputs, TARGET) == (
        None,
        "peak memory is read from /proc, which darwin does not have",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_memory_and_the_state_of_a_gpu(folder: Path, large: ModelFile) -> None:
    target, inputs = replace(TARGET, provider="cuda"), {"input": np.zeros((1, 16), dtype=np.float32)}
    peak, reason = measure_peak_memory(folder / large.path, inputs, target)
    assert not reason and peak is not None and peak > 2048 * 4096 * 4 / 2**20  # of the largest layer's weights
    state = read_state()
    assert state.gpu_clock_mhz and state.gpu_temperature_c


def test_evaluation_restores_the_mode_and_refuses_bad_data(folder: Path, small: ModelFile) -> None:
    model = mlp(64).train()
    model[1].eval()
    running = model[1].running_mean
    values = evaluate_module(model, batches(), classification())
    assert values.shape == (9,)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[1].running_mean is running
    path = folder / small.path
    for bad, message in (
        ([], "no samples"),
        ([(torch.full((2, 16), torch.nan), torch.zeros(2))], "NaN or infinity on batch 0"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate_module(model, bad, classification())
        with pytest.raises(DataError, match=message):
            evaluate_file(path, bad, classification(), OnnxRuntime(), 1)
    assert model.training
    scalar = replace(classification(), metric=lambda outputs, target: outputs.mean())
    with pytest.raises(DataError, match="one value per sample"):
        evaluate_module(model, batches(), scalar)
    with pytest.raises(DataError, match="empty"):
        measure(small, folder=folder, batches=[], task=classification(), target=TARGET, counts=(1, 1))


def test_latency_input_has_the_targets_batch_size() -> None:
    x = torch.arange(3.0).reshape(3, 1)
    assert first_batch([(x, None)], ["x"], 2)["x"].ravel().tolist() == [0, 1]
    assert first_batch([(x, None)], ["x"], 5)["x"].ravel().tolist() == [0, 1, 2, 0, 1]


def test_percentiles_need_their_samples(folder: Path, small: ModelFile) -> None:
    samples = np.linspace(1, 2, 662)
    assert summarise(samples, TARGET, block=1).p99_ms == pytest.approx(1.99, abs=0.01)
    assert summarise(samples[:661], TARGET, block=1).p99_ms is None
    assert summarise(samples[:63], TARGET, block=1).p90_ms is None
    inputs = {"input": np.zeros((1, 16), dtype=np.float32)}
    assert time_file(folder / small.path, inputs, OnnxRuntime(), TARGET, num_samples=13).shape == (13,)


@pytest.mark.parametrize(("num_wild", "taken"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_an_unsteady_machine_is_timed_again_a_few_times(
    num_wild: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = np.random.default_rng(0).normal(1, 0.01, 400)
    wild = calm * np.repeat([1.0, 1.5], 200)
    attempts = iter([Timings(samples=(calm, wild if number < num_wild else calm), block=20) for number in range(9)])
    done: list[Timings] = []
    monkeypatch.setattr(latency, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(latency, "time_interleaved", lambda *_: done.append(next(attempts)) or done[-1])
    assert time_steadily([], {}, OnnxRuntime(), TARGET) is done[-1]
    assert len(done) == taken
    assert bool(find_unsteadiness(done[-1].samples[1])) == (num_wild > 2)


def test_a_short_measurement_is_observed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process keeps all processors busy; the runs are over after 0.1 s, which tells nothing of that."""
    state = read_state()

    def busy_at(seconds: float) -> MachineState:
        return replace(state, at_s=seconds, own_s=0.0, busy_s=1e4 * seconds)

    brief = Timings(samples=(np.full(200, 1.0),), block=20, before=busy_at(0.0), after=busy_at(0.1))
    monkeypatch.setattr(latency, "_ATTEMPTS", 1)
    monkeypatch.setattr(latency, "sleep_without_blocking", lambda seconds: None)
    monkeypatch.setattr(latency, "read_state", lambda: busy_at(0.6))
    monkeypatch.setattr(latency, "time_interleaved", lambda *_: brief)
    assert find_doubts(brief, ["a"], 1) == ()
    seen = time_steadily([], {}, OnnxRuntime(), TARGET)
    assert "other processes kept" in find_doubts(seen, ["a"], 1)[0]
    assert time_steadily([], {}, OnnxRuntime(), TARGET, lambda _: None, False) is brief


def test_steadiness_verdict() -> None:
    generator = np.random.default_rng(0)
    calm = 5 + generator.normal(scale=0.1, size=40 * BLOCK)
    assert find_unsteadiness(calm) == ""
    assert "drifted by +18%" in find_unsteadiness(calm * np.repeat([1.0, 1.1, 1.2], [130, 140, 130]))
    assert "spreads over" in find_unsteadiness(calm * np.resize([1.0, 1.5, 1.0], len(calm)))
    calm[::50] *= 10  # rare interruptions do not matter to a median
    assert find_unsteadiness(calm) == ""


def test_environment_fingerprint_is_stable_and_depends_on_threads() -> None:
    one = describe_environment(1)
    assert one.device_fingerprint == describe_environment(1).device_fingerprint
    assert one.device_fingerprint != describe_environment(2).device_fingerprint
    assert one.cpu
    assert one.num_cpus >= 1
    assert {"python", "torch", "onnxruntime"} <= one.versions.keys()
