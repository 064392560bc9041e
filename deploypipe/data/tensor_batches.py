"""Batches held in memory: the simplest splits for a pipeline.

Order and augmentation depend only on (seed, epoch), never on a global generator, so that a resumed run sees the same
batches as an uninterrupted one.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from deploypipe.errors import DataError

Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


class TensorBatches:
    """Two tensors of equal length in batches; can be iterated many times.

    Without `shuffle` and `augment`, every pass is the same. With them, a pass depends on (seed, epoch): call
    `set_epoch(epoch)` before it.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} inputs but {len(targets)} targets; give one target for each input")
        if batch_size < 1:
            raise DataError(f"batch_size must be >= 1, got {batch_size}; write 1 or more")
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mixed = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(
            int.from_bytes(mixed[:4], "big")
        )  # it reads 32 bits of a seed, no more
        count = len(self.inputs)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, count, self.batch_size):
            picked = order[start : start + self.batch_size]
            batch = self.inputs[picked]
            yield (self.augment(batch, generator) if self.augment else batch), self.targets[picked]


def random_crop_flip(padding: int, *, flip: bool = True) -> Augment:
    """Shift each image by up to `padding` pixels (zeros move in) and mirror half of them."""

    def augment(
        images: Tensor,  # (n images, c, h, w)
        generator: torch.Generator,
    ) -> Tensor:
        n, _, h, w = images.shape
        padded = F.pad(images, (padding, padding, padding, padding))
        top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
        rows = top[:, None] + torch.arange(h)  # (n, h)
        columns = left[:, None] + torch.arange(w)  # (n, w)
        if flip:
            mirrored = torch.rand(n, generator=generator) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        picked = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    return augment
