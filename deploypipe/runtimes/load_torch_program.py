"""Open a `torch.export` program (.pt2). A program is code: torch unpickles parts of it, and evaluates others.

`torch.export.load` reads weights, constants and sample inputs with `torch.load(weights_only=False)` if the file asks
for it, evaluates the expressions of sizes, and looks up the functions that a graph calls by their names. So neither an
inspection of the file nor a hash next to it makes it safe. Only a person who knows where it is from can trust it.
"""

from pathlib import Path
from typing import Any

from deploypipe.errors import ModelError


def load_program(path: Path, *, is_trusted: bool, remedy: str) -> Any:
    """Load the `torch.export.ExportedProgram` in `path`. Nothing of the file is read unless `is_trusted`.

    remedy: what to do instead, and how to allow it. ModelError if the file is absent, not trusted, or not a program.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; give a program that torch.export.save wrote (model.pt2)")
    if not is_trusted:
        raise ModelError(f"{path}: a .pt2 program can run any code when it is loaded, so it was not opened; {remedy}")
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{path}: torch.export cannot load it ({type(error).__name__}: {reason}); eager torch runs .pt2 programs: "
            "save the network again"
        ) from error
