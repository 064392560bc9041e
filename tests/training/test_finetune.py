"""Fine-tuning gains or changes nothing, and a killed one goes on as if it had not been."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError, ModelError
from deploypipe.recipe import Finetune
from deploypipe.task import Batch, Splits, classification
from deploypipe.training.finetune import finetune
from deploypipe.training.schedules import rate_share

SETTINGS = Finetune(num_epochs=3, learning_rate=0.1, precision="fp32", average_decay=0.5, distil_weight=0.3)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(24, 3)
    )


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (count,), generator=generator)
    patterns = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    return patterns[target] + 0.7 * torch.randn(count, 1, 4, 4, generator=generator), target


def batches(count: int, seed: int) -> list[Batch]:
    inputs, target = samples(count, seed)
    return list(zip(inputs.split(16), target.split(16), strict=True))


class Shuffled:
    """Another order every epoch, from torch's own generator, like a DataLoader's; may break down once."""

    def __init__(self, fail_in: int = -1, fail_at: int = 3) -> None:
        self.data, self.pass_number, self.fail_in, self.fail_at = samples(96, 0), 0, fail_in, fail_at

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Batch]:
        self.pass_number += 1
        order = torch.randperm(96)
        for number, rows in enumerate(order.split(16)):
            if self.pass_number == self.fail_in and number == self.fail_at:
                raise OSError("the disk is gone")
            yield self.data[0][rows], self.data[1][rows]


def splits(train: Any = None, val: Any = None) -> Splits:
    val = batches(64, 1) if val is None else val
    return Splits(calib=[], train=batches(96, 0) if train is None else train, val=val, test=[])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls_and_the_best_epoch_is_returned(precision: Any, capfd: pytest.CaptureFixture[str]) -> None:
    start, teacher = network(0), network(1).train()
    before = {k: v.clone() for m, part in (("s", start), ("t", teacher)) for k, v in named(m, part)}
    tuned, log = finetune(start, teacher, splits(), classification(), replace(SETTINGS, precision=precision))
    assert log.epochs[-1].train_loss < log.epochs[1].train_loss
    accuracies = [epoch.val_accuracy for epoch in log.epochs]
    assert [epoch.epoch for epoch in log.epochs] == [0, 1, 2, 3]
    assert log.chosen_epoch == 3 - accuracies[::-1].index(max(accuracies)) > 0
    assert log.reason == ""
    assert accuracy(tuned) == pytest.approx(max(accuracies), abs=0.05 if precision == "bf16" else 1e-6)
    assert teacher.training
    assert all(torch.equal(v, before[k]) for m, part in (("s", start), ("t", teacher)) for k, v in named(m, part))
    assert all(p.grad is None for p in teacher.parameters())
    assert "Precision" not in capfd.readouterr().err


def named(prefix: str, model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{key}", value) for key, value in model.state_dict().items()]


def accuracy(model: nn.Module) -> float:
    inputs, target = samples(64, 1)
    with torch.no_grad():
        return float((model.eval()(inputs).argmax(1) == target).float().mean())


def test_no_step_is_longer_than_the_limit_allows() -> None:
    limit, rate = 0.5, 0.01
    start = network(0)
    task = classification()
    steep = replace(task, loss=lambda outputs, target: 1e6 * task.loss(outputs, target), metric=Later())
    settings = Finetune(
        num_epochs=1,
        learning_rate=rate,
        warmup_share=0,
        momentum=0,
        weight_decay=0,
        distil_weight=0,
        average_decay=0,
        precision="fp32",
        max_gradient_norm=limit,
    )
    tuned, log = finetune(start, network(1), splits(train=batches(16, 0)), steep, settings)
    assert log.chosen_epoch == 1
    pairs = zip(tuned.parameters(), start.parameters(), strict=True)
    moved = sum(float((after - before).detach().square().sum()) for after, before in pairs) ** 0.5
    assert moved == pytest.approx(rate * limit, rel=1e-3)


def test_of_epochs_that_are_alike_the_last_is_returned() -> None:
    task = replace(classification(), metric=lambda outputs, target: torch.ones(len(target)))
    tuned, log = finetune(network(0), network(1), splits(), task, SETTINGS)
    assert log.chosen_epoch == 3 and log.reason == ""
    assert not torch.equal(tuned[0].weight, network(0)[0].weight)


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ((0.8, 0.95, 0.93, 0.94), 3),  # chance
        ((0.8, 0.95, 0.94, 0.5), 2),
        ((0.8, 0.95, 0.5, 0.94), 3),
        ((0.95, 0.5, 0.5, 0.5), 0),
        ((0.8, 0.95, math.nan, math.nan), 1),
        ((math.nan, 0.5, 0.9, 0.5), 2),
    ],
)
def test_the_last_epoch_that_is_no_worse_than_the_best_is_returned(shares: tuple[float, ...], chosen: int) -> None:
    looks = iter(shares)

    def metric(outputs: Tensor, target: Tensor) -> Tensor:
        share, count = next(looks), len(target)
        return torch.full((count,), share) if math.isnan(share) else (torch.arange(count) < share * count).float()

    data = splits(val=[samples(64, 1)])
    _, log = finetune(network(0), network(1), data, replace(classification(), metric=metric), SETTINGS)
    assert log.chosen_epoch == chosen


class Later:
    """Every look finds the network better than the one before."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        self.looks += 1
        return torch.full((len(target),), float(self.looks))


def test_harmful_training_is_rolled_back() -> None:
    good, _ = finetune(network(0), network(1), splits(), classification(), SETTINGS)
    settings = replace(SETTINGS, learning_rate=50.0, distil_weight=0.0)
    inputs, target = samples(64, 1)
    kept, log = finetune(good, good, splits(val=[(inputs, target)]), classification(), settings)
    assert log.chosen_epoch == 0
    assert "start, which is kept" in log.reason
    assert all(torch.equal(value, good.state_dict()[key]) for key, value in kept.state_dict().items())


@pytest.mark.parametrize(("fail_in", "momentum"), [(2, 0.9), (3, 0.9), (2, 0.0)])
def test_resumed_training_ends_bit_for_bit_where_an_undisturbed_one_does(
    fail_in: int, momentum: float, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, momentum=momentum)

    def train(data: Shuffled) -> Any:
        return finetune(network(0), network(1), splits(data), classification(), settings, checkpoint=tmp_path, seed=5)

    with pytest.raises(DataError, match="disk"):
        train(Shuffled(fail_in=fail_in))
    torch.manual_seed(12345)  # another process, another global generator
    data = Shuffled()
    resumed, log = train(data)
    assert data.pass_number == 3 - (fail_in - 1)
    whole, expected = finetune(network(0), network(1), splits(Shuffled()), classification(), settings, seed=5)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert log.chosen_epoch == expected.chosen_epoch
    assert [e.val_accuracy for e in log.epochs] == [e.val_accuracy for e in expected.epochs]
    assert [e.train_loss for e in log.epochs[1:]] == [e.train_loss for e in expected.epochs[1:]]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-3.safetensors"]
    again, _ = train(Shuffled(fail_in=1, fail_at=0))  # done: nothing is trained any more
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("place", [4, 0.3, 0.7, -1], ids=["header", "log or shapes", "weights", "last byte"])
def test_a_damaged_checkpoint_is_not_gone_on_from(place: float, tmp_path: Path) -> None:
    def train(data: Shuffled) -> Any:
        return finetune(network(0), network(1), splits(data), classification(), SETTINGS, checkpoint=tmp_path, seed=5)

    with pytest.raises(DataError, match="disk"):
        train(Shuffled(fail_in=3))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[int(place * len(content)) if 0 < place < 1 else int(place)] ^= 4
    file.write_bytes(content)
    data = Shuffled()
    tuned, log = train(data)
    assert data.pass_number == 3 and log.notes == (
        f"the checkpoint {file.name} was damaged, so the training began again",
    )
    whole, _ = finetune(network(0), network(1), splits(Shuffled()), classification(), SETTINGS, seed=5)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in tuned.state_dict().items())


class FromTokens(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize("is_float", [True, False])
def test_samples_and_labels_are_mixed_in_equal_shares_but_never_token_ids(is_float: bool) -> None:
    inputs = torch.eye(4) if is_float else torch.eye(4).long()
    target = torch.tensor([0, 1, 2, 0])
    asked: list[tuple[float, Tensor]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(outputs, labels)
        asked.append((float(value.detach()), labels))
        return value

    task = replace(classification(), loss=loss)
    settings = replace(SETTINGS, num_epochs=1, distil_weight=0.0, mix_share=0.5, momentum=0.0)
    model, batch = FromTokens(4, 3), (inputs, target)
    log = finetune(model, model, splits([batch], [batch]), task, settings)[1]
    seen = log.epochs[1].train_loss
    if is_float:
        (first, labels), (second, mirrored) = asked
        assert torch.equal(mirrored, labels.flip(0))
        share = (seen - first) / (second - first)
        assert 0 < share <= 0.5 and log.notes == ()
    else:
        assert log.notes == ("samples are not mixed in training (finetune.mix_share): inputs holds no floats",)
        assert len(asked) == 1
        assert seen == pytest.approx(asked[0][0])


def test_callers_random_numbers_are_not_drawn() -> None:
    start, teacher = network(0), network(1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    finetune(start, teacher, splits(Shuffled()), classification(), replace(SETTINGS, num_epochs=1))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_learning_rate_rises_to_its_peak_and_ends_at_zero(warmup: float) -> None:
    settings = replace(SETTINGS, warmup_share=warmup, learning_rate=0.2)
    rates = [settings.learning_rate * rate_share(settings, step, 100) for step in range(101)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak == pytest.approx(100 * warmup, abs=1)
    assert 0 < rates[99] < 1e-3
    assert rates[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("train", "val", "name"), [([], None, "train"), (None, [], "val")])
def test_empty_split_is_refused(train: Any, val: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"the {name} split is empty"):
        finetune(network(0), network(1), splits(train, val), classification(), SETTINGS)


def test_no_epochs_is_the_start() -> None:
    start = network(0)
    same, log = finetune(start, network(1), splits(), classification(), replace(SETTINGS, num_epochs=0))
    assert log.epochs == ()
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in same.state_dict().items())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_it_ends_where_it_does_otherwise() -> None:
    def tuned(*, is_compiled: bool) -> dict[str, Tensor]:
        pruned = network(0)
        pruned[4] = nn.Identity()  # what dropout draws, compiling changes
        settings = replace(SETTINGS, compile=is_compiled)
        return finetune(pruned, network(1), splits(), classification(), settings, seed=3)[0].state_dict()

    plain, compiled, again = (tuned(is_compiled=flag) for flag in (False, True, True))
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, rtol=1e-3, atol=1e-4)
        assert torch.equal(compiled[name], again[name])


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    torch.compiler.reset()  # what was compiled before
    with pytest.raises(ModelError, match=r"finetune\.compile: .*no-such-compiler.*finetune\.compile=false"):
        finetune(network(0), network(1), splits(), classification(), replace(SETTINGS, compile=True), seed=3)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"average_decay": 1.5}, "average_decay must be <= 1, got 1.5; write a number from 0 to 1"),
        ({"momentum": -0.1}, "momentum must be >= 0, got -0.1"),
        ({"distil_temperature": 0.0}, "distil_temperature must be > 0, got 0.0; write a number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Finetune(**setting)
