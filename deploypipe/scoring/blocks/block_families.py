"""Which blocks are of one kind, so that one may stand for another."""

import re
from itertools import pairwise

import torch

from deploypipe.observe.moments import Moments
from deploypipe.records import Names, Structures


def families(structures: Structures, moments: Moments) -> tuple[Names, ...]:
    """The removable blocks, parted wherever one may not stand for the next.

    Each block of a family reads exactly what the one before it writes, so no stage changes and no other layer lies
    between; and their names differ in numbers only, so an encoder's blocks and a decoder's are apart.
    """
    names = [block.name for block in structures.blocks]
    found = [names[:1]] if names else []
    for before, name in pairwise(names):
        is_next = torch.equal(moments.block_outputs[before], moments.block_inputs[name])
        if is_next and _without_numbers(before) == _without_numbers(name):
            found[-1].append(name)
        else:
            found.append([name])
    return tuple(map(tuple, found))


def _without_numbers(name: str) -> str:
    return re.sub(r"\d", "", name)
