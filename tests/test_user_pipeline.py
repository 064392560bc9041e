import multiprocessing
from pathlib import Path

import pytest

from deploypipe.errors import ConfigError, PipelineError
from deploypipe.user_pipeline import load_pipeline

GOOD = """
import torch
from torch import nn
from deploypipe.recipe import Recipe
from deploypipe.task import Splits, classification

WIDTH = 4
RATE = 0.5
IS_DEEP = False
WEIGHTS = "none"

def build_model():
    return nn.Linear(2, WIDTH)

def load_data():
    batches = [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))]
    return Splits(calib=batches, train=batches, val=batches, test=batches)

def task():
    return classification()

def recipe():
    return Recipe()
"""


def write(tmp_path: Path, text: str = GOOD, name: str = "mine.py") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_path_gives_the_four_values(tmp_path: Path) -> None:
    pipeline = load_pipeline(write(tmp_path))
    assert pipeline.name == "mine" and pipeline.source.endswith(GOOD + "\n")
    assert pipeline.build_model().out_features == 4
    assert list(pipeline.load_data().val) and pipeline.task().name and pipeline.recipe().seed == 0


@pytest.mark.parametrize("name", ["digits", "pipelines.digits", "pipelines/digits.py"])
def test_shipped_pipeline_by_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert load_pipeline(name).name == "digits"


def test_own_folder_of_pipelines_hides_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "digits.py").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_pipeline("digits").build_model().out_features == 4


def test_neighbours_can_be_imported_and_belong_to_the_source(tmp_path: Path) -> None:
    write(tmp_path, "def helper():\n    return 7\n", "a_neighbour.py")
    pipeline = load_pipeline(write(tmp_path, "from a_neighbour import helper\n" + GOOD, "user.py"))
    assert "return 7" in pipeline.source


def test_constants_are_set_by_type_and_change_the_source(tmp_path: Path) -> None:
    path = write(tmp_path)
    changed = load_pipeline(path, {"WIDTH": "9", "RATE": "2", "IS_DEEP": "true", "WEIGHTS": "8"})
    module = changed.module
    assert (module.WIDTH, module.RATE, module.IS_DEEP, module.WEIGHTS) == (9, 2.0, True, "8")
    assert isinstance(module.RATE, float) and changed.build_model().out_features == 9
    assert changed.source != load_pipeline(path).source
    assert load_pipeline(path).module.WIDTH == 4  # a later load begins anew


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("WITDH", "9", "the constants here are: IS_DEEP, RATE, WEIGHTS, WIDTH"),
        ("WIDTH", "wide", "type int"),
        ("WIDTH", "true", "type int"),
        ("WIDTH", "1.5", "type int"),
        ("IS_DEEP", "1", "type bool"),
        ("build_model", "1", "no such constant"),
    ],
)
def test_wrong_constants_are_refused(tmp_path: Path, key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_pipeline(write(tmp_path), {key: value})
    assert f"pipeline.{key}" in str(caught.value)


@pytest.mark.parametrize("function", ["build_model", "load_data", "task", "recipe"])
def test_missing_and_wrong_functions_are_named(tmp_path: Path, function: str) -> None:
    missing = GOOD.replace(f"def {function}()", f"def other_{function}()")
    with pytest.raises(PipelineError, match=rf"mine\.py: has no function {function}\(\); add it and return"):
        load_pipeline(write(tmp_path, missing))
    with pytest.raises(PipelineError, match=rf"{function} is a int"):
        load_pipeline(write(tmp_path, missing + f"\n{function} = 3\n"))
    with pytest.raises(PipelineError, match=rf"{function}\(\) requires x"):
        load_pipeline(write(tmp_path, missing + f"\ndef {function}(x): pass\n"))
    pipeline = load_pipeline(write(tmp_path, missing + f"\ndef {function}(): pass\n"))
    with pytest.raises(PipelineError, match=rf"mine\.py: {function}\(\) returned nothing \(None\); return"):
        getattr(pipeline, function)()


def test_a_split_that_runs_dry_is_refused(tmp_path: Path) -> None:
    dry = load_pipeline(write(tmp_path, GOOD.replace("val=batches", "val=iter(batches)")))
    with pytest.raises(PipelineError, match="split 'val'"):
        dry.load_data()


def test_errors_of_the_users_code_name_file_and_line(tmp_path: Path) -> None:
    broken = GOOD.replace("return nn.Linear(2, WIDTH)", "return {}['weights']")
    line = broken[: broken.index("{}['weights']")].count("\n") + 1
    with pytest.raises(PipelineError, match=rf"mine\.py, line {line}: build_model\(\) raised KeyError: 'weights'"):
        load_pipeline(write(tmp_path, broken)).build_model()
    with pytest.raises(PipelineError, match=r"mine\.py, line 1: imports 'no_such_module_anywhere', which is neither"):
        load_pipeline(write(tmp_path, "import no_such_module_anywhere\n" + GOOD))
    with pytest.raises(PipelineError, match=r"mine\.py, line 2.*correct the syntax"):
        load_pipeline(write(tmp_path, "x = 1\ndef (\n"))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("Finetune(epochs=2)", "Finetune has no field 'epochs'; its fields, the closest first: num_epochs, "),
        ("Recipe(serch=1)", "Recipe has no field 'serch'; its fields, the closest first: search, "),
        ("dict(x)", "raised NameError"),
    ],
)
def test_a_record_with_an_unknown_field_names_its_fields(made: str, said: str, tmp_path: Path) -> None:
    module = f"from deploypipe.recipe import Finetune, Recipe\n{GOOD}\ndef recipe():\n    return {made}\n"
    with pytest.raises(PipelineError, match=r"mine\.py, line \d+: recipe\(\)") as caught:
        load_pipeline(write(tmp_path, module)).recipe()
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_pipeline", "no/such/file.py", "no.such.module"])
def test_unknown_pipeline_says_what_there_is(name: str) -> None:
    with pytest.raises(PipelineError, match="deploypipe init NAME"):
        load_pipeline(name)


DATASET = """
SIZE = 3

class Numbers:
    def size(self):
        return SIZE

def build_model(): ...
def load_data(): ...
def task(): ...
def recipe(): ...
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_loaders_new_processes_import_the_pipelines_classes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of a DataLoader are new interpreters on macOS, and on Linux from Python 3.14 on."""
    monkeypatch.setenv("DEPLOYPIPE_USER_MODULES", "")  # restored afterwards
    module = load_pipeline(write(tmp_path, DATASET, "my-data.py"), {"SIZE": "5"}).module
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(module.Numbers().size) == 5
