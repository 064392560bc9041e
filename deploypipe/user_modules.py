"""Modules of users' files, which processes that a pipeline starts can import by name too.

A DataLoader's workers are new interpreters on macOS, and from Python 3.14 on also on Linux. They import the class of a
dataset by the name of its module. So each loaded file is noted in the environment, which they inherit: this module is
the parent of all of them, is imported first, and finds them there.
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_FILES = "DEPLOYPIPE_USER_MODULES"  # JSON: name of a module -> [its file, its changed constants]

__path__: list[str] = []  # makes Python look below this module, where it finds no files and asks `_Finder`


def import_file(path: Path) -> ModuleType | None:
    """Import a file anew, whatever its name; None if it is not a Python module."""
    name = re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(f"{__name__}.{name}", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes of the module can then be found by name
    _note(spec.name, path, {})
    spec.loader.exec_module(module)
    return module


def change_constants(module: ModuleType, values: Mapping[str, Any]) -> None:
    """Set constants of a module, here and in the processes that import it later."""
    vars(module).update(values)
    if module.__name__ in _noted():
        _note(module.__name__, Path(module.__file__ or ""), values)


def _note(name: str, path: Path, values: Mapping[str, Any]) -> None:
    os.environ[_FILES] = json.dumps({**_noted(), name: [str(path), dict(values)]})


def _noted() -> dict[str, Any]:
    noted: dict[str, Any] = json.loads(os.environ.get(_FILES) or "{}")
    return noted


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}.") or fullname not in (noted := _noted()):
            return None
        file, values = noted[fullname]
        return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, file, values))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, file: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, file)
        self.values = values

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module).update(self.values)


sys.meta_path.append(_Finder())
