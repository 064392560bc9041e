"""Try removals on copies of a network before they are offered."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.modules.count_macs import Macs, count_operations
from deploypipe.pruning.modules.module_calls import evaluating, output_tensors
from deploypipe.pruning.surgery.module_masking import mask_
from deploypipe.pruning.surgery.module_slicing import cut_, forget_caches_
from deploypipe.pruning.surgery.remove_blocks import replace_by_identity_
from deploypipe.pruning.tracing.removable_units import Coupling
from deploypipe.records import Block, Edit
from deploypipe.task import forward

_TOLERANCE = 1e-3  # of the largest output: float32 sums in another order differ by 1e-6, a wrong coupling by 1e-1


class RemovalTrials:
    """Try removals on copies of one model with perturbed weights, so that no zero hides a wrong coupling."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.model = copied(model).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                size = parameter.abs().mean().item()
                size = size if size > 0.01 or parameter.dim() > 1 else 1.0  # a layer scale of 1e-6 would hide the layer
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.1 * size or 0.1)
        self.dense = self._run(self.model)

    def channels(
        self,
        couplings: Sequence[Coupling],
        base: Sequence[Coupling] = (),
        pick: Callable[[Coupling], Sequence[int]] | None = None,
    ) -> tuple[list[Coupling], dict[str, str]]:
        """The couplings that work together (and with `base`), and the reason why each of the others does not.

        pick: the units to try; by default a part of them. All couplings are tried at once; if that fails, by halves, so
        a few failures among many cost a few trials each.
        """
        pick = pick or _tried_units
        reason = self._try_channels([*base, *couplings], pick) if couplings else ""
        if not reason:
            return list(couplings), {}
        if len(couplings) == 1:
            return [], {couplings[0].name: reason}
        half = len(couplings) // 2
        first, failures = self.channels(couplings[:half], base, pick)
        second, others = self.channels(couplings[half:], [*base, *first], pick)
        return [*first, *second], {**failures, **others}

    def _try_channels(self, couplings: Sequence[Coupling], pick: Callable[[Coupling], Sequence[int]]) -> str:
        edits = []
        for coupling in couplings:
            some = pick(coupling)
            edits += [Edit(module=m.module, side=m.side, removed=_union(m.units, some)) for m in coupling.members]
        masked, cut = self._copy(edits), self._copy(edits)
        try:
            mask_(masked, edits)
            cut_(cut, edits)
            expected = self._run(masked)
        except Exception as error:  # ours, or an unknown module class in which nothing can be replaced
            raise_if_exhausted(error)
            return f"deploypipe cannot cut these channels: {type(error).__name__}: {error}"
        try:
            outputs = self._run(cut)
        except Exception as error:  # whatever the user's forward() raises on widths it was not written for
            raise_if_exhausted(error)
            return f"the network fails without these channels: {type(error).__name__}: {error}"
        return _differ(expected, outputs, "the traced coupling is wrong (are sizes written in the code?)")

    def blocks(self, blocks: Sequence[Block]) -> dict[str, str]:
        """Blocks that cannot be replaced by the identity, each with the reason."""
        reason = self._try_blocks(blocks) if blocks else ""
        if not reason:
            return {}
        if len(blocks) == 1:
            return {blocks[0].name: reason}
        half = len(blocks) // 2
        return {**self.blocks(blocks[:half]), **self.blocks(blocks[half:])}

    def _try_blocks(self, blocks: Sequence[Block]) -> str:
        copy = copied(self.model)
        try:
            replace_by_identity_(copy, {block.name: block.returns for block in blocks})
        except Exception as error:  # as above
            raise_if_exhausted(error)
            return f"deploypipe cannot replace this block: {type(error).__name__}: {error}"
        try:
            outputs = self._run(copy)
        except Exception as error:  # as above
            raise_if_exhausted(error)
            return f"the network fails without this block: {type(error).__name__}: {error}"
        shapes = [tuple(t.shape) for t in outputs]
        return "" if shapes == [tuple(t.shape) for t in self.dense] else f"without it the outputs have shapes {shapes}"

    def count(self, edits: Sequence[Edit]) -> Macs:
        """MACs after the edits. Raises ModelError if the network fails, because other channels must be removed too."""
        cut = self._copy(edits)
        cut_(cut, edits)
        try:
            return count_operations(cut, self.batches[0])
        except Exception as error:  # whatever the user's forward() raises
            raise_if_exhausted(error)
            names = ", ".join(dict.fromkeys(repr(edit.module) for edit in edits))
            raise ModelError(
                f"the network fails if only {names} lose channels ({type(error).__name__}: {error}); name them in keep"
            ) from error

    def _copy(self, edits: Sequence[Edit]) -> nn.Module:
        """A copy that shares all parameters and buffers with the model, except those of the edited modules."""
        touched = {id(t) for e in edits for t in _own(self.model.get_submodule(e.module))}
        shared = {id(t): t for m in self.model.modules() for t in _own(m) if id(t) not in touched}
        copy = copied(self.model, shared)
        forget_caches_(copy)
        return copy

    def _run(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return [t for inputs in self.batches for t in output_tensors(forward(model, deepcopy(inputs)))]


def _tried_units(coupling: Coupling) -> list[int]:
    """A third, a quarter or a half of the units, chosen by the name, so that widths do not agree by chance."""
    units = range(coupling.num_units)
    some = ({0, units[-1], *units[1::3]}, {*units[1::4]}, {*units[::2]})[crc32(coupling.name.encode()) % 3]
    return sorted(some)[: coupling.num_units - 1]


def first_unit(_: Coupling) -> list[int]:
    """One unit. The remaining width is odd, which some networks refuse (`assert width % 4 == 0`)."""
    return [0]


def first_half(coupling: Coupling) -> range:
    """The first half of the units. Spread units would hide a slice by share (`x[:, : x.shape[1] // 4]`)."""
    return range(coupling.num_units // 2)


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _union(units: Sequence[Sequence[int]], some: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({i for u in some for i in units[u]}))


def _differ(expected: list[Tensor], seen: list[Tensor], cause: str) -> str:
    for a, b in zip(expected, seen, strict=True):
        if a.shape != b.shape:
            return (
                f"its channels are the network's output (shape {tuple(a.shape[1:])} would become {tuple(b.shape[1:])})"
            )
        scale = a.abs().max().item()
        error = (a.double() - b.double()).abs().max().item()
        if not error <= _TOLERANCE * scale:
            return f"cutting differs from masking by {error / max(scale, 1e-30):.1g} of the output: {cause}"
    return ""
