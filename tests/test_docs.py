"""What the pages name exists: files, folders, links and messages; what the reference generates is all there is.

`test_readme.py` tries their Python and their commands, `sphinx-build -W -n docs docs/_build` builds the site.
"""

import re
import tomllib
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import deploypipe
from deploypipe.errors import DeploypipeError
from deploypipe.recipe import Constraints, Finetune, Recipe, Search
from deploypipe.target import Budget, Target

ROOT = Path(__file__).parents[1]
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.relative_to(ROOT).parts[1][0] != "_"]
PAGES = [*sorted(ROOT.glob("*.md")), *WRITTEN]
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Files that a reader makes, or that a run writes.
MADE = re.compile(r"\bNAME\b|^ci/job|my_|activation_variance|^runs/|^registry|^bundles|^pruned|^comment")


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


@EVERY
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            there = (page.parent / name).resolve() if name else page
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


def anchors(page: Path) -> list[str]:
    """As GitHub makes them out of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@EVERY
def test_named_files_exist(page: Path) -> None:
    """`search/pareto.py` lies in the package, `tests/networks.py` in the repository; a folder ends in a slash."""
    for name in re.findall(r"`([\w.]+(?:/[\w.]+)*(?:/|\.py|\.toml|\.sh|\.md))`", prose(page)):
        if not MADE.search(name):
            assert any((base / name).exists() for base in (ROOT, ROOT / "deploypipe", page.parent)), name


def test_the_architecture_page_has_the_rooms_in_the_order_of_the_linter() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layers = [[name.strip() for name in re.split(r"[|:]", layer)] for layer in contract["layers"]]
    table = prose(ROOT / "docs" / "architecture.md").partition("| room or file |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert rows == layers


def test_the_targets_page_has_every_field_of_a_budget() -> None:
    section = prose(ROOT / "docs" / "how-to" / "targets.md").partition("## Budget\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [field.name for field in fields(Budget)]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = spec_from_file_location("reference_pages", ROOT / "docs" / "_ext" / "reference_pages.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_field_with_its_default_and_its_comment(reference: ModuleType) -> None:
    recipe, target = reference.PARTS["recipe"](), reference.PARTS["target"]()
    for record in (Recipe, Search, Finetune, Constraints):
        section = recipe.partition(f"## {record.__name__}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [field.name for field in fields(record)]
    for record in (Target, Budget):
        section = target.partition(f"## {record.__name__}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [field.name for field in fields(record)]
    assert [line for line in (recipe + target).splitlines() if line.endswith("|  |")] == []  # without a meaning
    assert "| `num_levels` | `int` | `8` | widths tried per channel group |" in recipe
    assert '| `objectives` | `tuple[ObjectiveName, ...]` | `("accuracy",)` | Accuracy is maximised, ' in recipe
    assert "| `runtime` | `Runtime` | (required) | what runs the model |" in target


def test_the_reference_has_every_command_function_and_error(reference: ModuleType) -> None:
    commands = reference.PARTS["commands"]()
    for name in ("run", "check", "init", "bench", "plan show", "plan diff", "gate", "worker"):
        assert f"## `deploypipe {name}`\n" in commands
    assert "| `--jobs, -j INTEGER` | Number of targets at a time." in commands
    functions = reference.PARTS["functions"]()
    assert set(re.findall(r"deploypipe\.(\w+)", functions)) == set(deploypipe.__all__)
    catalogue = reference.PARTS["errors"]()
    sections = set(re.findall(r"^## (\w+)$", catalogue, re.M))
    assert sections >= {kind.__name__ for kind in DeploypipeError.__subclasses__()}


def test_the_ten_commonest_errors_are_messages_of_the_code(reference: ModuleType) -> None:
    messages = {text for rooms in reference.error_messages().values() for texts in rooms.values() for text in texts}
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^## (\d+)\. .*?```text\n(.*?)\n```", page, re.S | re.M)
    assert [number for number, _ in shown] == [str(number) for number in range(1, 11)]
    assert [text for _, text in shown if not any(each.startswith(f"{text};") for each in messages)] == []


def test_pictures_are_there_and_say_what_they_show() -> None:
    for page in PAGES:
        for text, path in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", prose(page)):
            assert text and (page.parent / path).is_file(), f"{page.name}: {path}"


def test_readme_is_short_and_shows_the_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 8192 and "](docs/images/report.png)" in text
