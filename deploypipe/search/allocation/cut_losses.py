"""Measure the loss of many single cuts: samples in pieces that fit the processor's cache, on all allowed cores.

Each piece passes through the dense network once. What its modules return is kept for as long as the cuts are measured
on that piece, so memory does not grow with the number of samples.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.compute_device import exact_float32, to_device
from deploypipe.errors import DataError
from deploypipe.memory_order import find_order_
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.module_calls import evaluating, one_thread_if_small
from deploypipe.records import Names
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.search.allocation.dense_prefix import CallOrder, kept_outputs, ordered_calls, returning
from deploypipe.search.allocation.single_cuts import (
    BlockPoint,
    Point,
    SingleCut,
    applied,
    changed_modules,
    make_cut,
    readers_of,
    replica,
)
from deploypipe.task import DistillationLoss, forward, num_samples, take

_ACTIVATION_BYTES = 2**20  # of a piece's largest activation: it stays in the second-level cache
_LARGE_BYTES = 2**24  # for samples that do not fit there, a few at once: still in the cache, and quickly allocated
_FEW_SAMPLES = 4
_KEPT_BYTES = 2**28  # of the outputs that are kept for one piece
_ALL_KEPT_BYTES = 2**30  # of those for all pieces that are passed at once
_WEIGHT_BYTES = 2**28  # of the weights of cuts that are held at once
_FEWEST_PIECES = 4  # to judge by whether they are enough
_MAX_SAMPLES = 128  # of a piece: small networks have enough pieces for all cores
_GPU_FACTOR = 16  # GPUs need larger pieces
_TOLERANCE = 1e-3  # relative: a pass that begins in the middle gives what the whole pass gives


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Samples of one shape that are passed at once."""

    inputs: Any
    count: int
    num_bytes: int  # of the dense network's outputs that are kept


class CutLosses:
    """Measures single cuts of one network, all on the same samples.

    batches: inputs, one batch for each shape of samples. distillation_loss: as `Task.distillation_loss`. The network
    is not changed: each worker has a copy that shares the weights.
    """

    def __init__(
        self,
        dense: nn.Module,
        batches: Sequence[Any],
        moments: Moments,
        distillation_loss: DistillationLoss,
        temperature: float,
        device: torch.device,
    ) -> None:
        self.moments, self.distillation_loss, self.temperature = moments, distillation_loss, temperature
        self.batches, self.device = batches, device
        first = replica(dense).to(device)
        self.arrange = find_order_(first, to_device(take(batches[0], 2), device))
        num_workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.models = [first, *(replica(first) for _ in range(num_workers - 1))]
        self.modules = [dict(model.named_modules()) for model in self.models]
        self.free: SimpleQueue[int] = SimpleQueue()  # numbers of the copies that no worker uses
        self.is_over = Event()
        self.pieces: list[_Piece] = []

    @property
    def num_samples(self) -> int:
        """The samples that are measured on: fewer than were given if they are enough."""
        return sum(piece.count for piece in self.pieces)

    def measure(
        self, points: Sequence[Point], notify: Callable[[int, int], None], precision: float = 0.0
    ) -> list[float]:
        """The mean loss of each point. notify(done, total) is called after each piece.

        precision: if half of the losses have this relative standard error after a quarter or half of the samples, the
        others are left out, in later calls too.
        """
        with (
            evaluating(self.models[0]),
            exact_float32(self.device),
            one_thread_if_small(0),
            _pool(len(self.models), self.is_over) as pool,
            torch.no_grad(),
        ):
            orders = [self._order(batch) for batch in self.batches]
            finished = [orders[0].finished_before(changed_modules(point, self.modules[0])) for point in points]
            if not self.pieces:
                self.pieces = self._cut_in_pieces(orders, set().union(*finished))
                at_once = _ALL_KEPT_BYTES // max(max(piece.num_bytes for piece in self.pieces), 1)
                for number in range(max(min(len(self.models), at_once), 1)):
                    self.free.put(number)
            finished = self._checked(finished, self.pieces[0])
            parts = self._held_at_once(points)
            losses: list[float] = []
            for number, (start, end) in enumerate(parts):
                run = partial(
                    self._losses, cuts=list(pool.map(self._cut, points[start:end])), finished=finished[start:end]
                )
                rows: list[list[float]] = []
                for stop in _stops(len(self.pieces), precision if number == 0 else 0.0):
                    for row in pool.map(run, self.pieces[len(rows) : stop]):
                        rows.append(row)
                        notify(number * len(self.pieces) + len(rows), len(parts) * len(self.pieces))
                    if _relative_error(rows) <= precision:
                        break
                self.pieces = self.pieces[: len(rows)]
                notify((number + 1) * len(self.pieces), len(parts) * len(self.pieces))
                weights = np.array([piece.count for piece in self.pieces], dtype=np.float64)
                losses += np.maximum(np.average(rows, axis=0, weights=weights), 0.0).tolist()
        return losses

    def _losses(self, piece: _Piece, cuts: Sequence[SingleCut], finished: Sequence[Names]) -> list[float]:
        """The mean loss of each cut over a piece's samples, on the next free copy of the network."""
        number = self.free.get()
        model, modules = self.models[number], self.modules[number]
        try:
            with torch.no_grad():
                inputs = self._ready(piece.inputs)
                with kept_outputs(modules, set().union(*finished)) as outputs:
                    dense = _finite(forward(model, inputs))
                found = []
                for cut, names in zip(cuts, finished, strict=True):
                    if self.is_over.is_set():
                        break
                    used = cut.networks[number] if cut.networks else model
                    own = dict(used.named_modules()) if cut.networks else modules
                    with applied(own, cut), returning(own, names, outputs):
                        seen = _finite(forward(used, inputs))
                    found.append(float(self.distillation_loss(seen, dense, self.temperature)))
                return found
        finally:
            self.free.put(number)

    def _cut(self, point: Point) -> SingleCut:
        return make_cut(self.models[0], point, self.moments, len(self.models))

    def _order(self, batch: Any) -> CallOrder:
        """The calls of two samples of a batch."""
        with ordered_calls(self.models[0]) as order:
            forward(self.models[0], self._ready(take(batch, 2)))
        return order

    def _cut_in_pieces(self, orders: Sequence[CallOrder], kept: Collection[str]) -> list[_Piece]:
        """All samples in pieces, those of several shapes mixed. Only the sizes of activations decide on their size."""
        factor = 1 if self.device.type == "cpu" else _GPU_FACTOR
        placed: list[tuple[float, _Piece]] = []
        for batch, order in zip(self.batches, orders, strict=True):
            total = num_samples(batch)
            recorded = min(total, 2)
            largest, each = max(order.largest_bytes / recorded, 1), max(order.num_bytes(kept) / recorded, 1)
            limits = [
                max(factor * _ACTIVATION_BYTES / largest, min(_FEW_SAMPLES, factor * _LARGE_BYTES / largest)),
                factor * _KEPT_BYTES / each,
                factor * _MAX_SAMPLES,
            ]
            num_pieces = ceil(total / max(int(min(limits)), 1))
            for start, end in pairwise(total * i // num_pieces for i in range(num_pieces + 1)):
                count = end - start
                piece = _Piece(inputs=take(batch, end, start), count=count, num_bytes=int(each * count))
                placed.append((end / total, piece))
        return [piece for _, piece in sorted(placed, key=lambda pair: pair[0])]

    def _held_at_once(self, points: Sequence[Point]) -> list[tuple[int, int]]:
        """Ranges of points whose repaired weights together stay small."""
        ranges, start, held = [], 0, 0
        for number, point in enumerate(points):
            size = self._num_bytes(point)
            if held + size > _WEIGHT_BYTES and number > start:
                ranges.append((start, number))
                start, held = number, 0
            held += size
        return [*ranges, (start, len(points))]

    def _num_bytes(self, point: Point) -> int:
        """Of the weights that a cut holds: those of the readers, or of all members in each worker's own network."""
        if isinstance(point, BlockPoint):
            return 0
        names = changed_modules(point, self.modules[0])
        copies = 1 if readers_of(point.group, self.modules[0]) else len(self.models)
        held = [parameter for name in set(names) for parameter in self.modules[0][name].parameters(recurse=False)]
        size: int = sum(parameter.nbytes for parameter in held)
        return copies * size

    def _checked(self, finished: Sequence[Names], piece: _Piece) -> list[Names]:
        """The modules that need not run again, or none for a point where the network's outputs would change so.

        They would if a module reads more than its arguments, such as what another left in an attribute.
        """
        model, modules = self.models[0], self.modules[0]
        inputs = self._ready(piece.inputs)
        with kept_outputs(modules, set().union(*finished)) as outputs:
            dense = _finite(forward(model, inputs))
        is_right: dict[Names, bool] = {(): True}
        for names in finished:
            if names not in is_right:
                with returning(modules, names, outputs):
                    is_right[names] = _is_close(forward(model, inputs), dense)
        return [names if is_right[names] else () for names in finished]

    def _ready(self, inputs: Any) -> Any:
        return self.arrange(to_device(inputs, self.device))


def _stops(num_pieces: int, precision: float) -> list[int]:
    """After how many pieces to see whether they are enough."""
    if not precision:
        return [num_pieces]
    return [stop for stop in (num_pieces // 4, num_pieces // 2) if stop >= _FEWEST_PIECES] + [num_pieces]


def _relative_error(rows: Sequence[Sequence[float]]) -> float:
    """The median relative standard error of the mean losses, from those of each piece."""
    values = np.array(rows)
    means = values.mean(axis=0)
    if len(values) < _FEWEST_PIECES or not np.any(means > 0):
        return np.inf
    errors = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return float(np.median(errors[means > 0] / means[means > 0]))


@contextmanager
def _pool(num_workers: int, is_over: Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one core each. is_over is set at the end, also after an error: they stop then."""
    is_over.clear()
    pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)


def _finite(outputs: Any) -> Any:
    """The outputs; a single tensor in double precision."""
    if not all(torch.isfinite(tensor).all() for tensor in name_outputs(outputs).values()):
        raise DataError("the network's outputs are not finite on the calibration samples; check data and model")
    return outputs.double() if isinstance(outputs, Tensor) else outputs


def _is_close(seen: Any, expected: Any) -> bool:
    pairs = zip(name_outputs(seen).values(), name_outputs(expected).values(), strict=True)
    return all(
        torch.allclose(a.double(), b.double(), rtol=_TOLERANCE, atol=_TOLERANCE * float(b.abs().max()))
        for a, b in pairs
    )
