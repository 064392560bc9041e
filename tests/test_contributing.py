"""CONTRIBUTING.md is followed, step by step: whoever does what it says gets a scorer that keeps the contract."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networks
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
COPIED = ("deploypipe", "pyproject.toml", "tests/scoring")


def blocks(section: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks below one heading, in order."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, re.S)


def hunks(diff: str) -> Iterator[list[str]]:
    for hunk in diff.split("@@\n")[1:]:
        yield hunk.splitlines()


def apply(diff: str, root: Path) -> str:
    """Make the page's edits; the lines around them must stand in the file, once."""
    name = diff.partition("\n")[0].removeprefix("--- ")
    text = (root / name).read_text(encoding="utf-8")
    for lines in hunks(diff):
        before = "\n".join(line[1:] for line in lines if line[:1] != "+") + "\n"
        after = "\n".join(line[1:] for line in lines if line[:1] != "-") + "\n"
        assert text.count(before) == 1, f"{name} should hold this once, as CONTRIBUTING.md shows:\n{before}"
        text = text.replace(before, after)
    (root / name).write_text(text, encoding="utf-8")
    return name


def copied(root: Path) -> None:
    """The package, and the scorers' tests with all that tests share."""
    shared = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith(("test_", "conftest"))]
    for name in (*COPIED, *(str(path.relative_to(ROOT)) for path in shared)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)


def run(command: str, root: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DEPLOYPIPE_CACHE": str(root / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow  # four programs
def test_a_scorer_by_the_page(tmp_path: Path) -> None:
    copied(tmp_path)
    steps = blocks("Add a scorer")
    (module,) = [text for language, text in steps if language == "python"]
    path = tmp_path / module.partition("\n")[0].removeprefix("# ")
    path.write_text(module, encoding="utf-8")
    edited = [apply(text, tmp_path) for language, text in steps if language == "diff"]
    assert len(edited) == 2  # with its own file three places: more, and the house is wrong
    commands = [line for language, text in steps if language == "bash" for line in text.splitlines()]
    assert [command.split()[0] for command in commands] == ["ruff", "pytest", "deploypipe", "deploypipe"]
    commands[3] += " --set pipeline.NUM_STEPS=20 --set observe.num_samples=128"  # the toy need not be good
    said = [run(command, tmp_path) for command in commands]
    assert f"{len(networks.NETWORKS)} passed" in said[1]
    assert "by activation_variance" in said[3]
