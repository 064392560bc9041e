"""A trial writes one file of the repaired network, and its accuracy is that file's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline as tiny
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.export.graph_slicing.resize_graph import UnfitError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.records import Event, Note, PrecisionRow, PruningPlan
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.search.evaluation import candidate_files, evaluator
from deploypipe.search.evaluation.accuracy_cache import AccuracyCache
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.early_stopping import draw_parts
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.task import take, take_calib


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, folder = tiny.build_model(), tmp_path_factory.mktemp("dense")
    export_onnx(model, take_calib(tiny.load_data().calib, 4), folder / "dense.onnx", Export(), template=folder / "t")
    return model, folder


@pytest.fixture
def subject(dense: tuple[nn.Module, Path], tmp_path: Path) -> tuple[Evaluator, PruningPlan, list[Event]]:
    model, folder = dense
    splits, told = tiny.load_data(), list[Event]()
    calib = take_calib(splits.calib, 128)
    structures = list_structures(model, take(calib[0][0], 2))
    plan = make_plan(structures, score_magnitudes(model, structures), {"blocks.0.conv1": 5}, ["blocks.1"])
    files = CandidateFiles(
        dense=model,
        dense_onnx=folder / "dense.onnx",
        dense_opened=folder / "dense.onnx",
        template=folder / "t",
        precision=PrecisionRow(precision="fp32", file=None),
        calib=calib,
        target=tiny.target(),
        builds_engines=False,
        export=Export(),
    )
    made = Evaluator(
        candidates=files,
        dense_p50_ms=None,
        calib=calib,
        parts=draw_parts(splits.val, 0),
        task=replace(tiny.task(), metric=lambda outputs, target: outputs.gather(1, target[:, None])[:, 0]),
        recipe=tiny.recipe(),
        needs_peak_memory=False,
        work=tmp_path,
        accuracies=AccuracyCache(tmp_path / "accuracies"),
        notify=told.append,
    )
    return made, plan, told


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Sequence[Any]]:
    calls, own = list[Sequence[Any]](), getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_one_file_serves_costs_and_accuracy(
    subject: tuple[Evaluator, PruningPlan, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, plan, told = subject
    slices = count_calls(monkeypatch, candidate_files, "slice_file")
    again = count_calls(monkeypatch, candidate_files, "slice_or_raise")
    opened = count_calls(monkeypatch, evaluator, "candidate_passes")
    candidate, seen = evaluate(plan, lambda *_: False)
    assert (len(slices), len(again), len(opened)) == (1, 0, 1) and not evaluate.candidates.exported
    pruned = apply_plan(evaluate.candidates.dense, plan)
    quick = replace(evaluate.recipe.repair, num_samples=evaluate.recipe.search.num_repair_samples)
    repaired, _ = repair(evaluate.candidates.dense, pruned, plan, evaluate.calib, quick, seed=evaluate.recipe.seed)
    expected = np.concatenate([evaluate_module(repaired, part, evaluate.task) for part in evaluate.parts])
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert candidate.accuracy == seen.mean() and told == []
    unrepaired = np.concatenate([evaluate_module(pruned, part, evaluate.task) for part in evaluate.parts])
    assert np.abs(unrepaired - seen).max() > 0.1


def test_known_samples_are_not_evaluated_again_and_the_rest_is_by_a_second_slice(
    subject: tuple[Evaluator, PruningPlan, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, plan, _ = subject
    _, seen = evaluate(plan, lambda *_: False)
    repairs = count_calls(monkeypatch, evaluator, "repair")
    np.testing.assert_array_equal(evaluate(plan, lambda *_: False)[1], seen)
    assert repairs == []
    monkeypatch.setattr(AccuracyCache, "of", lambda *_: seen[:3])  # too few for the first part
    again = count_calls(monkeypatch, candidate_files, "slice_or_raise")
    np.testing.assert_array_equal(evaluate(plan, lambda *_: False)[1], seen)
    assert len(repairs) == len(again) == 1


def test_one_note_says_that_networks_run_in_torch_where_no_file_can_be_sliced(
    subject: tuple[Evaluator, PruningPlan, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, plan, told = subject
    _, seen = evaluate(plan, lambda *_: False)

    def refuse(*_: Any, **__: Any) -> None:
        raise UnfitError("a node of unknown shape")

    monkeypatch.setattr(AccuracyCache, "of", lambda *_: seen[:3])
    monkeypatch.setattr(candidate_files, "slice_or_raise", refuse)
    for _ in range(2):
        np.testing.assert_allclose(evaluate(plan, lambda *_: False)[1], seen, atol=1e-4)
    assert [type(event) for event in told] == [Note] and "a node of unknown shape" in str(told[0])
