"""CIFAR-10, and the residual networks of He et al. (arXiv:1512.03385, section 4.2), for several pipelines.

Option-A shortcuts: every second pixel, new channels filled with zeros. Parameter names are those of the weights at
github.com/akamaster/pytorch_resnet_cifar10.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches, random_crop_flip
from deploypipe.errors import DataError
from deploypipe.task import Splits

NUM_VAL = 5000  # the last of the training images
NUM_CALIB = 2048  # the images before them; training uses them too, because nothing is chosen on them
BATCH_SIZE = 128
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride, self.num_new = stride, num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.num_new == 0:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.num_new // 2, self.num_new // 2))


class ResNet(nn.Module):
    """Three stages of `num_blocks` blocks, 16, 32 and 64 wide."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, num_blocks, 1)
        self.layer2 = _stage(16, 32, num_blocks, 2)
        self.layer3 = _stage(32, 64, num_blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(num_in: int, num_out: int, num_blocks: int, stride: int) -> nn.Sequential:
    later = [Block(num_out, num_out, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(Block(num_in, num_out, stride), *later)


def load_network(num_blocks: int, weights: str, variable: str) -> nn.Module:
    """Build the network and load its trained weights; see `with_weights`."""
    return with_weights(ResNet(num_blocks), weights, variable, "https://github.com/akamaster/pytorch_resnet_cifar10")


def with_weights(model: nn.Module, weights: str, variable: str, source: str) -> nn.Module:
    """Load the weights of a safetensors file. Raises DataError if it is missing or belongs to another network.

    variable: the environment variable that names the file. source: the address where the weights are published.
    """
    if not weights or not Path(weights).is_file():
        seen = f"{weights!r} is not a file" if weights else "no path was given"
        raise DataError(
            f"the network's weights are missing ({seen}); convert those of {source} to safetensors, then set the "
            f"environment variable {variable} or --set pipeline.WEIGHTS=PATH"
        )
    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:
        raise DataError(
            f"{weights}: these are not the weights of this network ({str(error).splitlines()[0]})"
        ) from error
    return model.eval()


def load_cifar10(folder: str, seed: int = 0, *, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Splits:
    """Read and normalise CIFAR-10's binary version. folder: `cifar-10-batches-bin`, or the folder that holds it."""
    root = _find(folder)
    images, labels = _read(root, TRAIN_FILES, mean, std)
    test_images, test_labels = _read(root, TEST_FILES, mean, std)
    first_val = len(images) - NUM_VAL
    first_calib = first_val - NUM_CALIB
    return Splits(
        calib=TensorBatches(images[first_calib:first_val], labels[first_calib:first_val], BATCH_SIZE),
        train=TensorBatches(
            images[:first_val],
            labels[:first_val],
            BATCH_SIZE,
            shuffle=True,
            augment=random_crop_flip(4),
            seed=seed,
        ),
        val=TensorBatches(images[first_val:], labels[first_val:], BATCH_SIZE),
        test=TensorBatches(test_images, test_labels, BATCH_SIZE),
    )


def _find(folder: str) -> Path:
    roots = [Path(folder), Path(folder) / "cifar-10-batches-bin"] if folder else []
    for root in roots:
        if all((root / name).is_file() for name in TRAIN_FILES + TEST_FILES):
            return root
    seen = f"{folder!r} does not hold it" if folder else "no path was given"
    raise DataError(
        f"CIFAR-10 is missing ({seen}); unpack the binary version from https://www.cs.toronto.edu/~kriz/cifar.html "
        "(a folder cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin and test_batch.bin), then set "
        "the environment variable CIFAR10_DIR or --set pipeline.CIFAR10_DIR=PATH"
    )


def _read(root: Path, names: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Read normalised images (n, 3, 32, 32) and labels (n,)."""
    records = np.concatenate([_records(root / name) for name in names])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    images = torch.from_numpy(records[:, 1:]).reshape(-1, 3, 32, 32).to(torch.float32).div_(255)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return images.sub_(shift).div_(scale), labels


def _records(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % RECORD:
        raise DataError(f"{path}: {len(content)} bytes, but the size must be a multiple of {RECORD}; unpack it again")
    return content.reshape(-1, RECORD)
