"""Load a user's pipeline by path or name, check it, and call its four functions; errors name the function and line."""

import importlib
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from deploypipe import recipe as recipes
from deploypipe.checked_splits import wrap_splits
from deploypipe.errors import ConfigError, DeploypipeError, PipelineError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.files.json_records import checked, parse_setting
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pipeline_sources import read_source
from deploypipe.recipe import Recipe
from deploypipe.shipped_examples import shipped_folder
from deploypipe.task import Splits, Task
from deploypipe.text.safe_names import name_problem
from deploypipe.user_code_errors import wrap_task
from deploypipe.user_modules import change_constants, import_file

# The type that each function must return, and the remedy if it does not.
FUNCTIONS: dict[str, tuple[type[object], str]] = {
    "build_model": (nn.Module, "return the trained network"),
    "load_data": (Splits, "return Splits(calib=..., train=..., val=..., test=...) from deploypipe.task"),
    "task": (Task, "return classification() or Task(loss=..., metric=...) from deploypipe.task"),
    "recipe": (Recipe, "return Recipe() from deploypipe.recipe"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UserPipeline:
    """A loaded pipeline module."""

    name: str
    path: Path
    module: ModuleType
    source: str  # text of the module, of the neighbouring files that it imports, and its changed constants

    def build_model(self) -> nn.Module:
        model: nn.Module = self._call("build_model")
        return unwrapped(model)

    def load_data(self) -> Splits:
        splits: Splits = self._call("load_data")
        try:
            return wrap_splits(splits)
        except PipelineError as error:
            raise PipelineError(f"{self.path}: {error}") from None

    def task(self) -> Task:
        task: Task = self._call("task")
        return wrap_task(task)

    def recipe(self) -> Recipe:
        recipe: Recipe = self._call("recipe")
        return checked(recipe, f"{self.path}: recipe()")

    def _call(self, name: str) -> Any:
        expected, remedy = FUNCTIONS[name]
        with _wrap_errors(self.path, f"{name}()"):
            value = getattr(self.module, name)()
        if not isinstance(value, expected):
            raise PipelineError(f"{self.path}: {name}() returned {_type_name(value)}; {remedy}")
        return value


def load_pipeline(name: str, constants: Mapping[str, str] | None = None) -> UserPipeline:
    """Load the pipeline at a path (`my/model.py`), a dotted name (`pipelines.digits`) or a bare name (`digits`).

    constants: new values for the module's UPPER_CASE constants, as text; converted to the type of the present value.
    """
    path = find_pipeline(name)
    if problem := name_problem(path.stem):
        raise PipelineError(f"{path}: a pipeline is named after its file, but {problem}")
    source = read_source(path)
    with _wrap_errors(path, "the module"):
        module = _import(path)
    _check_functions(module, path)
    changed = {key: _changed(module, path, key, text) for key, text in (constants or {}).items()}
    change_constants(module, changed)
    settings = "".join(f"{key} = {value!r}\n" for key, value in sorted(changed.items()))
    return UserPipeline(name=path.stem, path=path, module=module, source=source + settings)


def find_pipeline(name: str) -> Path:
    """The file a pipeline's name stands for."""
    if name.endswith(".py") or "/" in name:
        if Path(name).is_file():
            return Path(name).resolve()
        raise PipelineError(
            f"{name}: there is no such pipeline file; check the path, or begin with `deploypipe init NAME`"
        )
    for folder in pipeline_folders():
        if (folder / f"{name}.py").is_file():
            return (folder / f"{name}.py").resolve()
    if "." in name and (path := _find_dotted(name)):
        return path
    known = sorted({p.stem for folder in pipeline_folders() for p in folder.glob("*.py") if _looks_like_one(p)})
    raise PipelineError(
        f"{name}: no pipeline of this name; give a file, or one of: {', '.join(known) or 'none is here'}; "
        "`deploypipe init NAME` writes a new one"
    )


def pipeline_folders() -> list[Path]:
    """Where bare names are looked for: here, and among the examples that come with deploypipe."""
    return [Path.cwd() / "pipelines", shipped_folder("pipelines")]


def _looks_like_one(path: Path) -> bool:
    return "def build_model" in path.read_text(encoding="utf-8")


def _find_dotted(name: str) -> Path | None:
    """Look for the file. Asking Python for the module would run the packages that it is in."""
    folders = [str(Path.cwd()), *sys.path, str(shipped_folder("pipelines").parent)]
    files = (Path(folder or ".").joinpath(*name.split(".")).with_suffix(".py") for folder in folders)
    return next((file.resolve() for file in files if file.is_file()), None)


def _import(path: Path) -> ModuleType:
    """Import a file. A file inside a package gets its full name, so that it can import its neighbours."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    name = ".".join(parts)
    loaded = sys.modules.get(name)
    if len(parts) > 1 and loaded and Path(loaded.__file__ or "").resolve() != path:
        parts = [path.stem]  # another package of this name is in use: load the file alone
    with _on_path(root):
        if len(parts) > 1:
            sys.modules.pop(name, None)
            importlib.invalidate_caches()
            module = importlib.import_module(name)
            if Path(module.__file__ or "").resolve() == path:
                return module
        return _import_alone(path)


def _import_alone(path: Path) -> ModuleType:
    module = import_file(path)
    if module is None:
        raise PipelineError(f"{path}: is not a Python module; give a file whose name ends in .py")
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Put `folder` first on the import path; afterwards it stays last, for imports inside the user's functions."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _check_functions(module: ModuleType, path: Path) -> None:
    for name, (_, remedy) in FUNCTIONS.items():
        function: Callable[..., object] | None = getattr(module, name, None)
        if function is None:
            raise PipelineError(f"{path}: has no function {name}(); add it and {remedy}")
        if not callable(function):
            raise PipelineError(
                f"{path}: {name} is {_type_name(function)}, not a function; write `def {name}():` and {remedy}"
            )
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        if needed:
            raise PipelineError(
                f"{path}: {name}() requires {', '.join(needed)}, but it is called without arguments; give defaults"
            )


def _changed(module: ModuleType, path: Path, key: str, text: str) -> object:
    """The new value of a constant, converted to the type that it has now."""
    known = sorted(n for n, v in vars(module).items() if n.isupper() and isinstance(v, (str, int, float, bool)))
    if key not in known:
        remedy = f"the constants here are: {', '.join(known)}" if known else "the module has no UPPER_CASE constants"
        raise ConfigError("--set", f"pipeline.{key}", f"{path.name} has no such constant", remedy)
    present = getattr(module, key)
    value: object
    if isinstance(present, str):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    value = parse_setting(text, f"pipeline.{key}")
    if isinstance(present, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(present):
        wanted = f"write a value of type {type(present).__name__}, such as {json.dumps(present)}"
        raise ConfigError("--set", f"pipeline.{key}", f"{text!r} does not fit", wanted)
    return value


@contextmanager
def _wrap_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn any exception of the user's code into one PipelineError with its file and line."""
    try:
        yield
    except DeploypipeError:
        raise
    except SyntaxError as error:
        raise PipelineError(f"{error.filename}, line {error.lineno}: {error.msg}; correct the syntax") from error
    except Exception as error:
        raise_if_exhausted(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).parent == path.parent] or list(frames)
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise _missing_package(own[-1], error.name.partition(".")[0]) from error
        raise _pipeline_error(error, own[-1], doing) from error


# Where the package to install has another name than the one to import.
_DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "skimage": "scikit-image"}


def _missing_package(frame: traceback.FrameSummary, name: str) -> PipelineError:
    return PipelineError(
        f"{frame.filename}, line {frame.lineno}: imports {name!r}, which is neither installed nor next to the "
        f"pipeline; install the package (pip install {_DISTRIBUTIONS.get(name, name)}), or correct the import"
    )


def _pipeline_error(error: Exception, frame: traceback.FrameSummary, doing: str) -> PipelineError:
    lines = str(error).strip().splitlines()
    text = f": {lines[0]}" if lines else ""
    place = f"{frame.filename}, line {frame.lineno}"
    if isinstance(error, TypeError) and (problem := _unknown_field(text)):
        return PipelineError(f"{place}: {doing}: {problem}")
    return PipelineError(f"{place}: {doing} raised {type(error).__name__}{text}; correct the pipeline")


_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def _unknown_field(text: str) -> str:
    """Of a record that a pipeline makes with a field that it has not: the fields that it has, the closest first."""
    found = _UNEXPECTED.search(text)
    record = found and {**vars(recipes), "Task": Task, "Splits": Splits}.get(found[1])
    if not found or not is_dataclass(record):
        return ""
    names = sorted((f.name for f in fields(record)), key=lambda name: -SequenceMatcher(None, found[2], name).ratio())
    return f"{found[1]} has no field {found[2]!r}; its fields, the closest first: {', '.join(names)}"


def _type_name(value: object) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
