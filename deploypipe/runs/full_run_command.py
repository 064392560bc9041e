"""Turn the command of a fast development run into that of the full run."""

import shlex

_SUFFIX = "-fast-dev-run"
_FAST, _SETTING = "--fast-dev-run", "--set=fast_dev_run="


def full_run_command(command: str) -> str:
    """The command without its fast run, and with a folder of its own; "" for "".

    A folder that was asked for holds the fast run now. So the full run gets one next to it: DIR-full, or DIR without
    "-fast-dev-run". If no option asked for the fast run, the pipeline's recipe() did, and a setting overrules it.
    """
    words = [word for word in shlex.split(command) if not word.startswith("--ship-trial=")]
    kept = [word for word in words if word != _FAST and not word.startswith(_SETTING)]
    overruled = [f"{_SETTING}false"] if words and kept == words else []
    return shlex.join([_in_own_folder(word) for word in kept] + overruled)


def _in_own_folder(word: str) -> str:
    option, equals, folder = word.partition("=")
    if not equals or option not in ("--out", "--shared"):
        return word
    if _SUFFIX in folder:
        return f"{option}={folder.replace(_SUFFIX, '')}"
    return f"{word.rstrip('/')}-full" if option == "--out" else word
