"""Your own CNN with a DataLoader: handwritten digits, 8x8 pixels, from scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

NUM_EPOCHS = 15  # of the dense network, trained here because it is small


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def build_model() -> nn.Module:
    """The trained network. With weights of your own: build it, then load_state_dict(torch.load("weights.pt"))."""
    torch.manual_seed(0)
    model = CNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train = load_data().train
    for _ in range(NUM_EPOCHS):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def load_data() -> Splits:
    """Four disjoint parts. Only `train` is shuffled: a run compares networks on the same samples in the same order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)  # (1797, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(digits.target))  # put your own Dataset here
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    test, val, calib, train = order[:500], order[500:700], order[700:1000], order[1000:]
    return Splits(
        calib=DataLoader(Subset(data, calib), batch_size=100),
        train=DataLoader(Subset(data, train), batch_size=32, shuffle=True),
        val=DataLoader(Subset(data, val), batch_size=100),
        test=DataLoader(Subset(data, test), batch_size=100),
    )


def task() -> Task:
    return classification()  # cross-entropy and top-1 accuracy


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=5))
