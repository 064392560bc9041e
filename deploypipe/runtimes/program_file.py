"""Open a `torch.export` program (.pt2). A program is code: torch unpickles parts of it, and evaluates others.

`torch.export.load` reads weights, constants and sample inputs with `torch.load(weights_only=False)` where the file asks
for it, evaluates the expressions of sizes, and finds the functions that a graph calls by their names. So no inspection
of the file makes it safe, and neither does a hash beside it: only the word of a person who knows where it is from.
"""

from pathlib import Path
from typing import Any

from deploypipe.errors import ModelError


def load_program(path: Path, *, is_trusted: bool, remedy: str) -> Any:
    """The `torch.export.ExportedProgram` in `path`. Nothing of the file is read unless `is_trusted`.

    `remedy`: what to do instead, and how to allow it. ModelError where it is absent, not trusted, or not a program.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; give a program that torch.export.save wrote (model.pt2)")
    if not is_trusted:
        raise ModelError(f"{path}: a .pt2 program can run any code when it is loaded, so it was not opened; {remedy}")
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        told = str(error).partition("\n")[0]
        raise ModelError(
            f"{path}: torch.export cannot load it ({type(error).__name__}: {told}); eager torch takes .pt2 programs: "
            "save the network again"
        ) from error
