"""What a user of the library sees: names, records that print, and how to get a module back."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import deploypipe


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


def test_to_import_the_package_does_not_import_torch() -> None:
    code = "import deploypipe, sys; dir(deploypipe); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
