"""What a user of the library sees: names, records that print, and how to get a module back."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
from finished_runs import finished_run
from networks import PadResNet, images

import deploypipe
from deploypipe.records import Curves, LossCurve
from deploypipe.scoring.magnitude import score_magnitudes


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    module = importlib.import_module("deploypipe")
    for name in deploypipe.__all__:
        assert callable(getattr(module, name)), name
    assert {*deploypipe.__all__} == {name for name in dir(deploypipe) if not name.startswith("_")}
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = deploypipe.compres  # type: ignore[attr-defined]


def test_no_public_name_is_that_of_a_module() -> None:
    """Or importing the module would put it in the function's place."""
    assert not {*deploypipe.__all__} & {module.name for module in pkgutil.iter_modules(deploypipe.__path__)}


def test_paths_may_be_text() -> None:
    """Every argument of a public function that takes a path takes a str, too."""
    for name in deploypipe.__all__:
        for parameter in inspect.signature(getattr(deploypipe, name)).parameters.values():
            annotation = inspect.formatannotation(parameter.annotation)
            if "Path" in annotation and "Callable" not in annotation:
                assert "str" in annotation, f"{name}({parameter.name}: {annotation})"


def test_to_import_the_package_does_not_import_torch() -> None:
    code = "import deploypipe, sys; dir(deploypipe); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


def test_structures_print_as_a_table_and_other_records_as_a_few_lines() -> None:
    model = PadResNet().eval()
    structures = deploypipe.list_structures(model, images(), keep=["fc"])
    lines = repr(structures).splitlines()
    first = structures.groups[0]
    row = next(line for line in lines if line.startswith(f"{first.name} "))
    assert row.split()[1:3] == [first.kind, str(first.num_units)] and first.members[0].module in row
    for frozen in structures.frozen:
        assert any(line.startswith(frozen.name) and frozen.reason[:40] in line for line in lines)
    scores = score_magnitudes(model, structures)
    count = sum(group.num_units for group in structures.groups)
    head = f"ScoreTable: {count} units of {len(structures.groups)} groups, by magnitude; higher = keep"
    assert repr(scores) == head
    losses = {"a": 2.0, "b": 0.5}
    curves = tuple(LossCurve(name=n, kind="channels", kept=(1,), losses=(loss,)) for n, loss in losses.items())
    told = repr(Curves(curves=curves, num_samples=1000)).splitlines()
    assert told[1:] == ["  least harm at its narrowest: b, loss 0.5", "  most harm: a, loss 2"]
    result = finished_run()
    assert result.search and len(repr(result.search).splitlines()) == 3
    assert repr(result).startswith(f"RunResult: {result.pipeline} on {result.target.name}: ")
    assert len(repr(result).splitlines()) == 4
