"""Help, the version and an argument error wait for no heavy package."""

import json
import subprocess
import sys

import pytest

# Typer itself imports rich and pydantic.
HEAVY = {"fsspec", "jinja2", "numpy", "onnx", "onnxruntime", "onnxscript", "optuna", "plotly", "safetensors", "scipy"}
HEAVY |= {"sqlalchemy", "torch", "transformers", "deploypipe.files.json_records", "deploypipe.records"}
RUN = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
from deploypipe.cli import main
sys.argv[0] = "deploypipe"
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--help"], 0, "Compress PIPELINE"),
        (["-h"], 0, "Compress PIPELINE"),
        (["--version"], 0, "deploypipe "),
        (["run", "--help"], 0, "--remeasure"),
        (["runs", "--help"], 0, "--older-than"),
        (["verify", "--help"], 0, "--time-limit"),
        (["no_such_command"], 2, "No such command"),
        (["run", "digits", "x86_cpu", "--no-such-option"], 2, "No such option"),
        (["worker", "--run", "search"], 2, "--storage: is not given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int, shown: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=100)
    *told, modules = done.stderr.splitlines()
    assert done.returncode == code
    assert shown in done.stdout + "\n".join(told)
    found = HEAVY & {*json.loads(modules)}
    assert not found
