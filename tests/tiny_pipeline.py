"""A whole pipeline that runs in seconds: a small residual network on noise with a bright quarter."""

from functools import cache
from pathlib import Path

import torch
from impatience import hurry
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches
from deploypipe.recipe import Finetune, Observe, Recipe, Repair, Search
from deploypipe.target import Budget, Target
from deploypipe.task import Splits, Task, classification

hurry()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 2).flatten(1))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(count, 1, 6, 6, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    for quarter in range(4):
        row, column = 3 * (quarter // 2), 3 * (quarter % 2)
        x[y == quarter, :, row : row + 3, column : column + 3] += 1.0
    return x, y


def build_model() -> nn.Module:
    model = _untrained()
    model.load_state_dict(_trained())
    return model.eval()


def _untrained() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


@cache
def _trained() -> dict[str, Tensor]:
    """Once for each process: it takes half a second."""
    model = _untrained().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        x, y = images(64, seed=1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def load_data() -> Splits:
    return Splits(
        calib=TensorBatches(*images(128, seed=1), 64),
        train=TensorBatches(*images(256, seed=2), 64, shuffle=True),
        val=TensorBatches(*images(200, seed=3), 100),
        test=TensorBatches(*images(1000, seed=4), 250),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(
        observe=Observe(num_samples=128),
        search=Search(num_trials=3, num_curve_samples=64, num_levels=3, num_repair_samples=64, num_timed=8),
        repair=Repair(num_samples=128),
        finetune=Finetune(num_epochs=2, precision="fp32"),
    )


def target(**budget: str) -> Target:
    """Accuracy is free to fall by 10 points; without `budget`, half of the MACs, which no clock can move."""
    limits = Budget(**({"macs": "0.5x"} | budget), accuracy_drop_pp=10.0)  # type: ignore[arg-type]
    return Target(runtime="onnxruntime", name="here", num_latency_samples=200, budget=limits)


PATH = Path(__file__)
