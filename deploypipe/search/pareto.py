"""The costs of a trial, and the Pareto front: the trials that no other beats in accuracy and costs."""

from collections.abc import Sequence

from deploypipe.errors import ConfigError
from deploypipe.recipe import ObjectiveName
from deploypipe.records import Candidate, Trial


def cost(candidate: Candidate) -> float:
    """Milliseconds, or MACs if nothing could be timed; the same unit for all trials of a search."""
    return candidate.num_macs if candidate.latency_p50_ms is None else candidate.latency_p50_ms


def costs(candidate: Candidate, objectives: Sequence[ObjectiveName]) -> tuple[float, ...]:
    """The objectives other than accuracy, lower = better. ConfigError if the peak memory was not measured."""
    return tuple(_peak_memory(candidate) if name == "peak_memory" else cost(candidate) for name in objectives[1:])


def pareto_front(trials: Sequence[Trial], objectives: Sequence[ObjectiveName]) -> tuple[int, ...]:
    """Numbers of the feasible trials, evaluated on all of val, that no other trial beats.

    A trial is beaten by one that is at least as accurate, costs no more, and differs. If accuracy is the only
    objective, latency is the cost. Of equals the first stays. O(trials^2).
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
