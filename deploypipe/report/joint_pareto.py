"""The networks that a run evaluated for several targets, compared as one set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploypipe.records import Candidate
from deploypipe.runs.result import RunResult


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedNetwork:
    """A network whose accuracy was taken on all of val, after repair and before fine-tuning."""

    target: str
    trial: int
    candidate: Candidate
    is_winner: bool


def evaluated_networks(results: Mapping[str, RunResult | str]) -> list[EvaluatedNetwork]:
    """List the networks of all targets whose run finished with a search, in their order."""
    return [
        EvaluatedNetwork(
            target=name, trial=trial.number, candidate=trial.candidate, is_winner=trial.number == best.number
        )
        for name, result in results.items()
        if not isinstance(result, str) and result.search
        for best in [result.search.trials[result.search.best]]
        for trial in result.search.trials
        if not trial.is_stopped
    ]


def joint_front(networks: Sequence[EvaluatedNetwork]) -> list[EvaluatedNetwork]:
    """Pick the networks, of any target, that no other beats in accuracy and MACs. Both ascend.

    Of equal networks the first is kept. MACs are compared because they mean the same on every device.
    """
    front: list[EvaluatedNetwork] = []
    for network in sorted(networks, key=lambda n: (n.candidate.num_macs, -n.candidate.accuracy)):
        if not front or network.candidate.accuracy > front[-1].candidate.accuracy:
            front.append(network)
    return front


def front_sentence(networks: Sequence[EvaluatedNetwork]) -> str:
    """Count the networks compared, and those on the frontier by target."""
    front = joint_front(networks)
    each = ", ".join(f"{count} for {target}" for target, count in Counter(n.target for n in front).items())
    return f"{len(networks)} networks were evaluated for all targets. On the frontier: {each}."
