"""Run forward passes over batches of different shapes in lockstep: all pause at the same layer.

A solve at a layer's output then gets all samples at once, as if they were one batch, at the cost of one pass.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.repair.affine_paths import PathEnd, SignalPath, hook_path_ends
from deploypipe.task import forward

Solve = Callable[[Sequence[PathEnd]], list[Tensor]]  # gets one end per batch; returns the values to continue with


def run_in_lockstep(model: nn.Module, paths: Mapping[str, SignalPath], solve: Solve, batches: Sequence[Any]) -> None:
    """Run all batches without gradients; call `solve` at the end of each path with the ends of all batches.

    Raises ModelError if the layers run in another order for one batch than for another.
    """
    if len(batches) == 1:
        with torch.no_grad(), hook_path_ends(model, paths, lambda end: solve([end])[0]):
            forward(model, batches[0])
        return
    walkers = [_Walker(_sharing_weights(model), paths, inputs) for inputs in batches]
    try:
        values: Sequence[Tensor | None] = [None] * len(walkers)
        while True:
            ends = [walker.advance(value) for walker, value in zip(walkers, values, strict=True)]
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
                values = solve(reached)
    finally:
        for walker in walkers:
            walker.stop()


def _sharing_weights(model: nn.Module) -> nn.Module:
    """A copy with its own hooks and the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copied(model, shared)


class _Stopped(Exception):
    """Ends a pass early."""


class _Walker:
    """One forward pass in its own thread, which runs only while `advance` waits for it."""

    def __init__(self, model: nn.Module, paths: Mapping[str, SignalPath], inputs: Any) -> None:
        self._model, self._paths, self._inputs = model, paths, inputs
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
                forward(self._model, self._inputs)
            self._reached.put(None)
        except BaseException as error:  # passed to the waiting thread, which raises it
            self._reached.put(error)

    def _wait_at(self, end: PathEnd) -> Tensor:
        self._reached.put(end)
        value = self._given.get()
        if value is None:
            raise _Stopped
        return value
