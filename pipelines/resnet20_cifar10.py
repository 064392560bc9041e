"""ResNet-20 on CIFAR-10. Needs CIFAR-10's binary version (`CIFAR10_DIR`) and trained weights (`WEIGHTS`)."""

import os

from torch import nn

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification
from pipelines.cifar_resnet import load_cifar10, load_network

CIFAR10_DIR = os.environ.get("CIFAR10_DIR", "")
WEIGHTS = os.environ.get("RESNET20_WEIGHTS", "")
NUM_BLOCKS = 3  # in each of three stages


def build_model() -> nn.Module:
    return load_network(NUM_BLOCKS, WEIGHTS, "RESNET20_WEIGHTS")


def load_data() -> Splits:
    return load_cifar10(CIFAR10_DIR)


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    # `keep` protects the residual stream: benchmarks/surgery.py shows the cost of cutting it, and the figures in LOG.md
    # were measured without cutting it.
    return Recipe(keep=("conv1",), search=Search(num_trials=12), finetune=Finetune(num_epochs=5))
