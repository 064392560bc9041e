"""Sizes beyond those of the batches: of the network, of the file, and those that the target declares."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.benchmark import first_batch
from deploypipe.errors import ConfigError, ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.input_sizes import (
    Ranges,
    ends_of,
    extremes_of,
    other_sizes,
    shapes_of,
    usual_inputs,
)
from deploypipe.recipe import Export
from deploypipe.runs.store import open_run
from deploypipe.stages import profile
from deploypipe.stages.context import prepare_run
from deploypipe.task import Splits, Task, classification

ROWS = 12


class Tagger(nn.Module):
    """Up to 12 tokens; from 7 on they go through another layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(30, 8), nn.Parameter(torch.randn(1, ROWS, 8))
        self.long, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places[:, : ids.shape[1]]
        x = self.long(x) if ids.shape[1] > 6 else x
        return self.head(self.hidden(x).relu().mean(1))


def ids(length: int, count: int = 3) -> Tensor:
    return torch.randint(0, 30, (count, length), generator=torch.Generator().manual_seed(length))


def lengths(found: tuple[Tensor, ...]) -> list[int]:
    return [shapes_of(each)[0][0] for each in found]


def test_extremes_are_found_wherever_they_are() -> None:
    found = extremes_of([ids(5), ids(3), ids(9), ids(4)])
    assert lengths(found) == [9, 3]
    assert {len(each) for each in found} == {2}
    assert extremes_of([ids(5), ids(5)]) == ()
    images = [torch.randn(2, 3, 8, 16), torch.randn(2, 3, 16, 8), torch.randn(2, 3, 8, 8)]
    assert {shapes_of(each)[0] for each in extremes_of(images)} == {(3, 8, 16), (3, 16, 8)}


@pytest.mark.parametrize(
    ("seen", "ranges", "expected"),
    [
        ([5, 4], None, [4, 10, 2]),  # twice and half
        ([5, 9], None, [9, 2]),  # the network refuses 18
        ([5, 4], {"sequence": (1, 5, 12)}, [4, 12, 1]),
        ([5, 4], {"height": (1, 5, 64)}, [4, 10, 2]),
        ([5, 5], None, []),
    ],
)
def test_sizes_beyond_those_of_the_batches(seen: list[int], ranges: Ranges | None, expected: list[int]) -> None:
    found = other_sizes(Tagger(), ids(seen[0]), extremes_of(map(ids, seen)), Export(), ranges)
    assert lengths(found) == expected
    assert lengths(ends_of(found)) == [*{max(expected): 0, min(expected): 0}] if expected else not ends_of(found)


def test_a_declared_size_that_the_network_refuses() -> None:
    with pytest.raises(ConfigError, match=r"dynamic_dims.*Tagger fails at sequence = 64"):
        other_sizes(Tagger(), ids(5), extremes_of([ids(5), ids(4)]), Export(), {"sequence": (1, 5, 64)})


class Short(nn.Module):
    """The exporter follows the branch of its example and drops the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.shape[1] <= 8 else -x.sum(1)


def test_the_file_is_compared_at_a_larger_size_than_the_batches_have(tmp_path: Path) -> None:
    batches = [(torch.randn(3, n, 4), None) for n in (5, 6)]
    with pytest.raises(ParityError, match=r"largest at inputs of shape \[2, 12, 4\]"):
        export_onnx(Short(), batches, tmp_path / "m.onnx", Export())
    assert not list(tmp_path.iterdir())


def test_the_sizes_that_were_compared_are_recorded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    file = export_onnx(model, [(torch.randn(3, n, 4), None) for n in (5, 6)], tmp_path / "m.onnx", Export())
    assert file.tested_sizes == {"batch": (1, 3), "sequence": (2, 12)}


@pytest.mark.parametrize(
    ("seen", "ranges", "size", "said"),
    [
        (
            [5, 9],
            {},
            5,
            "at sequence = 5, the size of the first calibration batch; the target can choose",
        ),
        ([5, 9], {"sequence": (1, 7, 12)}, 7, "at sequence = 7, the usual size in the target's [dynamic_dims]"),
        ([5, 9], {"sequence": (1, 12, 12)}, 12, "at sequence = 12, the usual size"),
        ([5, 9], {"height": (1, 12, 12)}, 5, "at sequence = 5, the size of the first"),
    ],
)
def test_files_with_a_dynamic_axis_are_timed_at_one_size(seen: list[int], ranges: Ranges, size: int, said: str) -> None:
    found = usual_inputs(Tagger(), ids(seen[0]), extremes_of(map(ids, seen)), Export(), ranges)
    assert found is not None and found.inputs.shape == (3, size) and found.sizes == {"sequence": size}
    assert torch.equal(found.inputs, ids(seen[0])[:, torch.arange(size) % seen[0]]) and said in str(found)


def test_files_of_one_size_are_timed_on_each_split_s_own_batches(tmp_path: Path) -> None:
    assert usual_inputs(Tagger(), ids(5), (), Export(), {"sequence": (1, 7, 12)}) is None
    batches = [(ids(n), torch.zeros(3, dtype=torch.long)) for n in (5, 9)]
    for own, size in ((batches, 5), (batches[1:], None)):
        splits = Splits(calib=own, train=own, val=own, test=own[::-1])
        with open_run(tmp_path / str(size)) as run:
            ctx = prepare_run(Tagger(), splits, classification(), tiny.recipe(), tiny.target(), run)
        timed = first_batch(ctx.timed_on(ctx.splits.test), ["ids"], 1)["ids"]
        assert timed.shape == (1, size or 9)  # not that of the first test batch


def test_a_run_follows_the_branch_that_only_the_longest_batch_takes(tmp_path: Path) -> None:
    short, long = [(ids(5), torch.zeros(3, dtype=torch.long))], [(ids(ROWS), torch.zeros(3, dtype=torch.long))]
    splits = Splits(calib=short, train=short, val=[*short, *long], test=long)
    task: Task = replace(classification(), loss=F.cross_entropy)
    with open_run(tmp_path) as run:
        ctx = prepare_run(Tagger(), splits, task, tiny.recipe(), tiny.target(macs="0.9x"), run)
        structures = profile.structures(ctx).record
    assert max(lengths(ctx.other_inputs)) == ROWS
    (tokens,) = [group for group in structures.groups if group.name == "tokens"]
    assert "long" in {member.module for member in tokens.members}
    assert not any(member.side == "places.1" for group in structures.groups for member in group.members)
