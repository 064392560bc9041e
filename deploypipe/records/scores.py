"""Scores of structures, and the log of the calibration pass."""

from dataclasses import dataclass, field

from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """One finite score for every unit of every group; higher = keep. Comparable within a group only."""

    scorer: str
    channels: dict[str, tuple[float, ...]]
    suggested: dict[str, int] = field(default_factory=dict)  # widths that the method itself suggests, if any
    reasons: dict[str, str] = field(default_factory=dict)  # groups scored by another method -> why
    is_cumulative: bool = False  # True: a score is the total loss after removing its unit, not the unit's own share
    stability: dict[str, float] = field(default_factory=dict)  # rank correlation between halves of the samples

    def __repr__(self) -> str:
        units = sum(map(len, self.channels.values()))
        lines = [f"ScoreTable: {units:,} units of {len(self.channels)} groups, by {self.scorer}; higher = keep"]
        if self.stability:
            name = min(self.stability, key=self.stability.__getitem__)
            lines.append(f"  least stable: {name}, rank correlation {self.stability[name]:.2f}")
        if self.reasons:
            lines.append(f"  groups that another method scored: {', '.join(self.reasons)}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The log of `observe`; the moments themselves are tensors."""

    num_samples: int
    skipped: dict[str, str]  # consumers without moments, and why


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRanking:
    """One finite importance for every removable block; higher = keep. Comparable within one ranking only."""

    scorer: str
    importance: dict[str, float]
    clusters: tuple[Names, ...] = ()  # similar blocks, if the method finds any


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSummary:
    """The redundancy of one group, by its scores."""

    name: str
    num_units: int
    kept_information: tuple[float, ...]  # share that the best 0, 1, ..., num_units units keep
    redundant: tuple[int, ...]  # units that can go while each of the summary's `shares` stays
    suggested: int | None
    stability: float | None
    null: float | None  # information found in shuffled data, as a share of that in the data
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """How much of a network is redundant, by one scorer, and which of its blocks are similar."""

    scorer: str
    num_samples: int
    shares: tuple[float, ...]  # of the information
    groups: tuple[GroupSummary, ...]
    shaky: tuple[str, ...]  # groups whose ranking changes between halves of the samples
    samples_wanted: int | None  # samples that would make them stable; None if none is shaky
    block_names: tuple[str, ...]
    block_cka: tuple[tuple[float, ...], ...]
    clusters: tuple[tuple[str, ...], ...]  # blocks whose outputs are alike, in order (arXiv:2408.13482)
