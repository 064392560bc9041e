"""Find the example pipelines and the named targets, in an installed package or in a checkout."""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).parent


def shipped_folder(name: Literal["pipelines", "targets"]) -> Path:
    """The folder of this name that came with deploypipe. A wheel has it inside the package, a checkout next to it."""
    installed = _PACKAGE / "examples" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
