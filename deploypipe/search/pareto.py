"""What a study weighs against each other, and the trials that nobody beats in all of it."""

from collections.abc import Sequence

from deploypipe.errors import ConfigError
from deploypipe.recipe import ObjectiveName
from deploypipe.records import Candidate, Trial


def cost(candidate: Candidate) -> float:
    """Milliseconds, or MACs where nothing could be timed: alike for all trials of a search."""
    return candidate.num_macs if candidate.latency_p50_ms is None else candidate.latency_p50_ms


def costs(candidate: Candidate, objectives: Sequence[ObjectiveName]) -> tuple[float, ...]:
    """The objectives beside accuracy, lower = better. ConfigError where the peak memory was not measured."""
    return tuple(_peak_memory(candidate) if name == "peak_memory" else cost(candidate) for name in objectives[1:])


def pareto_front(trials: Sequence[Trial], objectives: Sequence[ObjectiveName]) -> tuple[int, ...]:
    """Numbers of the feasible trials, judged on all of val, that no other beats: as accurate, at no cost higher.

    With accuracy as the only objective it is weighed against the latency. Of equals the first stays. O(trials^2).
    """
    weighed = objectives if len(objectives) > 1 else ("accuracy", "latency")
    points = {
        t.number: (-t.candidate.accuracy, *costs(t.candidate, weighed))
        for t in trials
        if t.feasible and not t.is_stopped
    }
    return tuple(
        number
        for number, point in points.items()
        if not any(_beats(other, point) or (other == point and first < number) for first, other in points.items())
    )


def _beats(point: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return point != other and all(a <= b for a, b in zip(point, other, strict=True))


def _peak_memory(candidate: Candidate) -> float:
    if candidate.peak_memory_mib is None:
        raise ConfigError(
            "the recipe",
            "search.objectives",
            "'peak_memory' cannot be measured on this machine for this target",
            "leave it out, or search where the target runs",
        )
    return candidate.peak_memory_mib
