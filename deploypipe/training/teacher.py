"""The dense network as a teacher. Its outputs are stored, so that trainings of other plans and targets reuse them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deploypipe.networks.tree_hashes import digest_of
from deploypipe.task import forward

_MAX_BYTES = 2**30  # in a folder


class Teacher:
    """Reads a batch's outputs from its folder, or computes them with `dense`.

    A folder belongs to one dense network and one arithmetic precision. It holds a file for each epoch with the outputs
    of its batches, by a hash of their inputs. The first training writes the file at the end of the epoch, and later
    ones read it; missing outputs are computed. Outputs beyond 1 GiB in all, or in several tensors, are not kept.
    """

    def __init__(self, dense: nn.Module, folder: Path | None = None) -> None:
        self.dense, self.folder = dense, folder
        self._known: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] | None = None  # None while nothing is to be kept
        self._room = 0

    @contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """Around the batches of an epoch. New outputs are stored only if the block ends without an error."""
        if self.folder is None:
            yield
            return
        path = self.folder / f"epoch-{number}.safetensors"
        self._known = _read(path)
        self._new = None if self._known else {}
        self._room = _MAX_BYTES - sum(file.stat().st_size for file in self.folder.glob("epoch-*"))
        try:
            yield
            if self._new:
                _write(path, self._new)
        finally:
            self._known, self._new = {}, None

    def __call__(self, inputs: Any) -> Any:
        if not self._known and self._new is None:
            return forward(self.dense, inputs)
        name = digest_of(inputs, describe=repr)  # two objects of a class may differ: those are computed again
        if name in self._known:
            return self._known[name]
        outputs = forward(self.dense, inputs)
        if self._new is not None:
            self._keep(name, outputs, self._new)
        return outputs

    def _keep(self, name: str, outputs: Any, new: dict[str, Tensor]) -> None:
        if not isinstance(outputs, Tensor) or outputs.nbytes > self._room:
            self._new = None  # for the rest of the epoch
            return
        new[name] = outputs.contiguous().clone()  # outputs may share one tensor
        self._room -= outputs.nbytes


def _read(path: Path) -> dict[str, Tensor]:
    """The stored outputs; empty if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stored:
            outputs = {name: stored.get_tensor(name) for name in sorted(stored.keys())}
            return outputs if (stored.metadata() or {}).get("digest") == digest_of(list(outputs.values())) else {}
    except (OSError, SafetensorError):
        return {}


def _write(path: Path, outputs: dict[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # others may be at the same file
    save_file(outputs, part, metadata={"digest": digest_of([outputs[name] for name in sorted(outputs)])})
    part.replace(path)
