"""Check that widths and removed blocks satisfy the recipe's constraints."""

from collections.abc import Mapping, Sequence

from deploypipe.errors import PlanError
from deploypipe.records import Structures


def require_constraints(structures: Structures, widths: Mapping[str, int], blocks: Sequence[str]) -> None:
    """Raise PlanError unless the constraints allow these widths and removed blocks.

    widths: group -> units kept; groups that are removed with their block are absent.
    """
    asked = structures.constraints
    for name, least in asked.least.items():
        if widths.get(name, least) < least:
            raise PlanError(
                f"{name!r} would keep {widths[name]} units, but recipe.constraints.least asks for {least}; keep more"
            )
    for names in asked.uniform:
        seen = {name: widths[name] for name in names if name in widths}
        if len(set(seen.values())) > 1:
            listed = ", ".join(f"{name}: {width}" for name, width in seen.items())
            raise PlanError(
                f"recipe.constraints.uniform asks for one width, but there are several ({listed}); ask for one"
            )
    left = sum(block.name not in blocks for block in structures.blocks)
    if left < asked.least_blocks:
        raise PlanError(
            f"{left} of {len(structures.blocks)} removable blocks would stay, but recipe.constraints.least_blocks asks "
            f"for {asked.least_blocks}; remove fewer"
        )
