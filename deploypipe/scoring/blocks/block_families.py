"""Families of blocks: blocks of one kind that can replace each other."""

import re
from itertools import pairwise

import torch

from deploypipe.observe.pass_statistics import Moments
from deploypipe.records import Names, Structures


def families(structures: Structures, moments: Moments) -> tuple[Names, ...]:
    """The removable blocks, split wherever one cannot replace the next.

    Each block of a family reads exactly the output of the one before it, so no stage changes and no other layer lies
    between. Their names differ only in numbers, so blocks of an encoder and a decoder are in different families.
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
