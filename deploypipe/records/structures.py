"""The structures of a network that can be removed."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from deploypipe.text.aligned_table import aligned

_MAX_SHOWN = 40  # rows of a table in a repr
_MAX_REASON = 80  # characters

# "in" or "out" of a layer; "pos_embed.2", an axis of one of a module's tensors; "@num_heads", an attribute that counts.
Side: TypeAlias = str
GroupKind: TypeAlias = Literal["channels", "heads", "head_dims"]
Names: TypeAlias = tuple[str, ...]  # of blocks, in execution order


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One side of one module that a channel group shares.

    `units[i]` are the module's own indices that belong to the group's unit i (several after a flatten).
    """

    module: str
    side: Side
    units: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelGroup:
    """Channels that must be removed together: producers, the normalisations between, and all consumers."""

    name: str  # the module that produces the channels, as in `named_modules()`; "MODULE:heads" for attention heads
    num_units: int
    members: tuple[Member, ...]
    params_per_unit: float  # saved by removing one unit from the dense network
    macs_per_unit: float  # multiply-accumulates of one sample, likewise
    kind: GroupKind = "channels"

    def step(self, channel_multiple: int) -> int:
        """The multiple of units that widths are rounded to. The target's multiple applies to channels, not to heads."""
        return channel_multiple if self.kind == "channels" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A module with input and output of the same shape, so that it can be replaced by the identity."""

    name: str
    params: int
    macs: int
    # If it returns a tuple: for each item after the output, the parameter whose argument it passes on, or "".
    returns: Names | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """A structure that cannot be removed, and the reason."""

    name: str
    kind: GroupKind | Literal["block", "weights"]  # "weights": those of a module with no outputs of its own (a norm)
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedConstraints:
    """Rules for every choice of widths and blocks: the recipe's constraints, with patterns resolved to names."""

    least: dict[str, int] = field(default_factory=dict)  # by group: units that stay
    uniform: tuple[tuple[str, ...], ...] = ()  # groups with one width; disjoint, of one dense width, kind and least
    least_blocks: int = 0  # of `Structures.blocks`, how many stay


@dataclass(frozen=True, kw_only=True, slots=True)
class Structures:
    """The structures of one network that can be removed, and those that cannot."""

    model_fingerprint: str
    groups: tuple[ChannelGroup, ...]  # in execution order
    blocks: tuple[Block, ...]  # in execution order, not nested in each other
    frozen: tuple[Frozen, ...]
    num_params: int
    num_macs: int  # one sample
    constraints: ResolvedConstraints = field(default_factory=ResolvedConstraints)

    def __repr__(self) -> str:
        """A table of the groups, the blocks, and what stays whole with the reason."""
        head = f"Structures: {self.num_params:,} parameters, {self.num_macs:,} multiply-accumulates of one sample"
        groups = [(g.name, g.kind, str(g.num_units), _shown_members(g)) for g in self.groups]
        blocks = [
            (b.name, "block", "", f"{b.params:,} parameters, {b.macs:,} multiply-accumulates") for b in self.blocks
        ]
        frozen = [(f.name, f.kind, "stays", f.reason[:_MAX_REASON]) for f in self.frozen]
        lines = [head]
        for title, rows in (("group", groups), ("block", blocks), ("stays whole", frozen)):
            if rows:
                last = "reason" if rows is frozen else "members" if rows is groups else "size"
                lines += ["", *aligned([(title, "kind", "units", last), *rows[:_MAX_SHOWN]])]
                lines += [f"... and {len(rows) - _MAX_SHOWN} more"] if len(rows) > _MAX_SHOWN else []
        return "\n".join(lines)

    def least_width(self, group: ChannelGroup, channel_multiple: int) -> int:
        """The narrowest width allowed for `group`, in whole steps; at most its dense width."""
        step = group.step(channel_multiple)
        return min(-(-self.constraints.least.get(group.name, 1) // step) * step, group.num_units)


def _shown_members(group: ChannelGroup) -> str:
    first = [f"{member.module} {member.side}" for member in group.members[:3]]
    more = len(group.members) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
