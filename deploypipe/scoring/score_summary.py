"""Summarize a score table: how much is redundant, how certain that is, and which blocks are similar."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from deploypipe.observe.pass_statistics import Moments
from deploypipe.records import ChannelGroup, GroupSummary, ScoreSummary, ScoreTable, Structures
from deploypipe.scoring.blocks.mpruner import cluster_blocks
from deploypipe.scoring.score_stability import recommended_samples

CLUSTER_THRESHOLD = 0.98  # of CKA; the published default
SHARES = (0.90, 0.95, 0.99)  # of the information; redundancy is reported at this share
LOW_STABILITY = 0.8  # rank correlation between halves below which a ranking is mostly chance


def summarise(
    structures: Structures, table: ScoreTable, moments: Moments, nulls: Mapping[str, float] | None = None
) -> ScoreSummary:
    """Summarize scores by group and block, with `permutation_baseline_shares` if given."""
    shaky = {name: rho for name, rho in table.stability.items() if rho < LOW_STABILITY}
    return ScoreSummary(
        scorer=table.scorer,
        num_samples=moments.num_samples,
        shares=SHARES,
        groups=tuple(_summarise_group(group, table, nulls or {}) for group in structures.groups),
        shaky=tuple(shaky),
        samples_wanted=recommended_samples(min(shaky.values()), moments.num_samples) if shaky else None,
        block_names=moments.block_names,
        block_cka=tuple(tuple(row) for row in moments.block_cka.tolist()),
        clusters=cluster_blocks(structures, moments, CLUSTER_THRESHOLD),
    )


def _summarise_group(group: ChannelGroup, table: ScoreTable, nulls: Mapping[str, float]) -> GroupSummary:
    is_cumulative = table.is_cumulative and group.name not in table.reasons
    kept = kept_information(table.channels[group.name], is_cumulative=is_cumulative)
    return GroupSummary(
        name=group.name,
        num_units=group.num_units,
        kept_information=kept,
        redundant=tuple(num_redundant(kept, share) for share in SHARES),
        suggested=table.suggested.get(group.name),
        stability=table.stability.get(group.name),
        null=nulls.get(group.name),
        reason=table.reasons.get(group.name, ""),
    )


def kept_information(scores: Sequence[float], *, is_cumulative: bool) -> tuple[float, ...]:
    """Share of a group's information that its best 0, 1, ..., n units keep; all 1 if there is none.

    Cumulative scores give it directly: the k-th lowest is the loss of k removals. Other scores are taken as shares of
    their sum, which counts information shared by two units twice.
    """
    rising = sorted(max(0.0, score) for score in scores)
    lost = rising if is_cumulative else list(accumulate(rising))
    total = lost[-1]
    if total <= 0:
        return (1.0,) * (len(scores) + 1)
    return tuple(1 - min(1.0, value / total) for value in reversed([0.0, *lost]))


def num_redundant(kept: Sequence[float], share: float) -> int:
    """How many units can be removed while `share` of the information stays."""
    enough = next(width for width, value in enumerate(kept) if value >= share - 1e-12)
    return len(kept) - 1 - enough
