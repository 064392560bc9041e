"""Passes in pieces give the outputs of whole batches, and batches whose samples depend on each other stay whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deploypipe.benchmark.forward_passes import ForwardPasses, piece_size

WEIGHT = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    scores: Tensor
    choice: Tensor


def pair(inputs: dict[str, Any]) -> Pair:
    scores = (inputs["x"] + inputs["shift"]) @ WEIGHT
    return Pair(scores, scores.argmax(1))


def seen_sizes(call: Callable[[Any], Any]) -> tuple[list[int], Callable[[Any], Any]]:
    sizes: list[int] = []

    def counted(inputs: dict[str, Any]) -> Any:
        sizes.append(len(inputs["x"]))
        return call(inputs)

    return sizes, counted


def batches(*sizes: int) -> list[dict[str, Any]]:
    """With a member that belongs to the whole batch."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(n, 6, generator=generator), "shift": torch.ones(6), "flag": True} for n in sizes]


@pytest.mark.parametrize("num_parallel", [1, 3])
def test_pieces_give_what_whole_batches_give(num_parallel: int) -> None:
    sizes, call = seen_sizes(pair)
    given = batches(5, 21, 8)
    outputs = ForwardPasses(call=call, num_parallel=num_parallel, samples_in_piece=8).run(given)
    for inputs, seen in zip(given, outputs, strict=True):
        assert isinstance(seen, Pair)
        torch.testing.assert_close(seen.scores, pair(inputs).scores)
        assert torch.equal(seen.choice, pair(inputs).choice)
    assert sorted(sizes) == sorted([2, 3, 5, 8, 8, 5, 8])  # two and three samples are tried once


# fmt: off
DEPENDENT: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda inputs: inputs["x"] - inputs["x"].mean(0),              # outputs depend on the batch
    lambda inputs: inputs["x"] @ inputs["x"].T,                    # one output for each pair of samples
    lambda inputs: (inputs["x"], inputs["x"].mean()),              # one has no batch axis
    lambda inputs: (inputs["x"], inputs["shift"]),                 # one belongs to the whole batch
    lambda inputs: inputs["x"].flatten(),                          # several rows for each sample
    lambda inputs: inputs["x"].view(max(len(inputs["x"]), 3), 6),  # fails on two samples
    lambda inputs: inputs["x"][:, : 3 + (len(inputs["x"]) == 5)],  # the last piece, of five, is longer
)
# fmt: on


@pytest.mark.parametrize("call", DEPENDENT)
def test_batches_that_cannot_be_split_stay_whole(call: Callable[[Any], Any]) -> None:
    passes, (inputs,) = ForwardPasses(call=call, samples_in_piece=8), batches(21)
    for _ in range(2):
        torch.testing.assert_close(passes.run([inputs])[0], call(inputs))
    assert passes._can_split is False


def test_a_piece_has_sixteen_samples_or_half_a_mebibyte() -> None:
    assert piece_size(torch.zeros(64, 3, 32, 32)) == 16
    assert piece_size(torch.zeros(64, 3, 96, 96)) == 4
    assert piece_size(torch.zeros(64, 3, 224, 224)) == 1
    assert piece_size({"ids": torch.zeros(64, 128, dtype=torch.long), "mask": torch.ones(64, 128)}, 32) == 32
    assert piece_size(torch.zeros(0, 6)) >= 1


def test_a_run_gets_two_pieces_for_each_thread_and_no_more_batches_than_that_needs() -> None:
    small, large = torch.zeros(64, 3, 32, 32), torch.zeros(64, 3, 224, 224)
    passes = ForwardPasses(call=lambda inputs: inputs, num_parallel=8)
    assert (passes.load_of(small), passes.load_of(large)) == (4 / 16, 64 / 16)
    assert ForwardPasses(call=lambda inputs: inputs).load_of(small) == 1  # one thread: batch by batch
