"""What the pages name exists: files, folders and links; tables of rooms and budgets are those of the code.

`test_readme.py` tries their Python and their commands.
"""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from deploypipe.target import Budget

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Files that a reader makes, or that a run writes.
MADE = re.compile(r"\bNAME\b|my_|activation_variance|^runs/|^registry|^bundles|^pruned|^comment")


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
    section = prose(ROOT / "docs" / "targets.md").partition("## Budget\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [field.name for field in fields(Budget)]
