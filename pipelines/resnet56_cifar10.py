"""ResNet-56 on CIFAR-10. Needs CIFAR-10's binary version and the trained weights; see `CIFAR10_DIR` and `WEIGHTS`."""

import os

from torch import nn

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification
from pipelines.cifar_resnet import load_cifar10, load_network

CIFAR10_DIR = os.environ.get("CIFAR10_DIR", "")
WEIGHTS = os.environ.get("RESNET56_WEIGHTS", "")
NUM_BLOCKS = 9  # in each of three stages


def build_model() -> nn.Module:
    return load_network(NUM_BLOCKS, WEIGHTS, "RESNET56_WEIGHTS")


def load_data() -> Splits:
    return load_cifar10(CIFAR10_DIR)


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    # The residual stream stays whole: benchmarks/surgery.py shows what it costs to cut it, LOG.md was written without.
    return Recipe(keep=("conv1",), search=Search(num_trials=12), finetune=Finetune(num_epochs=5))
