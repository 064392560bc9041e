"""A network with two inputs: which of two handwritten digits is larger?"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

NUM_EPOCHS = 8  # of the dense network


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


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model = LargerDigit()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train = load_data().train
    for _ in range(NUM_EPOCHS):
        for left, right, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(left, right), labels).backward()
            optimizer.step()
    return model.eval()


def load_data() -> Splits:
    """Batches (left, right, label): the last one is the target, the others go to forward() in this order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    values = torch.tensor(digits.target)
    parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([500, 200, 200, 897])

    def loader(part: Tensor, count: int, seed: int, shuffle: bool = False) -> DataLoader:
        """Pairs of different digits of one part: no image of one split is in another."""
        left, right = part[torch.randint(len(part), (2, count), generator=torch.Generator().manual_seed(seed))]
        differ = values[left] != values[right]
        left, right = left[differ], right[differ]
        pairs = TensorDataset(images[left], images[right], (values[right] > values[left]).long())
        return DataLoader(pairs, batch_size=100, shuffle=shuffle)

    test, val, calib, train = parts
    return Splits(
        calib=loader(calib, 600, seed=1),
        train=loader(train, 3000, seed=2, shuffle=True),
        val=loader(val, 1000, seed=3),
        test=loader(test, 2000, seed=4),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=4))
