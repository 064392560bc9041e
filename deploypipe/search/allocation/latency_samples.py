"""Choose the networks to time before a search, so that the latency of all others can be predicted."""

import numpy as np

from deploypipe.records import Structures
from deploypipe.search.allocation.solver import Allocation
from deploypipe.search.cost_models.additive_costs import Levels, home_blocks

_MAX_DROPPED = 0.6  # of the blocks, in one network on average


def sample_networks(structures: Structures, levels: Levels, count: int, seed: int) -> list[Allocation]:
    """Choose `count` networks within `structures.constraints`.

    These are the smallest, which bounds what can be reached; the narrowest with all its blocks; the widest without the
    removable blocks; and random ones. A random network draws widths for each group alone, or one share for all groups.
    """
    generator = np.random.default_rng(seed)
    num_droppable = len(structures.blocks) - structures.constraints.least_blocks
    blocks = [block.name for block in structures.blocks]
    narrowest = {name: kept[0] for name, kept in levels.items()}
    widest = {name: kept[-1] for name, kept in levels.items()}
    largest = [block.name for block in sorted(structures.blocks, key=lambda block: -block.macs)][:num_droppable]
    found: list[Allocation] = []
    for widths, gone in ((narrowest, largest), (narrowest, []), (widest, largest)):
        chosen = _without(structures, widths, gone)
        found += [] if chosen in found else [chosen]
    while len(found) < count:
        share = generator.uniform(0, _MAX_DROPPED)
        drawn = [name for name in blocks if generator.uniform() < share]
        generator.shuffle(drawn)
        widths = _draw_widths(levels, structures, generator)
        found.append(_without(structures, widths, drawn[:num_droppable]))
    return found[:count]


def _draw_widths(levels: Levels, structures: Structures, generator: np.random.Generator) -> dict[str, int]:
    place = generator.uniform()
    is_alike = generator.uniform() < 0.5
    spread = generator.uniform(0, 0.3)
    drawn: dict[str, int] = {}
    for name, kept in levels.items():
        own = place + generator.normal(0, spread) if is_alike else generator.uniform()
        drawn[name] = kept[min(max(int(own * len(kept)), 0), len(kept) - 1)]
    for names in structures.constraints.uniform:
        drawn |= {name: drawn[names[0]] for name in names}
    return drawn


def _without(structures: Structures, widths: dict[str, int], blocks: list[str]) -> Allocation:
    homes = home_blocks(structures)
    ordered = tuple(block.name for block in structures.blocks if block.name in blocks)
    return Allocation(widths={n: kept for n, kept in widths.items() if homes[n] not in ordered}, blocks=ordered)
