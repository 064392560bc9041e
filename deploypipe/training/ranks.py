"""The processes (ranks) that torchrun starts, one on each GPU, and their communication.

Rank 0 leads: it runs the pipeline, writes and prints. The only module that uses torch.distributed.
"""

import atexit
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deploypipe.errors import ConfigError, RanksError

T = TypeVar("T")

_LONGEST_SEARCH = timedelta(days=30)  # the other ranks wait for rank 0 as long as that
_IS_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # by torch, up to 2.13
# Validation is shared out by batches, so ranks call the network unequally often: no call may wait for the others.
_OWN_BUFFERS: Any = {"forward_sync_buffers" if _IS_RENAMED else "broadcast_buffers": False}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Samples of a batch that are passed at once, and the weight of their mean loss in that of the whole batch."""

    start: int
    end: int  # one past the last
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes that torchrun started together. `rank` is this one's number, from 0 to count - 1."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def tell(self, value: T) -> T:
        """Send rank 0's value to every rank."""
        if self.count == 1:
            return value
        values = [value]
        with self.watched():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value in the order of the ranks, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self.watched():
            dist.all_gather_object(values, value)
        return values

    def check_equal(self, facts: Mapping[str, str], remedy: str) -> None:
        """Raise RanksError, on every rank, naming what differs. facts: a hash or number for each name."""
        expected, *others = self.gather(dict(facts))
        for rank, seen in enumerate(others, start=1):
            differing = [f"{name} ({seen[name]}, not {fact})" for name, fact in expected.items() if seen[name] != fact]
            if differing:
                raise RanksError(f"rank {rank} differs from rank 0: {', '.join(differing)}; {remedy}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn torch's error for a rank that has ended into a RanksError."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise RanksError(
                "another process of this job has ended; torchrun says which, and the same command resumes the run"
            ) from error

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 runs the block before the others, so that they find what it downloads or trains, and only it reports
        an error."""
        if not self.is_first:
            self.gather("rank 0 is through")
        yield
        if self.is_first:
            self.gather("rank 0 is through")

    def parts(self, num_samples: int, num_parts: int, least: int = 1) -> list[Part]:
        """This rank's samples of a batch, in at most `num_parts` parts, each of at least `least` samples.

        The mean over the ranks of the sum of weight * (mean loss of a part) is the mean loss of the batch. If a batch
        has too few samples for all ranks, every rank passes all of it.
        """
        sharing = self.count if num_samples >= self.count * least else 1
        rank = self.rank % sharing
        start, end = (place * num_samples // sharing for place in (rank, rank + 1))
        num_parts = max(1, min(num_parts, (end - start) // least))
        edges = (start + part * (end - start) // num_parts for part in range(num_parts + 1))
        return [Part(start=a, end=b, weight=(b - a) * sharing / num_samples) for a, b in pairwise(edges)]

    def fabric(self, precision: Any, accelerator: str = "auto") -> Fabric:
        """Fabric on this rank's device, without its notice of the precision that the recipe asked for.

        accelerator: "cpu", "cuda" or "mps"; "auto" is the best that is there.
        """
        logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            if self.count == 1:
                return Fabric(accelerator=accelerator, devices=1, precision=precision)
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            fabric = Fabric(
                accelerator="cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu",
                devices=local,
                num_nodes=self.count // local,
                strategy=DDPStrategy(find_unused_parameters=True, **_OWN_BUFFERS),
                precision=precision,
            )
            fabric.launch()
            return fabric
        finally:
            logger.setLevel(level)

    def with_shared_norms(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norms that see the whole batch; on CPUs, for which torch has none, each sees its part.

        Works in place. Subclasses of torch's batch norms are kept, because their own behaviour would be lost.
        """
        if self.count > 1 and device.type == "cuda":
            share_norms_(model)
        return model


ALONE = Ranks()


def share_norms_(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in _BATCH_NORMS:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]


def join() -> Ranks:
    """Join the processes that torchrun started, until this one ends; `ALONE` if there are no others.

    ConfigError if a machine has more ranks than GPUs.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # gloo waits without keeping the GPU busy
        _take_gpu(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group(backend, timeout=_LONGEST_SEARCH)
    atexit.register(dist.destroy_process_group)  # after all is said: torchrun ends a rank soon after another one ended
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size())


def _take_gpu(number: int, num_ranks: int) -> None:
    if num_ranks > torch.cuda.device_count():
        raise ConfigError(
            "torchrun",
            f"--nproc-per-node {num_ranks}",
            f"this machine has {torch.cuda.device_count()} GPUs",
            "start one process for each",
        )
    torch.cuda.set_device(number)
