"""Latencies of candidates are measured once, and again only if another process disturbed them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline as tiny

from deploypipe.benchmark.latency import Timings
from deploypipe.recipe import Export
from deploypipe.records import PrecisionRow
from deploypipe.search.evaluation import candidate_files
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.latency_store import KnownLatency, LocalLatencyStore


class Interrupted(LocalLatencyStore):
    """Another process measured during the first `times` measurements."""

    def __init__(self, times: int) -> None:
        self.left, self.published = times, dict[str, float]()

    def find(self, key: str) -> KnownLatency | None:
        return None

    def publish(self, key: str, ratio: float, *, is_precise: bool) -> KnownLatency:
        self.published[key] = ratio
        return KnownLatency(ratio=ratio, measured_by="me")

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], bool]]:
        def was_alone() -> bool:
            self.left -= 1
            return self.left < 0

        yield was_alone


@pytest.mark.parametrize("times", [0, 2])
def test_a_disturbed_measurement_is_repeated(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, file = tmp_path / "dense.onnx", tmp_path / "candidate.onnx"
    taken: list[float] = []

    def time_interleaved(files: Sequence[Path], *_: Any, **__: Mapping[str, Any]) -> Timings:
        assert list(files) == [dense, file]
        taken.append(0.5 + 0.1 * (times - len(taken)))  # only the last is undisturbed
        return Timings(samples=(np.full(200, 1.0), np.full(200, taken[-1])), block=20)

    monkeypatch.setattr(candidate_files, "time_interleaved", time_interleaved)
    monkeypatch.setattr(CandidateFiles, "_key", lambda _, path: path.name)
    monkeypatch.setattr(CandidateFiles, "_feed", lambda *_: {})
    measuring = Interrupted(times)
    subject = CandidateFiles(
        dense=tiny.Network(),
        dense_onnx=dense,
        dense_opened=dense,
        template=dense,
        precision=PrecisionRow(precision="fp32", file=None),
        calib=(),
        target=tiny.target(),
        builds_engines=False,
        export=Export(),
        latency_store=measuring,
    )
    assert subject.latency_ratios([file], 200) == [pytest.approx(0.5)]
    assert len(taken) == times + 1 and subject.measured_by(file) == "me"
    assert subject.latency_ratios([file], 200) == [pytest.approx(0.5)] and len(taken) == times + 1
    assert measuring.published == {file.name: pytest.approx(0.5)}
