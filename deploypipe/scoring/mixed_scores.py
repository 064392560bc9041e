"""Mix the rankings of two scorers into one."""

from dataclasses import replace

import numpy as np
from scipy.stats import rankdata

from deploypipe.records import ScoreTable


def mixed(table: ScoreTable, other: ScoreTable, weight: float) -> ScoreTable:
    """Rank units by the weighted mean of their ranks within the group; the new scores are ranks.

    weight: that of `other`; 0 returns `table` unchanged. For equal mean ranks the ranking of `table` decides.
    """
    if weight == 0:
        return table
    channels = {}
    for name, scores in table.channels.items():
        own, others = (rankdata(values, method="ordinal") for values in (scores, other.channels[name]))
        order = np.lexsort((own, (1 - weight) * own + weight * others))
        channels[name] = tuple(rankdata(order.argsort(), method="ordinal").astype(float).tolist())
    return replace(table, channels=channels, is_cumulative=False)
