"""Batches in the forms that people have them: each is read as (inputs, target), or named with the line to write."""

import functools
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from deploypipe.checked_splits import wrap_split, wrap_splits
from deploypipe.data import Pairs, as_pair
from deploypipe.errors import DataError, DeploypipeError, ModelError, PipelineError
from deploypipe.preflight.trial_passes import run_network
from deploypipe.task import Splits

X, Y, IDS = torch.randn(8, 3), torch.arange(8) % 3, torch.arange(16).reshape(8, 2)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one is other


@pytest.mark.parametrize(
    ("batch", "inputs", "target"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, IDS, Y), (X, IDS), Y),
        ([X, IDS, X, Y], (X, IDS, X), Y),
        (({"x": X}, Y), {"x": X}, Y),
        ({"x": X, "label": Y}, {"x": X}, Y),
        ({"labels": Y, "x": X, "ids": IDS}, {"x": X, "ids": IDS}, Y),
        (UserDict({"x": X, "targets": Y}), {"x": X}, Y),
        ({"x": X, "target": {"a": Y, "b": X}}, {"x": X}, {"a": Y, "b": X}),
        ((X.numpy(), Y.numpy()), X, Y),
        (
            {"x": X.numpy()[::-1].astype(">f4"), "y": np.int32(3), "label": [0, 1, 2]},
            {"x": X.flip(0), "y": torch.tensor(3, dtype=torch.int32)},
            torch.tensor([0, 1, 2]),
        ),
        ((X, Y.numpy().astype(np.uint16)), X, Y),
        ((X, None), X, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_usual_forms_are_read(batch: Any, inputs: Any, target: Any) -> None:
    for split in ("calib", "train"):
        assert same((inputs, target), as_pair(batch, split))
    assert same((inputs, target), as_pair(as_pair(batch), "val"))  # reading a pair again changes nothing


@pytest.mark.parametrize(("batch", "inputs"), [(X, X), ([X], X), ({"x": X, "ids": IDS}, {"x": X, "ids": IDS})])
def test_calib_needs_no_target_and_the_others_do(batch: Any, inputs: Any) -> None:
    assert same((inputs, None), as_pair(batch, "calib"))
    with pytest.raises(DataError, match="a batch of the test split cannot be read"):
        as_pair(batch, "test")


class Item:
    def __init__(self) -> None:
        self.image, self.kind = X, Y


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            {"image": X, "class": Y},
            "none is called 'labels', 'label', 'targets', 'target'; it holds image: float32 of shape [8, 3], class: "
            "int64 of shape [8]: write Pairs(loader, inputs=['image'], target='class')",
        ),
        ({"x": X, "label": Y, "labels": Y}, "'labels' and 'label' may both be the target"),
        (
            {"x": X, "sentence": ["a"] * 8, "label": Y},
            "'sentence' holds text: leave it out; it holds x: float32 of shape [8, 3], sentence: list of str, label: "
            "int64 of shape [8]: write Pairs(loader, inputs=['x'], target='label')",
        ),
        (
            {"idx": IDS, "sentence": ["a"] * 8, "x": X, "label": Y},
            "label: int64 of shape [8]: write Pairs(loader, inputs=['x'], target='label')",
        ),
        ({"x": X, "id": Y, "class": Y}, "write Pairs(loader, inputs=['x'], target='class')"),
        (
            {"text": ["a"] * 8, "labels": [1] * 8},
            "'text' holds text; it holds text: list of str, labels: list of int: tokenise the text first, such as with",
        ),
        ((["a"] * 8, Y), "its inputs are text; it holds [0]: list of str, [1]: int64 of shape [8]: tokenise the text"),
        ({"x": X[0], "label": Y[0]}, "'label' is one number: it is a single sample, write DataLoader(dataset"),
        ({"x": X[0], "label": 1}, "'label' is one number"),
        ({"x": [[1, 2], [3, 4]], "label": Y}, "or dataset.set_format('torch') for Hugging Face's"),
        ((np.array([None, 3]), Y), "it holds a numpy array of object, which has no tensor"),
        (Item(), "it holds a Item: write Pairs(loader, inputs=lambda batch: batch.image, target=lambda batch: batch."),
        ("text", "it is not a pair (inputs, target); it holds a str: write Pairs(loader, inputs=lambda batch: ..."),
        ([], "it holds nothing"),
    ],
)
def test_any_other_batch_is_named_with_the_line_to_write(batch: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        as_pair(batch, "val")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "selectors", "pair"),
    [
        ({"a": X, "b": IDS, "y": Y}, {"inputs": "a", "target": "y"}, (X, Y)),
        (
            {"a": X, "b": IDS, "y": Y},
            {"inputs": ["b", "a"], "target": ["y", "a"]},
            ({"b": IDS, "a": X}, {"y": Y, "a": X}),
        ),
        ((Y, X, IDS), {"inputs": [1, 2], "target": 0}, ((X, IDS), Y)),
        ((Y, X), {"inputs": -1, "target": None}, (X, None)),
        (Item(), {"inputs": lambda batch: batch.image, "target": lambda batch: batch.kind}, (X, Y)),
    ],
)
def test_pairs_select_by_key_index_list_or_function(batch: Any, selectors: Any, pair: Any) -> None:
    pairs = Pairs([batch, batch], **selectors)
    assert len(pairs) == 2 and [same(pair, found) for found in (*pairs, *pairs)] == [True] * 4


def test_a_member_that_a_batch_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(DataError, match=r"Pairs\(target='y'\): a batch has no such member, it holds x.*'label'"):
        list(Pairs([{"x": X, "label": Y}], inputs="x", target="y"))
    with pytest.raises(DataError, match=r"Pairs\(inputs=3\): .*it holds \[0\]: float32 of shape \[8, 3\], \[1\]"):
        list(Pairs([(X, Y)], inputs=3, target=1))


class Sampler:
    epochs: list[int]

    def __init__(self) -> None:
        self.epochs = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("is_paired", [False, True])
def test_epochs_reach_the_sampler_and_lengths_come_back(is_paired: bool) -> None:
    sampler = Sampler()
    loader: Any = DataLoader(TensorDataset(X, Y), batch_size=2, sampler=sampler)
    split = wrap_split(Pairs(loader, inputs=0, target=1) if is_paired else loader, "train")
    split.set_epoch(3)
    assert sampler.epochs == [3] and len(split) == 4 == len(list(split)) == len(list(split))


class Stream(IterableDataset[dict[str, Tensor]]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from ({"x": row + self.epoch, "label": y} for row, y in zip(X, Y, strict=True))


def test_a_stream_has_no_length_and_a_dataset_that_is_told_the_epoch() -> None:
    split = wrap_split(DataLoader(Stream(), batch_size=4), "train")
    with pytest.raises(TypeError):
        len(split)
    split.set_epoch(2)
    (first, target), _ = split
    assert same(first, {"x": X[:4] + 2}) and same(target, Y[:4])


def test_workers_that_persist_serve_every_pass() -> None:
    loader = DataLoader(TensorDataset(X, X, Y), batch_size=4, num_workers=1, persistent_workers=True)
    split = wrap_split(loader, "val")
    for _ in range(2):
        ((first, second), target), _ = split
        assert same((first, second, target), (X[:4], X[:4], Y[:4]))


def test_a_function_that_yields_batches_is_called_for_every_pass() -> None:
    def batches(count: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [(X, Y)] * count

    for source, count in ((batches, 2), (functools.partial(batches, 3), 3), (lambda: batches(4), 4)):
        split = wrap_split(source, "train")
        assert len(list(split)) == count == len(list(split))


def needing(name: str) -> Iterator[Any]:
    yield name


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (iter([(X, Y)]), "a list_iterator as split 'val'; it is exhausted after one pass: write val=list(...), a func"),
        (needing, "it requires name: write val=lambda: needing(...)"),
        (TensorDataset(X, Y), "its items are single samples: write val=DataLoader(dataset, batch_size=64)"),
        ((X, Y), "a tuple as split 'val'; it is one batch: write val=[(inputs, target)], or TensorBatches("),
        ({"x": X, "label": Y}, "a dict as split 'val'; it is one batch"),
        (X, "a Tensor as split 'val'; it is one batch"),
        (None, "returned a None as split 'val'; give something that can be iterated many times (TensorBatches, Data"),
        (3, "returned a int as split 'val'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_iterated_twice_is_refused_at_once(source: Any, said: str) -> None:
    with pytest.raises(PipelineError) as caught:
        wrap_splits(Splits(calib=[(X, Y)], train=[(X, Y)], val=source, test=[(X, Y)]))
    assert said in str(caught.value)
    if isinstance(source, Iterator):
        with pytest.raises(PipelineError, match="was given a list_iterator; it is exhausted after one pass"):
            Pairs(source, inputs=0, target=1)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"image": X}, "no parameter 'image': pass it by position, with Pairs(loader, inputs='image', target=...)"),
        (
            {"x": X, "row": IDS},
            "no parameter 'row': leave it out or rename it, with Pairs(loader, inputs=['x'], target",
        ),
    ],
)
def test_members_that_forward_has_no_parameter_for_are_named(inputs: dict[str, Tensor], said: str) -> None:
    class Network(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ModelError) as caught:
        run_network(Network(3, 2), inputs, inputs, "val")
    assert said in str(caught.value)


def test_an_error_inside_a_selector_names_the_user_s_line() -> None:
    def image(batch: Any) -> Any:
        return batch.pixels

    with pytest.raises(DeploypipeError, match=r"test_data\.py, line \d+ \(in image\).*AttributeError"):
        list(wrap_split(Pairs([(X, Y)], inputs=image, target=1), "train"))


@pytest.mark.slow  # imports `datasets`
def test_a_dataset_of_hugging_face_is_read_through_a_loader() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"ids": IDS.tolist(), "mask": IDS.tolist(), "label": Y.tolist()})
    with pytest.raises(PipelineError, match="its items are single samples: write val=DataLoader"):
        wrap_split(rows, "val")
    with pytest.raises(DataError, match=r"its inputs must be tensors.*dataset\.set_format\('torch'\)"):
        as_pair(rows[:4], "val")
    split = wrap_split(DataLoader(rows.with_format("torch"), batch_size=4), "val")
    for _ in range(2):
        (inputs, target), _ = split
        assert same((inputs, target), ({"ids": IDS[:4], "mask": IDS[:4]}, Y[:4]))
    stream = rows.to_iterable_dataset().with_format("torch")
    (inputs, target), _ = wrap_split(DataLoader(stream, batch_size=4), "train")
    assert same((inputs, target), ({"ids": IDS[:4], "mask": IDS[:4]}, Y[:4]))
