"""Sizes of memory as people write them: `6`, `"6 GiB"`, `"512 MiB"`, `"auto"`."""

import math
import re

from deploypipe.text.field_bounds import shown

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)?", re.IGNORECASE)
_MAX_GIB = 2**20


def parse_gib(name: str, value: object) -> float | None:
    """The size in GiB, the unit of a plain number; None for "auto". GB and MB are read as GiB and MiB.

    ValueError for anything else, with the rule and an example.
    """
    if value == "auto":
        return None
    found = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        found = float(match[1]) / (1024 if (match[2] or "G").upper().startswith("M") else 1)
    if not 0 < found <= _MAX_GIB:
        raise ValueError(f"{name} = {shown(value)} is not a size of memory; write 'auto', or GiB such as 6 or '6 GiB'")
    return found
