"""MLPerf Tiny's ResNet-8 on CIFAR-10 (arXiv:2106.07597). Needs CIFAR-10's binary version and the trained weights.

The dense network is already small: 78,000 parameters, three blocks, two of them with a projection.
"""

import os

from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification
from pipelines.cifar_resnet import load_cifar10, with_weights

CIFAR10_DIR = os.environ.get("CIFAR10_DIR", "")
WEIGHTS = os.environ.get("RESNET8_WEIGHTS", "")
EPSILON = 1e-3  # of the batch norms
GREY_LEVEL = 1 / 255  # the network was trained on levels from 0 to 255


class ResNet8(nn.Module):
    """ResNet-8. Strided 3x3 convolutions pad only on the right and at the bottom, as in TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16, EPSILON)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16, EPSILON)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16, EPSILON)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32, EPSILON)
        self.conv4, self.bn4 = nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32, EPSILON)
        self.conv5 = nn.Conv2d(16, 32, 1, 2)
        self.conv6, self.bn5 = nn.Conv2d(32, 64, 3, 2), nn.BatchNorm2d(64, EPSILON)
        self.conv7, self.bn6 = nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64, EPSILON)
        self.conv8 = nn.Conv2d(32, 64, 1, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(F.pad(x, (0, 1, 0, 1)))))))
        x = F.relu(self.conv5(x) + y)
        y = self.bn6(self.conv7(F.relu(self.bn5(self.conv6(F.pad(x, (0, 1, 0, 1)))))))
        x = F.relu(self.conv8(x) + y)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build_model() -> nn.Module:
    return with_weights(ResNet8(), WEIGHTS, "RESNET8_WEIGHTS", "https://github.com/mlcommons/tiny")


def load_data() -> Splits:
    return load_cifar10(CIFAR10_DIR, mean=(0.0,) * 3, std=(GREY_LEVEL,) * 3)


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=12), finetune=Finetune(num_epochs=5))
