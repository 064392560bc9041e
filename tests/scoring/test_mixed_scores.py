"""Mixing two rankings into one."""

from hypothesis import given
from hypothesis import strategies as st

from deploypipe.records import ScoreTable
from deploypipe.scoring.mixed_scores import mixed

SCORES = st.lists(st.floats(-10, 10), min_size=6, max_size=6)


def table(scores: list[float]) -> ScoreTable:
    return ScoreTable(scorer="any", channels={"group": tuple(scores)})


def order(found: ScoreTable) -> list[int]:
    return sorted(range(6), key=lambda unit: (found.channels["group"][unit], unit))


@given(SCORES, SCORES, st.floats(0, 1))
def test_units_both_rank_higher_rank_higher(first: list[float], second: list[float], weight: float) -> None:
    found = mixed(table(first), table(second), weight).channels["group"]
    for a in range(6):
        for b in range(6):
            if first[a] > first[b] and second[a] > second[b]:
                assert found[a] > found[b]


@given(SCORES, SCORES)
def test_weights_zero_and_one_give_the_two_rankings(first: list[float], second: list[float]) -> None:
    assert mixed(table(first), table(second), 0.0) == table(first)
    if len(set(second)) == 6:
        assert order(mixed(table(first), table(second), 1.0)) == order(table(second))
