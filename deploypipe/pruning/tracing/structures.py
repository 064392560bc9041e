"""What can be removed from a network: channel groups and blocks, each tried out before it is offered."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.surgery.hook_computed_weights import with_plain_weights
from deploypipe.pruning.surgery.module_slicing import (
    cut_,
    forget_caches_,
    has_two_sides,
    is_stored,
    mask_,
    replace_by_identity_,
    sizes_after,
)
from deploypipe.pruning.tracing.constraints import matching, resolve, tie
from deploypipe.pruning.tracing.count_macs import Macs, count_operations
from deploypipe.pruning.tracing.coupled_channels import Coupling, freeze, losers, trace_groups
from deploypipe.pruning.tracing.module_calls import evaluating, one_thread_if_small, output_tensors, record_calls
from deploypipe.pruning.tracing.residual_blocks import find_blocks
from deploypipe.recipe import Constraints
from deploypipe.records import Block, ChannelGroup, Edit, Frozen, Structures
from deploypipe.task import forward, num_samples, repeat_samples, take

_TOLERANCE = 1e-3  # of the largest output: float32 sums in another order differ by 1e-6, a wrong coupling by 1e-1


def list_structures(
    model: nn.Module,
    inputs: Any,
    keep: Sequence[str] = (),
    constraints: Constraints | None = None,
    *,
    other_inputs: Sequence[Any] = (),
) -> Structures:
    """Everything removable in `model`, and everything that is not, with the reason.

    inputs: one batch, as the model gets it. other_inputs: batches of other sizes, or for which forward() takes another
    branch; what they read is kept too, and every group is tried with them. keep: glob patterns of module names; a
    structure that holds a match stays. Every group is tried: some of its units are cut from a copy with shaken weights,
    whose outputs must equal those of the copy in which the same units are masked; otherwise it is frozen. `model` is
    left as it was. Raises ModelError when the model is frozen or nothing in it can be removed, ConfigError when a
    pattern matches nothing or the constraints contradict each other.
    """
    found = find_structures(model, inputs, keep, constraints, other_inputs=other_inputs)
    if not found.groups and not found.blocks:
        rows = [row for row in found.frozen if row.kind != "weights"] or found.frozen
        why = "; ".join(f"{row.kind} {row.name!r}: {row.reason}" for row in rows) or "it calls no layers"
        raise ModelError(f"nothing in this network can be removed ({why}); change the network or loosen recipe.keep")
    return found


def find_structures(
    model: nn.Module,
    inputs: Any,
    keep: Sequence[str] = (),
    constraints: Constraints | None = None,
    *,
    other_inputs: Sequence[Any] = (),
) -> Structures:
    """`list_structures`, also where nothing can be removed."""
    model = with_plain_weights(unwrapped(model))
    constraints = constraints or Constraints()
    require_trainable(model)
    for pattern in keep:
        matching("keep", pattern, [name for name, _ in model.named_modules()], "module")
    macs = count_operations(model, inputs)
    inputs, *others = (pair_of(model, each) for each in (inputs, *other_inputs))
    calls = record_calls(model, inputs)
    place = {name: call.place for name, call in calls.items()}
    for other in others:
        place = {name: len(calls) + call.place for name, call in record_calls(model, other).items()} | place
    with one_thread_if_small(num_samples(inputs) * macs.total):
        blocks, frozen_blocks = find_blocks(copied(model), inputs, calls, macs)
        probe = _Probe(model, [inputs, *others])
        found = _find_channels(model, place, keep, probe)
        if found.stuck:
            again = _find_channels(model, place, keep, probe, as_wide=found.stuck)
            found = max(found, again, key=lambda f: len(f.covered))
        block_reasons = {b.name: _kept(_inside(model, b.name), keep) for b in blocks}
        block_reasons |= probe.blocks([b for b in blocks if not block_reasons[b.name]])
    chosen = sorted(
        found.chosen, key=lambda c: min(place.get(m.module, len(place)) for m in c.members if is_stored(m.side))
    )
    modules = dict(model.named_modules())
    losing = {name for c in chosen for name in losers(c, modules)}
    settled = losing | ({type(model).__name__} if "" in losing else set())  # by which its row goes
    # Where heads can go, it does not matter that dimensions inside of them cannot, and the other way round.
    failed = [c for c in found.failed if not _overlaps(c, chosen)]
    rows = [row for c in failed for row in freeze(c, found.failed[c], modules)]
    rows = [row for row in (*found.frozen, *rows) if row.name not in settled]
    for block in blocks:
        block_reasons[block.name] = block_reasons[block.name] or _joins(model, block, chosen)
    rows += [*frozen_blocks, *(Frozen(name=n, kind="block", reason=r) for n, r in block_reasons.items() if r)]
    unique = {(row.name, row.kind): row for row in rows}
    frozen = sorted(unique.values(), key=lambda row: place.get(row.name.partition(":")[0], -1))
    removable = tuple(b for b in blocks if not block_reasons[b.name])
    # Not tried again: the same units of all groups at once were.
    tied, homes = tie(chosen, constraints.tied, frozen)
    groups = tuple(_priced(model, tied, macs, probe))
    return Structures(
        model_fingerprint=model_fingerprint(model),
        groups=groups,
        blocks=removable,
        frozen=tuple(frozen),
        num_params=sum(p.numel() for p in model.parameters()),
        num_macs=macs.total,
        constraints=resolve(constraints, groups, homes, removable, frozen),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Channels:
    """What one trace found out about channels."""

    chosen: list[Coupling]
    failed: dict[Coupling, str]  # and why
    frozen: tuple[Frozen, ...]

    @property
    def covered(self) -> set[tuple[str, str, int]]:
        return set().union(*map(_touched, self.chosen))

    @property
    def stuck(self) -> set[str]:
        """Modules whose heads could not go."""
        return {c.name.rpartition(":")[0] for c in self.failed if c.kind == "heads"}


def _find_channels(
    model: nn.Module,
    place: Mapping[str, int],
    keep: Sequence[str],
    probe: "_Probe",
    as_wide: Collection[str] = (),
) -> _Channels:
    couplings, others, frozen = trace_groups(model, probe.batches, place, as_wide)
    reasons = {c.name: _kept((m.module for m in c.members), keep) for c in couplings}
    accepted, failures = probe.channels([c for c in couplings if not reasons[c.name]])
    more, _ = probe.channels([c for c in others if not _overlaps(c, accepted) and not _is_kept(c, keep)], accepted)
    chosen = [*accepted, *more]
    for pick in (_first_unit, _first_half):
        chosen, odd = probe.channels(chosen, pick=pick)
        failures |= odd
    reasons |= failures
    return _Channels(chosen=chosen, failed={c: reasons[c.name] for c in couplings if reasons[c.name]}, frozen=frozen)


def require_trainable(model: nn.Module) -> None:
    """ModelError for a network without a parameter that may change: neither surgery nor training could."""
    if not any(True for _ in model.parameters()):
        raise ModelError("the network has no parameters, so there is nothing to remove; give the trained network")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("all parameters are frozen (requires_grad=False); call model.requires_grad_(True) first")


def count_macs(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """(parameters, multiply-accumulates for one sample); changes nothing in it. What counts: `pruning.macs`."""
    model = with_plain_weights(unwrapped(model))
    with one_thread_if_small(0):  # one sample is small work for any network
        macs = count_operations(model, inputs)
    return sum(p.numel() for p in model.parameters()), macs.total


def model_fingerprint(model: nn.Module) -> str:
    """ "<structure>-<weights>": two hashes over the state dict, of names, shapes and dtypes, and of the values."""
    model = unwrapped(model)
    return state_fingerprint(model.state_dict().items())


def structure_fingerprint(model: nn.Module) -> str:
    """The first part of `model_fingerprint`."""
    structure = hashlib.sha256()
    for name, value in model.state_dict().items():
        structure.update(_described(name, value))
    return structure.hexdigest()[:32]


def _described(name: str, value: Any) -> bytes:
    return f"{name}:{tuple(value.shape)}:{value.dtype};".encode() if isinstance(value, Tensor) else b""


def state_fingerprint(state: Iterable[tuple[str, Any]]) -> str:
    """`model_fingerprint` of the network with these names and tensors."""
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name, value in state:
        if isinstance(value, Tensor):
            structure.update(_described(name, value))
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{structure.hexdigest()[:32]}-{weights.hexdigest()[:32]}"


def pair_of(model: nn.Module, inputs: Any) -> Any:
    """Two samples: enough to see shapes, and batch 1 would hide mistakes in the batch axis."""
    return take(repeat_samples(model, inputs, 2), 2)


def _inside(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{n}" if n else name for n, _ in model.get_submodule(name).named_modules()]


def _is_kept(coupling: Coupling, keep: Sequence[str]) -> bool:
    return bool(_kept((m.module for m in coupling.members), keep))


def _kept(modules: Any, keep: Sequence[str]) -> str:
    patterns = sorted({pattern for name in modules for pattern in keep if fnmatchcase(name, pattern)})
    return f"kept by recipe.keep ({', '.join(patterns)})" if patterns else ""


def _touched(coupling: Coupling) -> set[tuple[str, str, int]]:
    return {(m.module, m.side, i) for m in coupling.members if is_stored(m.side) for unit in m.units for i in unit}


def _overlaps(coupling: Coupling, others: Sequence[Coupling]) -> bool:
    mine = _touched(coupling)
    return any(mine & _touched(other) for other in others)


def _joins(model: nn.Module, block: Block, couplings: Sequence[Coupling]) -> str:
    """Why a block cannot go that writes other channels than it reads: without it, they would have to be the same."""
    for coupling in couplings:
        layers = {m.module: model.get_submodule(m.module) for m in coupling.members if m.side == "out"}
        writers = {name for name, layer in layers.items() if has_two_sides(layer) or isinstance(layer, nn.Embedding)}
        readers = {m.module for m in coupling.members if m.side == "in"}
        inside = {name for name in writers | readers if name.startswith(f"{block.name}.")}
        passes_on = bool(writers - inside) and bool(readers - inside)  # a stream that goes on around the block
        if inside and (writers | readers) - inside and not passes_on:
            return f"reads or writes channels ({coupling.name!r}) that would have to be others without it"
    return ""


def _priced(model: nn.Module, couplings: Sequence[Coupling], macs: Macs, probe: "_Probe") -> Iterator[ChannelGroup]:
    """Each coupling with what its first unit costs in the dense network.

    Products of a parameter cost in proportion to what is left of it. Where this is not all (attention, computed
    weights, a layer that runs along another axis than the channels), each group is cut alone and counted.
    """
    first = {c.name: [Edit(module=m.module, side=m.side, removed=m.units[0]) for m in c.members] for c in couplings}
    num_params = sum(p.numel() for p in model.parameters())
    dense = probe.count([])  # of its own weights, by which a router may choose other experts
    edits = [edit for each in first.values() for edit in each]
    counts_each = bool(couplings) and not _are_in_proportion(model, edits, dense, probe)
    for coupling in couplings:
        params, shares = sizes_after(model, first[coupling.name])
        saved = sum((1 - share) * macs.by_parameter.get(name, 0) for name, share in shares.items())
        if counts_each:
            saved = dense.total - probe.count(first[coupling.name]).total
        yield ChannelGroup(
            name=coupling.name,
            kind=coupling.kind,
            num_units=coupling.num_units,
            members=coupling.members,
            params_per_unit=num_params - params,
            macs_per_unit=round(saved, 6),
        )


def _are_in_proportion(model: nn.Module, edits: Sequence[Edit], macs: Macs, probe: "_Probe") -> bool:
    """Whether, once all edits are done, each parameter costs what its share says, and nothing else costs less."""
    shares, left = sizes_after(model, edits)[1], probe.count(edits)
    expected = {name: count * shares.get(name, 1) for name, count in macs.by_parameter.items()}
    return left.of_activations == macs.of_activations and all(
        abs(left.by_parameter.get(name, 0) - count) < 0.5 for name, count in expected.items()
    )


class _Probe:
    """Tries removals on copies of one model whose weights are shaken, so that no zero hides a wrong coupling."""

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
        """Those that can be trusted all together (with `base`), and why each of the others cannot.

        pick: the units to try; by default a part of them.

        Tried at once, and by halves where that fails: a few failures among many cost a few trials each.
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
        except Exception as error:  # of ours, or of a module of an unknown class that lets nothing be replaced in it
            raise_if_exhausted(error)
            return f"deploypipe cannot cut these channels: {type(error).__name__}: {error}"
        try:
            outputs = self._run(cut)
        except Exception as error:  # whatever the user's forward() raises on widths it was not written for
            raise_if_exhausted(error)
            return f"the network fails without these channels: {type(error).__name__}: {error}"
        return _differ(expected, outputs, "the traced coupling is wrong (sizes written into the code?)")

    def blocks(self, blocks: Sequence[Block]) -> dict[str, str]:
        """Why blocks cannot be replaced by the identity, for each that cannot."""
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
        """Multiply-accumulates that are left. ModelError where the network fails: other channels have to go too."""
        cut = self._copy(edits)
        cut_(cut, edits)
        try:
            return count_operations(cut, self.batches[0])
        except Exception as error:  # whatever the user's forward() raises
            raise_if_exhausted(error)
            names = ", ".join(dict.fromkeys(repr(edit.module) for edit in edits))
            raise ModelError(
                f"the network fails when {names} lose channels that no others do "
                f"({type(error).__name__}: {error}); keep them with recipe.keep"
            ) from error

    def _copy(self, edits: Sequence[Edit]) -> nn.Module:
        """A copy that shares every parameter and buffer with the model but those of the edited modules."""
        touched = {id(t) for e in edits for t in _own(self.model.get_submodule(e.module))}
        shared = {id(t): t for m in self.model.modules() for t in _own(m) if id(t) not in touched}
        copy = copied(self.model, shared)
        forget_caches_(copy)
        return copy

    def _run(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return [t for inputs in self.batches for t in output_tensors(forward(model, deepcopy(inputs)))]


def _tried_units(coupling: Coupling) -> list[int]:
    """About a third, a quarter or a half of the units, by the name: widths that only happen to agree must not help."""
    units = range(coupling.num_units)
    some = ({0, units[-1], *units[1::3]}, {*units[1::4]}, {*units[::2]})[crc32(coupling.name.encode()) % 3]
    return sorted(some)[: coupling.num_units - 1]


def _first_unit(_: Coupling) -> list[int]:
    """One unit: what is left is an odd width, which some networks refuse (`assert width % 4 == 0`)."""
    return [0]


def _first_half(coupling: Coupling) -> range:
    """Of units from all over, a share of the channels (`x[:, : x.shape[1] // 4]`) would lose its share."""
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
