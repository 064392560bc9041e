"""What the benchmarks share."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.task import Splits, Task, channels_last


def test_hits(model: nn.Module, splits: Splits, task: Task) -> NDArray[np.float64]:
    """The metric of every test sample. The model is left as it is."""
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batches = ((channels_last(inputs), target) for inputs, target in splits.test)
    return evaluate_module(network, batches, task)
