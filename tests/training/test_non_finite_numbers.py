"""What a training cannot go on from is one error that names the place and the cause."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError, DeploypipeError
from deploypipe.recipe import Finetune
from deploypipe.records import Event, Note
from deploypipe.task import Batch, Splits, Task, classification
from deploypipe.training.finetune import finetune

SETTINGS = Finetune(num_epochs=2, precision="fp32")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batches(count: int = 64, size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def tune(train: Any, task: Task | None = None, settings: Finetune = SETTINGS, **options: Any) -> Any:
    data = Splits(calib=[], train=train, val=batches(), test=[])
    model = network()
    return finetune(model, options.pop("dense", model), data, task or classification(), settings, **options)


def told(train: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DeploypipeError) as caught:
        tune(train, *arguments, **options)
    return str(caught.value)


def test_a_sample_that_is_not_finite_is_named_and_nothing_is_kept_of_its_epoch(tmp_path: Path) -> None:
    train = batches()
    train[2][0][5, 3], train[2][0][9, 0] = float("nan"), float("inf")
    seen = told(train, checkpoint=tmp_path)
    assert "the loss is nan in epoch 1, step 3 (batch 2 of the epoch): the inputs of sample 5, 9 hold NaN" in seen
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_finite_is_named() -> None:
    train = [(x, F.one_hot(y, 3).float()) for x, y in batches()]
    train[1][1][4, 2] = float("nan")
    val = [(x, F.one_hot(y, 3).float()) for x, y in batches()]
    task = Task(loss=F.mse_loss, metric=lambda outputs, y: -(outputs - y).square().mean(1))
    with pytest.raises(DataError, match=r"epoch 1, step 2 .*the targets of sample 4 hold NaN"):
        finetune(network(), network(), Splits(calib=[], train=train, val=val, test=[]), task, SETTINGS)


def test_a_training_that_diverges_names_the_learning_rate() -> None:
    seen = told(batches(), None, replace(SETTINGS, learning_rate=1e30))
    assert re.search(r"epoch 1, step \d+ .*set a lower finetune.learning_rate, such as 0.006$", seen)


def test_weights_that_the_last_step_of_an_epoch_loses_are_found() -> None:
    settings = replace(SETTINGS, learning_rate=1e30, warmup_share=0, max_gradient_norm=1e12, momentum=0)
    task = replace(classification(), loss=lambda outputs, y: 1e11 * F.cross_entropy(outputs, y))
    assert "weights are no longer finite in epoch 1" in told(batches(64, 64), task, settings)


def test_a_teacher_that_is_not_finite_is_named() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) / (x.abs().sum() < 1e3)

    train = batches()
    train[1][0].mul_(1e3)
    seen = told(train, None, replace(SETTINGS, mix_share=0), dense=Sometimes())
    assert "step 2 (batch 1 of the epoch): the dense network's own outputs" in seen


def test_a_loss_that_is_not_finite_is_named() -> None:
    calls = iter(range(100))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target) / (next(calls) < 1)

    seen = told(batches(), replace(classification(), loss=loss), replace(SETTINGS, mix_share=0))
    assert "step 2 (batch 1 of the epoch): task().loss is not finite for finite outputs" in seen


def test_gradients_that_are_not_finite_end_the_training_before_the_step() -> None:
    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target) + (outputs - outputs.detach()).abs().sum().sqrt()  # slope at 0: inf

    assert "the norm of the gradients is nan in epoch 1, step 1" in told(
        batches(), replace(classification(), loss=loss)
    )


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (
            lambda o, y: F.cross_entropy(o, y.int()),
            r"task\(\).loss raised RuntimeError: .*of shape \(16,\)",
        ),
        (
            lambda o, y: F.cross_entropy(o, y, reduction="none"),
            r"task\(\).loss returned a tensor of shape \(16,\).*reduction=.mean",
        ),
        (lambda o, y: 1.0, r"task\(\).loss returned a float"),
    ],
)
def test_a_loss_that_raises_or_is_no_mean_is_named(loss: Any, reason: str) -> None:
    assert re.search(reason, told(batches(), replace(classification(), loss=loss)))


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_train_alike(kind: torch.dtype) -> None:
    plain, log = tune(batches())
    other, other_log = tune([(x, y.to(kind)) for x, y in batches()])
    assert [e.train_loss for e in log.epochs[1:]] == [e.train_loss for e in other_log.epochs[1:]]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_a_source_that_ends_after_one_pass_is_refused() -> None:
    assert "a generator as split 'train'; it is exhausted after one pass" in told(batch for batch in batches())


def test_a_source_that_is_empty_later_is_named() -> None:
    class Once:
        def __init__(self) -> None:
            self.passes = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            return iter(batches() if self.passes == 1 else [])

    assert "`train` gave no batch" in told(Once()) and "in epoch 2" in told(Once())


def test_a_batch_that_batch_norms_cannot_train_on_is_left_out_and_told() -> None:
    events: list[Event] = []
    _, log = tune(batches(65), notify=events.append)
    note = "batch 4 of an epoch was left out: it holds 1 sample, and the network trains on two or more"
    assert log.notes == (note,)
    assert [event.text for event in events if isinstance(event, Note)] == [note]
    assert "gave no batch of 2 or more samples" in told(batches(8, 1))


def test_parts_of_a_batch_are_large_enough_for_batch_norms() -> None:
    _, log = tune(batches(60, 20), None, replace(SETTINGS, accumulate=16))
    assert log.notes == () and len(log.epochs) == 3


def test_a_stream_without_a_length_trains() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            for x, y in batches(32):
                yield from zip(x, y.tolist(), strict=True)

    _, log = tune(torch.utils.data.DataLoader(Stream(), batch_size=8))
    assert len(log.epochs) == 3
