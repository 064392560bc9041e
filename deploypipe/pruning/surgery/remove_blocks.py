"""Replace whole blocks by the identity."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from deploypipe.pruning.modules.bypass import Bypass
from deploypipe.pruning.modules.module_attributes import is_plain
from deploypipe.pruning.surgery.module_slicing import find_module, replace_module_
from deploypipe.records import Names


def replace_by_identity_(model: nn.Module, blocks: Mapping[str, Names | None]) -> None:
    """Replace modules by the identity. blocks: name -> what the module returns after its output, as in `Block`."""
    numbered = _numbered(model)
    for name, returns in blocks.items():
        replace_module_(model, name, Bypass(find_module(model, name), returns))
    left = _numbered(model)
    for kind, modules in numbered.items():
        if len(modules) != len(left.get(kind, modules)):
            # Key-value caches ask the first layer of each kind for their length, so one layer must have its number.
            first = min(left[kind], key=lambda module: module.layer_idx)
            first.layer_idx = min(module.layer_idx for module in modules)


def _numbered(model: nn.Module) -> dict[Any, list[Any]]:
    """Modules that store their layer number, grouped by all else they share: place, class and kind of mask."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(vars(module).get("layer_idx"), int) and not isinstance(module, Bypass):
            masks = [(n, v) for n, v in vars(module).items() if ("sliding" in n or "layer_type" in n) and is_plain(v)]
            found[re.sub(r"\d+", "#", name, count=1), type(module), repr(masks)].append(module)
    return found
