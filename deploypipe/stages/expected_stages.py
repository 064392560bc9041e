"""Which stages a run expects, before it does them."""

from collections.abc import Mapping

from deploypipe.budgets import BUDGETS, LATENCY_P50
from deploypipe.stages.context import RunContext
from deploypipe.target import Limit

SEARCH = ("latency", "feasibility", "observe", "score", "curves", "search", "confirm", "finalist")


def expected_stages(ctx: RunContext, limits: Mapping[str, Limit]) -> tuple[str, ...]:
    """The stages of a run that has to remove something, in its order. limits: those of the search."""
    return (
        "structures",
        "dense_export",
        "baseline",
        *["dense_precision"] * (ctx.target.precisions != ("fp32",)),
        *["latency"] * is_timed(ctx, limits),
        "feasibility",
        "memory",
        "observe",
        "score",
        "curves",
        "search",
        *expected_delivery(ctx, limits),
        "golden",
    )


def expected_delivery(ctx: RunContext, limits: Mapping[str, Limit]) -> tuple[str, ...]:
    """The stages after the search, from the choice of its winner to the gate."""
    settings = ctx.recipe.search
    return (
        *["confirm"] * (is_timed(ctx, limits) and LATENCY_P50 in limits),
        *["finalist"] * (settings.num_finalists > 1 and ctx.recipe.finetune.num_epochs > 0),
        "prune",
        "finetune",
        "export",
        *["precision"] * (ctx.target.precisions != ("fp32",)),
        *["engine"] * ctx.builds,
        "benchmark",
        "gate",
    )


def is_timed(ctx: RunContext, limits: Mapping[str, Limit]) -> bool:
    """Whether the search asks for latencies, and this machine can measure them."""
    is_bounded = any(BUDGETS[name].predictor == "latency_model" for name in limits)
    return ctx.ability.verdict == "run" and (is_bounded or "latency" in ctx.recipe.search.objectives)
