"""Pruning plans: what is removed, and the results of removing it."""

from dataclasses import dataclass, field
from typing import Literal

from deploypipe.records.structures import GroupKind, Names, Side


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Indices removed from one side of one module, in the dense module's numbering."""

    module: str
    side: Side
    removed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCut:
    """Units removed from one channel group."""

    group: str
    asked: int  # units asked for, before rounding widths to the target's multiple
    removed: tuple[int, ...]
    num_units: int
    reason: str = ""  # why `asked` and `removed` differ


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningPlan:
    """Everything needed to turn the dense network into the pruned one again: pure data, no tracing, no weights."""

    model_fingerprint: str
    cuts: tuple[GroupCut, ...]
    edits: tuple[Edit, ...]
    blocks: tuple[str, ...]  # replaced by the identity
    returns: dict[str, Names] = field(default_factory=dict)  # of blocks that return a tuple, as in `Block`


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRow:
    """The width asked for and the width realised, for one structure."""

    name: str
    kind: GroupKind | Literal["block"]
    width_before: int
    asked: int  # width asked for
    realised: int  # width in the new network
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    rows: tuple[PruneRow, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    notes: Names = ()  # changes to the network's own config, if it has one


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairRow:
    """One layer's relative squared error against the dense network, before and after its weights were solved."""

    module: str
    error_before: float | None = None  # None: not measured
    error_after: float | None = None
    reason: str = ""  # why it was not changed; "" if it was


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    rows: tuple[RepairRow, ...]
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOutcome:
    """Surgery and repair of the chosen plan."""

    prune: PruneReport
    repair: RepairReport
