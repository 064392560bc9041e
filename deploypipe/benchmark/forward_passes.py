"""Run batches through a network or an exported file in pieces that fit a processor's cache.

A pass over a whole batch writes every activation to memory and reads it again. In small pieces, networks of large
images run several times faster on a CPU. The outputs are those of the whole batch, up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from deploypipe.compute_device import CPU, exact_float32, network_on, to_device
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.batch_trees import map_leaves, structure, tensors
from deploypipe.runtimes import Session
from deploypipe.runtimes.named_arrays import feed, repack
from deploypipe.task import evaluating, forward, num_samples, take

Forward: TypeAlias = Callable[[Any], Any]  # a batch of inputs -> outputs

# The rule does not depend on measured times: the outputs' last bits depend on the size, and a plan on the outputs.
# Of 1 to 128 samples, these take at most 6 % longer than the best number for CIFAR ResNets and a ViT. One activation of
# an image of 224 pixels fills the cache alone: there, single samples are a quarter faster than eight.
_MAX_SAMPLES = 16  # of a file
_MAX_SAMPLES_EAGER = 32  # in eager torch, which spends more time between two operators
_MAX_INPUT_BYTES = 512 * 1024  # of one piece, if it has more than one sample
_TOLERANCE = 1e-2  # of an output's largest magnitude, between pieces of two sizes: what bf16 may differ by


class Passes(Protocol):
    """A network or a file, ready to run."""

    def load_of(self, inputs: Any) -> float:
        """What a batch of inputs adds to the work of all threads: batches of 1.0 together are enough for one `run`."""

    def run(self, batches: Sequence[Any]) -> list[Any]:
        """The outputs for each batch of inputs."""


@dataclass(kw_only=True)
class ForwardPasses:
    """Calls `call` on pieces of each batch and joins their outputs.

    Batches stay whole if outputs have no batch axis, or if a sample's outputs depend on the others of its batch. The
    first batch that is large enough shows it: two and three of its samples are passed.
    """

    call: Forward
    num_parallel: int = 1  # pieces that run at the same time, in threads
    num_threads: int = 1  # of one call
    samples_in_piece: int | None = _MAX_SAMPLES  # for each thread, at most (`piece_size`); None: batches stay whole
    _can_split: bool | None = None

    def load_of(self, inputs: Any) -> float:
        step = self._step(inputs)
        num_pieces = 1 if step is None else -(-num_samples(inputs) // step)
        return num_pieces / (2 * self.num_parallel) if self.num_parallel > 1 else 1.0

    def run(self, batches: Sequence[Any]) -> list[Any]:
        parts = [self._split(inputs) for inputs in batches]
        outputs = iter(self._map([piece for pieces in parts for piece in pieces]))
        return [
            self._joined(inputs, pieces, [next(outputs) for _ in pieces])
            for inputs, pieces in zip(batches, parts, strict=True)
        ]

    def _map(self, pieces: Sequence[Any]) -> list[Any]:
        if self.num_parallel == 1 or len(pieces) == 1:
            return [self.call(piece) for piece in pieces]
        with ThreadPoolExecutor(min(self.num_parallel, len(pieces))) as pool:
            return list(pool.map(self.call, pieces))

    def _split(self, inputs: Any) -> list[Any]:
        size, step = num_samples(inputs), self._step(inputs)
        if step is None or size <= step:
            return [inputs]
        if self._can_split is None:
            self._can_split = _is_per_sample(self.call, inputs)
        return [take(inputs, start + step, start) for start in range(0, size, step)] if self._can_split else [inputs]

    def _step(self, inputs: Any) -> int | None:
        """The number of samples in a piece; None if batches stay whole."""
        if self.samples_in_piece is None or self._can_split is False:
            return None
        return self.num_threads * piece_size(inputs, self.samples_in_piece)

    def _joined(self, inputs: Any, pieces: Sequence[Any], outputs: Sequence[Any]) -> Any:
        if len(pieces) == 1:
            return outputs[0]
        columns = [tensors(each) for each in outputs]
        sizes = [num_samples(piece) for piece in pieces]
        is_alike = len({structure(each) for each in outputs}) == 1 and all(
            tensor.dim() and len(tensor) == size and tensor.shape[1:] == first.shape[1:]
            for size, column in zip(sizes, columns, strict=True)
            for tensor, first in zip(column, columns[0], strict=True)
        )
        if not is_alike:  # such as outputs as long as the longest text of a piece
            self._can_split = False
            return self.call(inputs)
        joined = iter([torch.cat(column) for column in zip(*columns, strict=True)])
        return map_leaves(lambda leaf: next(joined) if isinstance(leaf, Tensor) else leaf, outputs[0])


def piece_size(inputs: Any, most: int = _MAX_SAMPLES) -> int:
    """How many samples of a batch run at once: at most `most`, and so many that their inputs fit half a MiB."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(inputs))
    return max(1, min(most, _MAX_INPUT_BYTES * num_samples(inputs) // max(num_bytes, 1)))


def _is_per_sample(call: Forward, inputs: Any) -> bool:
    """Whether the outputs of two samples are the same with a third one in the batch."""
    fewer = min(2, num_samples(inputs) - 1)
    try:
        one, other = call(take(inputs, fewer)), call(take(inputs, fewer + 1))
    except Exception as error:  # the user's forward() may raise anything on shapes it is not written for
        raise_if_exhausted(error)
        return False
    return structure(one) == structure(other) and all(
        a.dim() > 0
        and (len(a), len(b)) == (fewer, fewer + 1)
        and a.shape[1:] == b.shape[1:]
        and _is_close(a, b[:fewer])
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return True  # choices may tie
    allowed = _TOLERANCE * float(other.abs().nan_to_num().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=allowed, equal_nan=True)


@contextmanager
def network_passes(model: nn.Module, device: torch.device | None = None) -> Iterator[ForwardPasses]:
    """Run a network in eval mode without gradients. The network's mode is restored.

    device: where a copy of the network and each batch are moved to; outputs are moved to the CPU, as a file gives them.
    None: the batches are on the network's device already. On a CPU each of torch's threads gets a piece; on other
    devices batches stay whole.
    """
    there, back = network_on(model, device), CPU if device else None
    own = device or next((parameter.device for parameter in model.parameters()), CPU)

    def call(inputs: Any) -> Any:
        return to_device(forward(there, to_device(inputs, device)), back)

    with evaluating(there), torch.no_grad(), exact_float32(device):
        if own != CPU:
            yield ForwardPasses(call=call, samples_in_piece=None)
        else:
            yield ForwardPasses(call=call, num_threads=torch.get_num_threads(), samples_in_piece=_MAX_SAMPLES_EAGER)


def session_passes(session: Session, *, num_parallel: int = 1, is_split: bool = True) -> ForwardPasses:
    """Run a loaded file. num_parallel: pieces at the same time, for a session of one thread that may be shared."""

    def call(inputs: Any) -> Any:
        return repack(session.output_names, session.run(feed(inputs, session.input_names)))

    return ForwardPasses(call=call, num_parallel=num_parallel, samples_in_piece=_MAX_SAMPLES if is_split else None)
