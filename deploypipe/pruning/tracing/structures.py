"""List what can be removed from a network: channel groups and blocks, each tried before it is offered."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from deploypipe.errors import ModelError
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.modules.count_macs import Macs, count_operations
from deploypipe.pruning.modules.hook_computed_weights import with_plain_weights
from deploypipe.pruning.modules.module_calls import one_thread_if_small, record_calls, two_samples
from deploypipe.pruning.modules.module_kinds import has_two_sides, is_stored
from deploypipe.pruning.surgery.module_slicing import sizes_after
from deploypipe.pruning.tracing.coupled_channels import freeze, shrinking_modules, trace_groups
from deploypipe.pruning.tracing.removable_units import Coupling
from deploypipe.pruning.tracing.removal_trials import RemovalTrials, first_half, first_unit
from deploypipe.pruning.tracing.residual_blocks import find_blocks
from deploypipe.pruning.tracing.resolve_constraints import matching, resolve, tie
from deploypipe.recipe import Constraints
from deploypipe.records import Block, ChannelGroup, Edit, Frozen, Structures
from deploypipe.task import num_samples


def list_structures(
    model: nn.Module,
    inputs: Any,
    keep: Sequence[str] = (),
    constraints: Constraints | None = None,
    *,
    other_inputs: Sequence[Any] = (),
) -> Structures:
    """List everything removable in `model`, and everything that is not with the reason.

    inputs: one batch, as the model gets it. other_inputs: batches of other sizes, or for which forward() takes another
    branch; what they read is kept too, and every group is tried with them. keep: glob patterns of module names; a
    structure that contains a match stays. Every group is tried on a copy with perturbed weights: after some units are
    cut, the outputs must equal those of a copy in which the same units are masked. Otherwise the group is frozen.
    `model` is left unchanged. Raises ModelError if the model is frozen or nothing in it can be removed, and ConfigError
    if a pattern matches nothing or the constraints contradict each other.
    """
    found = find_structures(model, inputs, keep, constraints, other_inputs=other_inputs)
    if not found.groups and not found.blocks:
        rows = [row for row in found.frozen if row.kind != "weights"] or found.frozen
        why = "; ".join(f"{row.kind} {row.name!r}: {row.reason}" for row in rows) or "it calls no layers"
        raise ModelError(f"nothing in this network can be removed ({why}); change the network or loosen keep")
    return found


def find_structures(
    model: nn.Module,
    inputs: Any,
    keep: Sequence[str] = (),
    constraints: Constraints | None = None,
    *,
    other_inputs: Sequence[Any] = (),
) -> Structures:
    """`list_structures`, but without an error if nothing can be removed."""
    model = with_plain_weights(unwrapped(model))
    constraints = constraints or Constraints()
    require_trainable(model)
    for pattern in keep:
        matching("keep", pattern, [name for name, _ in model.named_modules()], "module")
    macs = count_operations(model, inputs)
    inputs, *others = (two_samples(model, each) for each in (inputs, *other_inputs))
    calls = record_calls(model, inputs)
    place = {name: call.place for name, call in calls.items()}
    for other in others:
        place = {name: len(calls) + call.place for name, call in record_calls(model, other).items()} | place
    with one_thread_if_small(num_samples(inputs) * macs.total):
        blocks, frozen_blocks = find_blocks(copied(model), inputs, calls, macs)
        trials = RemovalTrials(model, [inputs, *others])
        found = _find_channels(model, place, keep, trials)
        if found.modules_with_failed_heads:
            again = _find_channels(model, place, keep, trials, as_wide=found.modules_with_failed_heads)
            found = max(found, again, key=lambda f: len(f.covered))
        block_reasons = {b.name: _kept(_inside(model, b.name), keep) for b in blocks}
        block_reasons |= trials.blocks([b for b in blocks if not block_reasons[b.name]])
    chosen = sorted(
        found.chosen, key=lambda c: min(place.get(m.module, len(place)) for m in c.members if is_stored(m.side))
    )
    modules = dict(model.named_modules())
    losing = {name for c in chosen for name in shrinking_modules(c, modules)}
    settled = losing | ({type(model).__name__} if "" in losing else set())  # the name of its row
    # If heads can be removed, it does not matter that dimensions inside them cannot, and vice versa.
    failed = [c for c in found.failed if not _overlaps(c, chosen)]
    rows = [row for c in failed for row in freeze(c, found.failed[c], modules)]
    rows = [row for row in (*found.frozen, *rows) if row.name not in settled]
    for block in blocks:
        block_reasons[block.name] = block_reasons[block.name] or _why_channels_need_block(model, block, chosen)
    rows += [*frozen_blocks, *(Frozen(name=n, kind="block", reason=r) for n, r in block_reasons.items() if r)]
    unique = {(row.name, row.kind): row for row in rows}
    frozen = sorted(unique.values(), key=lambda row: place.get(row.name.partition(":")[0], -1))
    removable = tuple(b for b in blocks if not block_reasons[b.name])
    # Ties are not tried again: the same units of all groups were already tried together.
    tied, homes = tie(chosen, constraints.tied, frozen)
    groups = tuple(_with_costs(model, tied, macs, trials))
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
    """The channels that one trace found."""

    chosen: list[Coupling]
    failed: dict[Coupling, str]  # coupling -> reason
    frozen: tuple[Frozen, ...]

    @property
    def covered(self) -> set[tuple[str, str, int]]:
        return set().union(*map(_touched, self.chosen))

    @property
    def modules_with_failed_heads(self) -> set[str]:
        """Modules whose heads could not be removed."""
        return {c.name.rpartition(":")[0] for c in self.failed if c.kind == "heads"}


def _find_channels(
    model: nn.Module,
    place: Mapping[str, int],
    keep: Sequence[str],
    trials: RemovalTrials,
    as_wide: Collection[str] = (),
) -> _Channels:
    couplings, others, frozen = trace_groups(model, trials.batches, place, as_wide)
    reasons = {c.name: _kept((m.module for m in c.members), keep) for c in couplings}
    accepted, failures = trials.channels([c for c in couplings if not reasons[c.name]])
    more, _ = trials.channels([c for c in others if not _overlaps(c, accepted) and not _is_kept(c, keep)], accepted)
    chosen = [*accepted, *more]
    for pick in (first_unit, first_half):
        chosen, odd = trials.channels(chosen, pick=pick)
        failures |= odd
    reasons |= failures
    return _Channels(chosen=chosen, failed={c: reasons[c.name] for c in couplings if reasons[c.name]}, frozen=frozen)


def require_trainable(model: nn.Module) -> None:
    """Raise ModelError if no parameter of the network may change: then neither surgery nor training is possible."""
    if not any(True for _ in model.parameters()):
        raise ModelError("the network has no parameters, so nothing can be removed; pass the trained network")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("all parameters are frozen (requires_grad=False); call model.requires_grad_(True) first")


def _inside(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{n}" if n else name for n, _ in model.get_submodule(name).named_modules()]


def _is_kept(coupling: Coupling, keep: Sequence[str]) -> bool:
    return bool(_kept((m.module for m in coupling.members), keep))


def _kept(modules: Any, keep: Sequence[str]) -> str:
    patterns = sorted({pattern for name in modules for pattern in keep if fnmatchcase(name, pattern)})
    return f"matches keep ({', '.join(patterns)})" if patterns else ""


def _touched(coupling: Coupling) -> set[tuple[str, str, int]]:
    return {(m.module, m.side, i) for m in coupling.members if is_stored(m.side) for unit in m.units for i in unit}


def _overlaps(coupling: Coupling, others: Sequence[Coupling]) -> bool:
    mine = _touched(coupling)
    return any(mine & _touched(other) for other in others)


def _why_channels_need_block(model: nn.Module, block: Block, couplings: Sequence[Coupling]) -> str:
    """Why a block cannot be removed: without it, the channels it reads and writes would have to be the same."""
    for coupling in couplings:
        layers = {m.module: model.get_submodule(m.module) for m in coupling.members if m.side == "out"}
        writers = {name for name, layer in layers.items() if has_two_sides(layer) or isinstance(layer, nn.Embedding)}
        readers = {m.module for m in coupling.members if m.side == "in"}
        inside = {name for name in writers | readers if name.startswith(f"{block.name}.")}
        passes_on = bool(writers - inside) and bool(readers - inside)  # a residual stream continues around the block
        if inside and (writers | readers) - inside and not passes_on:
            return f"reads or writes channels ({coupling.name!r}) that would have to change without it"
    return ""


def _with_costs(
    model: nn.Module, couplings: Sequence[Coupling], macs: Macs, trials: RemovalTrials
) -> Iterator[ChannelGroup]:
    """Each coupling as a group, with the parameters and MACs of its first unit in the dense network.

    Products with a parameter cost in proportion to its remaining size. If other products change too (attention,
    computed weights, a layer along another axis than the channels), each group is cut alone and counted.
    """
    first = {c.name: [Edit(module=m.module, side=m.side, removed=m.units[0]) for m in c.members] for c in couplings}
    num_params = sum(p.numel() for p in model.parameters())
    dense = trials.count([])  # with perturbed weights, because a router may choose other experts
    edits = [edit for each in first.values() for edit in each]
    counts_each = bool(couplings) and not _are_in_proportion(model, edits, dense, trials)
    for coupling in couplings:
        params, shares = sizes_after(model, first[coupling.name])
        saved = sum((1 - share) * macs.by_parameter.get(name, 0) for name, share in shares.items())
        if counts_each:
            saved = dense.total - trials.count(first[coupling.name]).total
        yield ChannelGroup(
            name=coupling.name,
            kind=coupling.kind,
            num_units=coupling.num_units,
            members=coupling.members,
            params_per_unit=num_params - params,
            macs_per_unit=round(saved, 6),
        )


def _are_in_proportion(model: nn.Module, edits: Sequence[Edit], macs: Macs, trials: RemovalTrials) -> bool:
    """Whether after all edits each parameter costs what its share predicts, and nothing else costs less."""
    shares, left = sizes_after(model, edits)[1], trials.count(edits)
    expected = {name: count * shares.get(name, 1) for name, count in macs.by_parameter.items()}
    return left.of_activations == macs.of_activations and all(
        abs(left.by_parameter.get(name, 0) - count) < 0.5 for name, count in expected.items()
    )
