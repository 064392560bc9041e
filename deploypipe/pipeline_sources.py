"""Read the source files that a pipeline would execute, without importing them."""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from deploypipe.installed_packages import find_package

_PACKAGE = Path(__file__).parent


def read_source(path: Path) -> str:
    """The text of a pipeline's file and of all files below its folder that it imports, directly or indirectly."""
    found, waiting = {}, [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = file.read_text(encoding="utf-8", errors="replace")
            waiting += _imported(found[file], path.parent)
    return "".join(f"# {file.relative_to(path.parent).as_posix()}\n{found[file]}\n" for file in sorted(found))


def code_hashes(path: Path, constants: Mapping[str, str]) -> dict[str, str]:
    """Hashes of all code that a process executes for this pipeline, by the name used in errors."""
    texts = [read_source(path), *(f"{key}={text}" for key, text in sorted(constants.items()))]
    product = (f"{file.relative_to(_PACKAGE).as_posix()}\n{_hash(file.read_bytes())}" for file in _product_files())
    return {
        "deploypipe": find_package("deploypipe").version,
        "code of deploypipe": _hash("\n".join(product).encode()),
        "code of the pipeline": _hash("\0".join(texts).encode()),
    }


def _product_files() -> list[Path]:
    return sorted(_PACKAGE.rglob("*.py"))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _imported(text: str, folder: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # importing the file reports it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            parts = [part for part in module.split(".") if part]
            for start in range(len(parts)):  # the folder may be a package, or be inside one
                place = folder.joinpath(*parts[start:])
                yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())
