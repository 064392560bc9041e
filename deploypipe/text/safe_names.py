"""Check names that become a folder, a file, a tag or a model. The check is made where a name comes in.

Standard library only, so that `deploypipe.verify` can use it on the device.
"""

import unicodedata

MAX_NAME_BYTES = 100  # of one name: folders join two of them and a hash, and file systems take 255
_MARKS = "_-.+"
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(10))}  # of Windows
_MAX_SHOWN = 60  # characters of a name in an error
_REMEDY = f"use letters, digits and any of {' '.join(_MARKS)}, with a letter or digit first"


def name_problem(name: str, *, max_bytes: int = MAX_NAME_BYTES) -> str:
    """The problem with a name and the remedy, like "'../x' holds '/'; use ..."; empty if the name is fine.

    Letters and digits of any script are allowed, in the form NFKC. Invisible, combining and direction-changing
    characters are not, so that a name has only one spelling.
    """
    problem = _problem(name, max_bytes)
    shown = repr(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}...")
    return f"{shown} {problem}; {_REMEDY}" if problem else ""


def _problem(name: str, max_bytes: int) -> str:
    if not name:
        return "is empty"
    if odd := [character for character in name if not (character.isalnum() or character in _MARKS)]:
        return f"holds {odd[0]!r}"
    size = len(name.encode("utf-8"))
    if size > max_bytes:
        return f"has {size} bytes, and the limit is {max_bytes}"
    if unicodedata.normalize("NFKC", name) != name:
        return "has another spelling in Unicode's form NFKC"
    if not name[0].isalnum() and name[0] != "_":
        return f"begins with {name[0]!r}"
    if name.endswith(".") or ".." in name:
        return "ends with '.'" if name.endswith(".") else "holds '..'"
    return "is the name of a device on Windows" if name.partition(".")[0].lower() in _DEVICES else ""
