"""Handwritten digits: scikit-learn's 1,797 real 8x8 images, and a residual network that is wider than necessary.

The pipeline trains its dense network in seconds and caches it in $DEPLOYPIPE_CACHE or ~/.cache/deploypipe.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches, random_crop_flip
from deploypipe.errors import DataError
from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification
from pipelines.trained import trained_once

SEED = 0
NUM_EPOCHS = 16  # of the dense network
WIDTH = 32  # channels of the first of three stages; the others have two and four times as many
WEIGHTS = ""  # a safetensors file of the dense network; empty: train the network once

# Sizes of three disjoint splits. The remaining 797 images are for training.
NUM_TEST = 500
NUM_VAL = 200
NUM_CALIB = 300


class Block(nn.Module):
    """Two convolutions and a shortcut, which is the identity unless the shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        has_same_shape = num_in == num_out and stride == 1
        self.shortcut = nn.Identity() if has_same_shape else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """Three stages of two blocks for images of 8x8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build_model() -> nn.Module:
    model = DigitNet(WIDTH)
    if WEIGHTS and not Path(WEIGHTS).is_file():
        raise DataError(
            f"{WEIGHTS}: there is no such file; correct pipeline.WEIGHTS, or leave it empty to train the network"
        )
    name = f"digits-w{WIDTH}-e{NUM_EPOCHS}-s{SEED}"
    model.load_state_dict(load_file(WEIGHTS) if WEIGHTS else trained_once(name, _train))
    return model.eval()


def load_data() -> Splits:
    images, labels = _images()
    test, val, calib, train = _split(len(images))
    return Splits(
        calib=TensorBatches(images[calib], labels[calib], 100),
        train=TensorBatches(
            images[train], labels[train], 32, shuffle=True, augment=random_crop_flip(1, flip=False), seed=SEED
        ),
        val=TensorBatches(images[val], labels[val], 100),
        test=TensorBatches(images[test], labels[test], 100),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(
        search=Search(num_trials=8, num_curve_samples=300), finetune=Finetune(num_epochs=8, learning_rate=0.01)
    )


def _images() -> tuple[Tensor, Tensor]:
    """Load normalised float images (1797, 1, 8, 8) and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "scikit-learn, which contains the digits, is not installed; pip install 'deploypipe[demo]'"
        ) from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div(16).sub(0.305).div(0.376)
    return images[:, None], torch.from_numpy(digits.target).to(torch.int64)


def _split(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    sizes = [NUM_TEST, NUM_VAL, NUM_CALIB]
    test, val, calib, train = torch.tensor_split(order, [sum(sizes[: i + 1]) for i in range(len(sizes))])
    return test, val, calib, train


def _train() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DigitNet(WIDTH).train()
    train = load_data().train
    assert isinstance(train, TensorBatches)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_EPOCHS * len(train))
    for epoch in range(NUM_EPOCHS):
        train.set_epoch(epoch)
        for inputs, target in train:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
