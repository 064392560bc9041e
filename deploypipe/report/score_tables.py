"""The scores of a network as table rows, for the terminal and for the report."""

from deploypipe.records import ScoreSummary


def score_table(summary: ScoreSummary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return heads and one row for each group: how many units could go at each share of kept information.

    Stability says how sure that is. Empty columns are left out.
    """
    heads = (
        "group",
        "units",
        *(f"at {100 * s:g} %" for s in summary.shares),
        "suggested",
        "stability",
        "by chance",
        "remark",
    )
    rows = [
        (
            group.name,
            str(group.num_units),
            *map(str, group.redundant),
            "" if group.suggested is None else str(group.suggested),
            "" if group.stability is None else f"{group.stability:.2f}",
            "" if group.null is None else f"{100 * group.null:.0f} %",
            group.reason,
        )
        for group in summary.groups
    ]
    shown = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    return tuple(heads[c] for c in shown), [tuple(row[c] for c in shown) for row in rows]


def score_notes(summary: ScoreSummary) -> list[str]:
    """Warn if the ranking of a group depends on the half of the samples that it is taken from."""
    if not summary.shaky:
        return []
    lowest = min(group.stability for group in summary.groups if group.stability is not None)
    wanted = summary.samples_wanted
    remedy = f"about {wanted} samples would settle them" if wanted else "far more samples, or another scorer, may help"
    return [
        f"{len(summary.shaky)} of {len(summary.groups)} rankings change between halves of the samples (lowest rank "
        f"correlation {lowest:.2f}); {remedy} (observe.num_samples)."
    ]
