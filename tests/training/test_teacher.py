"""A training that finds the teacher's answers ends where one that asks for them does, bit for bit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.recipe import Finetune
from deploypipe.task import Batch, Splits, classification
from deploypipe.training import teacher as module
from deploypipe.training.finetune import finetune

Weights = dict[str, Tensor]


class Dense(nn.Sequential):
    asked = 0  # how often, by all copies; trained ones are not counted

    def forward(self, x: Tensor) -> Tensor:
        Dense.asked += not self.training
        return super().forward(x)  # type: ignore[no-any-return]


class Shuffled:
    """Another order every epoch, from torch's own generator."""

    def __init__(self, extra_draws: int = 0, fails: bool = False) -> None:
        self.extra_draws, self.fails = extra_draws, fails

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        torch.rand(self.extra_draws)
        inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        for rows in torch.randperm(64).split(16):
            yield inputs[rows], inputs[rows, :3].argmax(1)
        if self.fails:
            raise OSError("the disk is gone")


def student(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))


def train(width: int, teacher_outputs: Path | None, data: Any = None, precision: Any = "fp32") -> Weights:
    torch.manual_seed(100)
    dense = Dense(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
    data = data or Shuffled()
    val = [next(iter(Shuffled()))]
    settings = Finetune(num_epochs=2, learning_rate=0.05, precision=precision)
    splits = Splits(calib=[], train=data, val=val, test=[])
    return finetune(student(width), dense, splits, classification(), settings, teacher_outputs=teacher_outputs)[
        0
    ].state_dict()


def same(a: Weights, b: Weights) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_network_learns_from_the_same_answers(tmp_path: Path, precision: Any) -> None:
    folder = tmp_path / "teacher-outputs"
    expected = {width: train(width, None, precision=precision) for width in (8, 6)}
    assert same(train(8, folder, precision=precision), expected[8])
    assert sorted(file.name for file in folder.iterdir()) == ["epoch-1.safetensors", "epoch-2.safetensors"]
    Dense.asked = 0
    assert same(train(6, folder, precision=precision), expected[6])
    assert Dense.asked == 1  # for what its answers are like


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [damage, lambda file: file.write_bytes(b"?"), Path.unlink])
def test_answers_that_are_lost_are_asked_for(harm: Callable[[Path], Any], tmp_path: Path) -> None:
    expected = train(8, tmp_path)
    whole = (tmp_path / "epoch-2.safetensors").read_bytes()
    harm(tmp_path / "epoch-2.safetensors")
    Dense.asked = 0
    assert same(train(8, tmp_path), expected)
    assert Dense.asked == 1 + 4
    assert (tmp_path / "epoch-2.safetensors").read_bytes() == whole


def test_other_batches_are_not_given_its_answers(tmp_path: Path) -> None:
    train(8, tmp_path)
    kept = (tmp_path / "epoch-1.safetensors").read_bytes()
    expected = train(8, None, Shuffled(extra_draws=1))
    assert same(train(8, tmp_path, Shuffled(extra_draws=1)), expected)
    assert (tmp_path / "epoch-1.safetensors").read_bytes() == kept


def test_an_epoch_that_broke_down_leaves_no_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disk"):
        train(8, tmp_path, Shuffled(fails=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("most", "kept"), [(100, 0), (1_500, 1)])  # an epoch's answers take 768 bytes
def test_more_answers_than_there_is_room_for_are_not_kept(
    most: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", most)
    assert same(train(8, tmp_path), train(8, None))
    assert len(list(tmp_path.iterdir())) == kept
