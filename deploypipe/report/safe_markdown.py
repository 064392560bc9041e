"""Escape text for Markdown, so that it is shown as it is: no markup, links, HTML, mentions or references."""

import re
from collections.abc import Iterable, Sequence

from deploypipe.text.printable_text import printable

_SPECIAL = re.compile(r"[\\`*\[\]|~$]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore inside a word, as in x86_cpu, does not mean emphasis.
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# GitHub and others turn these into links without markup: @user, #12, GH-12, https://..., www. ...
_LINKING = re.compile(r"@|#(?=\w)|\bGH(?=-\d)|:(?=//)|www(?=\.)", re.IGNORECASE)
_BREAK = "<!-- -->"  # shows nothing, and separates what would become a link


def plain(text: str) -> str:
    """Return one line of Markdown that shows the text."""
    shown = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], printable(text))
    shown = _EMPHASIS.sub(r"\\_", _SPECIAL.sub(lambda found: f"\\{found[0]}", shown))
    return _LINKING.sub(lambda found: found[0] + _BREAK, shown)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. Header and cells may be any text."""
    return [_line(map(plain, header)), _line(["---"] * len(header)), *(_line(map(plain, row)) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
