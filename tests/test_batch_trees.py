"""Batches as trees: which members have a batch axis, and what happens to the others."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deploypipe.errors import DataError
from deploypipe.networks.batch_trees import leaves, map_tensors, structure
from deploypipe.task import forward, num_samples, stack_batches, take, take_batch, take_calib


class Pair(NamedTuple):
    left: Tensor
    right: Any


@dataclass(frozen=True)
class Graph:
    nodes: Tensor
    directed: bool


class Encoding(UserDict[str, Any]):
    """As the tokenizers of `transformers` give them: a mapping that is no dict."""


def batch_of(n: int, offset: float = 0.0) -> dict[str, Any]:
    return {
        "step": torch.tensor(7),
        "scale": torch.tensor([0.5]),
        "x": torch.arange(n * 6.0).reshape(n, 2, 3) + offset,
        "table": torch.ones(50, 3),
        "cond": (torch.arange(n), [None, "text", True, 3]),
        "pair": Pair(torch.arange(n), 2.5),
        "graph": Graph(torch.arange(n), directed=True),
    }


@pytest.mark.parametrize("n", [1, 2, 5, 50])
def test_only_members_with_a_row_for_each_sample_are_sliced(n: int) -> None:
    batch = batch_of(n)
    assert num_samples(batch) == n
    part = take(batch, n, n - 1)
    assert part["x"].tolist() == batch["x"][n - 1 :].tolist() and part["step"] is batch["step"]
    assert part["cond"][0].tolist() == [n - 1] and part["cond"][1] == [None, "text", True, 3]
    assert type(part["pair"]) is Pair and part["pair"].left.tolist() == [n - 1] and part["pair"].right == 2.5
    assert type(part["graph"]) is Graph and part["graph"].nodes.tolist() == [n - 1] and part["graph"].directed
    if n not in (1, 50):
        assert part["table"] is batch["table"] and part["scale"] is batch["scale"]


def test_targets_are_sliced_by_the_batch_size_of_the_inputs() -> None:
    inputs, target = torch.ones(4, 3), (torch.arange(4), torch.ones(10, 10))
    assert [t.shape for t in take_batch((inputs, target), 2)[1]] == [(2,), (10, 10)]
    ((_, taken),) = take_calib([(inputs, target)], 3)
    assert [t.shape for t in taken] == [(3,), (10, 10)]


def test_a_mapping_that_is_no_dict_goes_to_forward_by_name_and_keeps_its_class() -> None:
    encoding = take(Encoding(ids=torch.arange(6).reshape(3, 2), return_dict=False), 2)
    assert type(encoding) is Encoding and encoding["ids"].shape == (2, 2)

    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, return_dict: bool = True) -> tuple[Tensor, bool]:
            return ids, return_dict

    assert forward(Model(), encoding)[1] is False


def test_batches_are_stacked_and_a_place_is_named_where_they_cannot_be() -> None:
    whole = stack_batches([batch_of(2), batch_of(3, offset=12.0)])
    assert torch.equal(whole["x"], batch_of(5)["x"]) and whole["pair"].left.tolist() == [0, 1, 0, 1, 2]
    other = batch_of(3)
    other["cond"][1][1] = "another"
    with pytest.raises(DataError, match=r'inputs\["cond"\]\[1\]\[1\] belongs to the whole batch and differs'):
        stack_batches([batch_of(2), other])
    with pytest.raises(DataError, match=r"inputs\[1\] has samples of several shapes \(\(2,\), \(3,\)\)"):
        stack_batches([(torch.ones(2, 4), torch.ones(2, 2)), (torch.ones(2, 4), torch.ones(2, 3))])


def test_no_batch_axis_at_all_is_one_error() -> None:
    with pytest.raises(DataError, match=r'no tensor with a batch axis, it holds inputs\["a"\] = Tensor, inputs'):
        num_samples({"a": torch.tensor(1), "b": None})


def test_places_are_written_as_python_would() -> None:
    assert structure(batch_of(2))[4:8] == (
        'inputs["cond"][0]',
        'inputs["cond"][1][0]',
        'inputs["cond"][1][1]',
        'inputs["cond"][1][2]',
    )
    doubled = map_tensors(lambda t: t * 2, batch_of(2))
    assert [leaf.place for leaf in leaves(doubled)] == list(structure(batch_of(2)))
    assert doubled["pair"].left.tolist() == [0, 2] and doubled["cond"][1][3] == 3
