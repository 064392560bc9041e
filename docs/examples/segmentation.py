"""Segmentation: a small U-Net that marks discs in noisy images, with a loss and a metric of its own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches
from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task

NUM_STEPS = 150  # training steps of the dense network
SIZE = 32


def double_conv(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(),
        nn.Conv2d(num_out, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels down, two up. The skips make channels of far-apart layers belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(1, 16), double_conv(16, 32), double_conv(32, 64)
        self.up2, self.up1 = double_conv(64 + 32, 32), double_conv(32 + 16, 16)
        self.classifier = nn.Conv2d(16, 2, 1)  # background, disc

    def forward(self, images: Tensor) -> Tensor:
        one = self.down1(images)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), two], dim=1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), one], dim=1))
        return self.classifier(x)  # (n, 2, height, width)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(NUM_STEPS):
        images, masks = discs(16, seed=1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), masks).backward()
        optimizer.step()
    return model.eval()


def load_data() -> Splits:
    return Splits(
        calib=TensorBatches(*discs(200, seed=1), batch_size=50),
        train=TensorBatches(*discs(800, seed=2), batch_size=16, shuffle=True),
        val=TensorBatches(*discs(200, seed=3), batch_size=50),
        test=TensorBatches(*discs(400, seed=4), batch_size=50),
    )


def task() -> Task:
    """Cross-entropy of every pixel, and one number for each image: how well the marked discs overlap the true ones."""
    return Task(loss=F.cross_entropy, metric=overlap, name="IoU")


def overlap(outputs: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union for each image, shape (n,)."""
    marked, true = outputs.argmax(dim=1).bool(), masks.bool()
    return (marked & true).sum(dim=(1, 2)) / (marked | true).sum(dim=(1, 2)).clamp(min=1)


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=4))


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, 32, 32) of one to three discs, and their masks (count, 32, 32) of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for nth in range(3):
        row, column = torch.randint(4, SIZE - 4, (2, count, 1, 1), generator=generator)
        radius = torch.randint(3, 7, (count, 1, 1), generator=generator)
        is_there = (torch.rand(count, 1, 1, generator=generator) < 0.5) | (nth == 0)
        distance = (axis[None, :, None] - row) ** 2 + (axis[None, None, :] - column) ** 2
        masks |= is_there & (distance <= radius**2)
    images = masks.float() + 0.7 * torch.randn(count, SIZE, SIZE, generator=generator)
    return images[:, None], masks.long()
