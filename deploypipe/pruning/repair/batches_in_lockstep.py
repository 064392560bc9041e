"""Run forward passes over batches of different shapes in lockstep: all pause at the same layer.

A solve at a layer's output then gets all samples at once, as if they were one batch, at the cost of one pass.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.memory_budget import shared_heap
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.repair.affine_paths import PathEnd, SignalPath, hook_path_ends
from deploypipe.task import forward

Solve = Callable[[Sequence[PathEnd]], list[Tensor]]  # gets one end per batch; returns the values to continue with


Make = Callable[[], Any]  # makes the inputs of one batch, when its pass begins


def run_in_lockstep(
    model: nn.Module, paths: Mapping[str, SignalPath], solve: Solve, batches: Sequence[Make], *, is_part: bool = False
) -> None:
    """Run all batches without gradients; call `solve` at the end of each path with the ends of all batches.

    Of a batch that waits, only its live activations are held. is_part: the passes end after the last path's end.
    Raises ModelError if the layers run in another order for one batch than for another.
    """
    num_ends = len(paths) if is_part else len(paths) + 1
    if len(batches) == 1:
        _run_alone(model, paths, solve, batches[0], num_ends)
        return
    with shared_heap():
        _run_together(model, paths, solve, batches, num_ends)


def _run_together(
    model: nn.Module, paths: Mapping[str, SignalPath], solve: Solve, batches: Sequence[Make], num_ends: int
) -> None:
    walkers = [_Walker(_sharing_weights(model), paths, make) for make in batches]
    try:
        values: list[Tensor | None] = [None] * len(walkers)
        for _ in range(num_ends):
            ends = [walker.advance(values.pop(0)) for walker in walkers]  # a value is let go before the next is made
            reached = [end for end in ends if end is not None]
            if not reached:
                return
            if len({end.path.layer for end in reached}) > 1 or len(reached) < len(ends):
                names = ", ".join(sorted({end.path.layer if end else "the end" for end in ends}))
                raise ModelError(
                    f"batches of other sizes run through other layers ({names}), so they cannot be repaired together; "
                    "pad the calibration batches to one size"
                )
            with torch.no_grad():
                values = list(solve(reached))
            del ends, reached
    finally:
        for walker in walkers:
            walker.stop()


def _run_alone(model: nn.Module, paths: Mapping[str, SignalPath], solve: Solve, make: Make, num_ends: int) -> None:
    seen = 0

    def finish(end: PathEnd) -> Tensor:
        nonlocal seen
        value = solve([end])[0]
        seen += 1
        if seen == num_ends:
            raise Stopped
        return value

    with suppress(Stopped), torch.no_grad(), hook_path_ends(model, paths, finish):
        forward(model, make())


def _sharing_weights(model: nn.Module) -> nn.Module:
    """A copy with its own hooks and the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copied(model, shared)


class Stopped(Exception):
    """Ends a forward pass early."""


class _Walker:
    """One forward pass in its own thread, which runs only while `advance` waits for it."""

    def __init__(self, model: nn.Module, paths: Mapping[str, SignalPath], make: Make) -> None:
        self._model, self._paths, self._make = model, paths, make
        self._given: SimpleQueue[Tensor | None] = SimpleQueue()
        self._reached: SimpleQueue[PathEnd | BaseException | None] = SimpleQueue()
        self._is_over = False
        self._thread = threading.Thread(target=self._walk, daemon=True)

    def advance(self, value: Tensor | None) -> PathEnd | None:
        """Start, or continue with `value`, up to the next end. Returns None at the end of the pass.

        Raises what the network raises.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._given.put(value)
        reached = self._reached.get()
        self._is_over = not isinstance(reached, PathEnd)
        if isinstance(reached, BaseException):
            raise reached
        return reached

    def stop(self) -> None:
        if self._thread.ident is not None:
            if not self._is_over:
                self._given.put(None)
            self._thread.join()

    def _walk(self) -> None:
        try:
            with torch.no_grad(), hook_path_ends(self._model, self._paths, self._wait_at):
                forward(self._model, self._make())
            self._reached.put(None)
        except BaseException as error:  # passed to the waiting thread, which raises it
            self._reached.put(error)

    def _wait_at(self, end: PathEnd) -> Tensor:
        self._reached.put(end)
        value = self._given.get()
        if value is None:
            raise Stopped
        return value
