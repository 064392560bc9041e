"""The networks that one run judged for several targets, as one set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploypipe.records import Candidate
from deploypipe.runs.result import RunResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A network that was judged on all of val: repaired, not fine-tuned."""

    target: str
    trial: int
    candidate: Candidate
    is_winner: bool


def judged_networks(results: Mapping[str, RunResult | str]) -> list[Judged]:
    """Of all targets whose run finished with a search, in their order."""
    return [
        Judged(target=name, trial=trial.number, candidate=trial.candidate, is_winner=trial.number == best.number)
        for name, result in results.items()
        if not isinstance(result, str) and result.search
        for best in [result.search.trials[result.search.best]]
        for trial in result.search.trials
        if not trial.is_stopped
    ]


def joint_front(networks: Sequence[Judged]) -> list[Judged]:
    """Those that no other beats, whoever it was made for: as accurate with fewer MACs, or more accurate with as many.

    MACs are what networks for different devices have in common. Ascending in both; of equals, the first.
    """
    front: list[Judged] = []
    for network in sorted(networks, key=lambda n: (n.candidate.num_macs, -n.candidate.accuracy)):
        if not front or network.candidate.accuracy > front[-1].candidate.accuracy:
            front.append(network)
    return front


def front_sentence(networks: Sequence[Judged]) -> str:
    """The number of networks compared, and the targets of those on the Pareto front."""
    front = joint_front(networks)
    each = ", ".join(f"{count} for {target}" for target, count in Counter(n.target for n in front).items())
    return f"{len(networks)} networks were judged for all targets; beaten by none: {each}."
