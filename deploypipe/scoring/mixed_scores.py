"""Two scorers' rankings as one."""

from dataclasses import replace

import numpy as np
from scipy.stats import rankdata

from deploypipe.records import ScoreTable


def mixed(table: ScoreTable, other: ScoreTable, weight: float) -> ScoreTable:
    """Units by the weighted mean of their ranks within the group, `weight` that of `other`; scores are ranks then.

    A weight of 0 gives `table` as it is. Where mean ranks are equal, the ranking of `table` decides.
    """
    if weight == 0:
        return table
    channels = {}
    for name, scores in table.channels.items():
        own, others = (rankdata(values, method="ordinal") for values in (scores, other.channels[name]))
        order = np.lexsort((own, (1 - weight) * own + weight * others))
        channels[name] = tuple(rankdata(order.argsort(), method="ordinal").astype(float).tolist())
    return replace(table, channels=channels, is_cumulative=False)
