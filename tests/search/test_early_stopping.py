"""The seed alone decides which samples come first, and trials that are no worse are almost never stopped."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from deploypipe.benchmark.forward_passes import ForwardPasses
from deploypipe.data import TensorBatches
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.numerics.paired_comparison import chance_if_not_worse
from deploypipe.search.evaluation.early_stopping import (
    draw_parts,
    evaluate_growing,
    interim_sample_counts,
    is_certainly_worse,
)
from deploypipe.search.evaluation.held_val import hold
from deploypipe.search.sample_results import Results, decode_results, encode_results
from deploypipe.task import Batch, Task, num_samples

TASK = Task(loss=lambda outputs, _: outputs.sum(), metric=lambda outputs, target: (outputs[:, 0] == target).float())


@pytest.mark.parametrize(
    ("count", "ends"),
    [(5000, (625, 1250, 2500, 5000)), (2000, (500, 1000, 2000)), (872, (500, 872)), (300, (300,)), (1, (1,))],
)
def test_interim_tests_grow_from_500_samples_to_all(count: int, ends: tuple[int, ...]) -> None:
    assert interim_sample_counts(count) == ends


def ragged(count: int) -> list[Batch]:
    """Sample i holds i, in batches of 64 that are of different lengths."""
    values = torch.arange(float(count)).split(64)
    return [({"ids": v[:, None].expand(-1, 3 + i % 2), "mask": torch.ones(len(v), 3)}, v) for i, v in enumerate(values)]


def test_every_sample_is_in_one_part_and_the_seed_decides_which() -> None:
    first = draw_parts(ragged(1100), seed=0)
    drawn = [torch.cat([target for _, target in part]) for part in first]
    assert [len(d) for d in drawn] == [500, 50, 550]
    assert sorted(torch.cat(drawn).tolist()) == list(range(1100))
    assert 450 < drawn[0].mean() < 650  # not the first ones
    again, other, negative = (draw_parts(ragged(1100), seed=s) for s in (0, 1, -1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first[0], again[0], strict=True))
    assert len({str(torch.cat([t for _, t in p[0]]).tolist()) for p in (first, other, negative)}) == 3
    for inputs, target in first[0]:
        assert torch.equal(inputs["ids"][:, 0], target) and len(inputs["mask"]) == len(target) == num_samples(inputs)


@pytest.mark.parametrize("most_bytes", [0, 9_000])
def test_samples_beyond_the_memory_are_the_same_from_a_file(most_bytes: int, tmp_path: Path) -> None:
    val = [
        ({**inputs, "flag": torch.tensor(True), "half": target.bfloat16()}, target) for inputs, target in ragged(300)
    ]
    in_memory = draw_parts(iter(val), seed=0)
    in_file = draw_parts(iter(val), seed=0, most_bytes=most_bytes, folder=tmp_path)
    for one, other in zip(in_memory, in_file, strict=True):
        assert one.num_samples == other.num_samples == sum(num_samples(inputs) for inputs, _ in other)
        for (inputs, target), (same, same_target) in zip(one, other, strict=True):
            assert inputs.keys() == same.keys() and torch.equal(target, same_target)
            assert all(torch.equal(inputs[key], same[key]) for key in inputs)
    assert len(hold(val, math.inf, tmp_path / "absent")) == len(val)
    with pytest.raises(FileNotFoundError):  # where the file would be
        hold(val, most_bytes, tmp_path / "absent")
    assert not list(tmp_path.iterdir())  # it has no name, and ends with the process


class Flawed(nn.Module):
    """Right on all samples but those from `start`."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where(ids >= self.start, -1.0, ids)


def test_parts_are_evaluated_until_it_is_settled() -> None:
    batches = TensorBatches(torch.arange(2000.0)[:, None], torch.arange(2000.0), 128)
    parts = draw_parts(batches, seed=3)
    asked: list[int] = []
    whole = evaluate_growing(
        lambda: ForwardPasses(call=Flawed(1500)), np.empty(0), parts, TASK, lambda seen: bool(asked.append(len(seen)))
    )
    assert asked == [500, 1000] and len(whole) == 2000  # nobody asks after the last
    assert whole.mean() == 0.75
    early = evaluate_growing(
        lambda: ForwardPasses(call=Flawed(1500)), np.empty(0), parts, TASK, lambda seen: len(seen) == 1000
    )
    np.testing.assert_array_equal(early, whole[:1000])
    for known in (whole[:1000], whole[:700], whole):  # a part is either known or not
        made: list[None] = []

        def make(made: list[None] = made) -> ForwardPasses:
            made.append(None)
            return ForwardPasses(call=Flawed(1500))

        again = evaluate_growing(make, known, parts, TASK, lambda seen: False)
        np.testing.assert_array_equal(again, whole)
        assert len(made) == (len(known) < 2000)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_hits_are_compared_by_the_exact_sign_test(pairs: list[tuple[bool, bool]]) -> None:
    own, reference = np.array(pairs, dtype=np.float64).T
    lost, gained = int((own < reference).sum()), int((own > reference).sum())
    expected = binomtest(lost, lost + gained, 0.5, "greater").pvalue if lost + gained else 1.0
    assert chance_if_not_worse(own, reference) == pytest.approx(expected)


def test_other_metrics_are_compared_by_the_interval_of_their_drop() -> None:
    random = np.random.default_rng(0)
    reference = random.uniform(0.3, 0.7, size=500)
    own = reference - 0.01 + 0.1 * random.normal(size=500)
    chance = chance_if_not_worse(own, reference)
    assert 0.001 < chance < 0.05
    assert interval_of_drop_pp(reference, own, confidence=1 - 2 * chance).low == pytest.approx(0, abs=1e-6)
    assert chance_if_not_worse(reference, reference) > 0.5
    assert chance_if_not_worse(reference - 0.2, reference) < 1e-12
    assert chance_if_not_worse(reference[:1] - 0.1, reference[:1]) > 0.5  # one sample settles nothing


@pytest.mark.parametrize("is_binary", [True, False])
def test_at_most_one_percent_of_equal_trials_are_stopped_and_most_worse_ones(is_binary: bool) -> None:
    def stopped(deficit: float, seed: int) -> bool:
        random = np.random.default_rng(seed)
        shared = random.random(4000)
        own, rival = (shared + 0.2 * random.random(4000) + shift for shift in (deficit, 0.0))
        if is_binary:
            own, rival = (own < 0.9).astype(float), (rival < 0.9).astype(float)
        else:
            own, rival = -own, -rival
        return any(is_certainly_worse(own[:end], rival) for end in interim_sample_counts(4000)[:-1])

    num_wrong = sum(stopped(0.0, seed) for seed in range(400))
    assert num_wrong <= 10  # 4 are allowed; 11 or more of them happen once in 350
    assert sum(stopped(0.05, seed) for seed in range(50)) > 45


@pytest.mark.parametrize(
    "results", [np.array([1.0, 0.0, 1.0] * 7), np.array([0.1, -3.5, 1e300]), np.zeros(1), np.array([0.5])]
)
def test_results_survive_the_way_through_text(results: Results) -> None:
    np.testing.assert_array_equal(decode_results(encode_results(results)), results)
    hits = (np.random.default_rng(0).random(5000) < 0.9).astype(np.float64)
    np.testing.assert_array_equal(decode_results(encode_results(hits)), hits)
    assert len(encode_results(hits)) < 1000
