"""The module that stands where a block was removed."""

import inspect
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from deploypipe.records import Names


class Bypass(nn.Identity):
    """Stands where a block was removed: returns its input and ignores masks and other arguments.

    returns: as in `Block`. For a block that returned a tuple: (input, the arguments of these names or None, ...).
    """

    def __init__(self, block: nn.Module, returns: Names | None = None) -> None:
        super().__init__()
        vars(self).update(_facts(block))
        self._returns = returns
        self._names = tuple(inspect.signature(block.forward).parameters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`x`, unchanged."""
        if self._returns is None:
            return x
        given = dict(zip(self._names, (x, *args), strict=False)) | kwargs
        return x, *(given.get(name) for name in self._returns)


def _facts(block: nn.Module) -> dict[str, Any]:
    """Plain attributes a caller may read from the block, such as `self_attn.batch_first` or its kind of mask."""
    plain = {name: value for name, value in vars(block).items() if isinstance(value, str | int | float)}
    facts = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    return facts | {name: SimpleNamespace(**_facts(child)) for name, child in block.named_children()}
