"""A network with two inputs: which of two handwritten digits is larger?"""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

NUM_EPOCHS = 8  # of the dense network
BATCH_SIZE = 100


class LargerDigit(nn.Module):
    """One encoder reads both images; a head compares what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.hidden = nn.Linear(2 * 64, 64)
        self.classifier = nn.Linear(64, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        parts = [self.encoder(image).amax(dim=(2, 3)) for image in (left, right)]
        return self.classifier(F.relu(self.hidden(torch.cat(parts, dim=1))))


class PairBatches:
    """Batches of ((left, right), label). The tuple is handed to forward() by position."""

    def __init__(self, digits: Tensor, values: Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        left, right = torch.randint(len(digits), (2, count), generator=generator)
        keep = values[left] != values[right]
        left, right = left[keep], right[keep]
        self.left, self.right = digits[left], digits[right]
        self.labels = (values[right] > values[left]).long()

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for start in range(0, len(self.labels), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            yield (self.left[part], self.right[part]), self.labels[part]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model = LargerDigit()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(NUM_EPOCHS):
        for (left, right), labels in load_data().train:
            optimizer.zero_grad()
            F.cross_entropy(model(left, right), labels).backward()
            optimizer.step()
    return model.eval()


def load_data() -> Splits:
    """Pairs of digits. No digit of one split is in another."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    values = torch.tensor(digits.target)
    parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([500, 200, 200, 897])
    test, val, calib, train = [(images[part], values[part]) for part in parts]
    return Splits(
        calib=PairBatches(*calib, count=600, seed=1),
        train=PairBatches(*train, count=3000, seed=2),
        val=PairBatches(*val, count=1000, seed=3),
        test=PairBatches(*test, count=2000, seed=4),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=4))
