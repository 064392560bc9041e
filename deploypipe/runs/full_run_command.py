"""Turn the command of a fast development run into that of the full run."""

import shlex

_SUFFIX = "-fast-dev-run"
_FAST = ("--fast-dev-run", "--set=fast_dev_run=true")


def full_run_command(command: str) -> str:
    """The command without its fast run, and with a folder of its own; "" for "".

    A folder that was asked for holds the fast run now. So the full run gets one next to it: DIR-full, or DIR without
    "-fast-dev-run".
    """
    words = [word for word in shlex.split(command) if word not in _FAST and not word.startswith("--ship-trial=")]
    return shlex.join(_in_own_folder(word) for word in words)


def _in_own_folder(word: str) -> str:
    option, equals, folder = word.partition("=")
    if not equals or option not in ("--out", "--shared"):
        return word
    if _SUFFIX in folder:
        return f"{option}={folder.replace(_SUFFIX, '')}"
    return f"{word.rstrip('/')}-full" if option == "--out" else word
