"""The contents list of a page: every section enters itself while the page is rendered."""

import re


class Contents:
    """The sections of a page, in their order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []  # (address on the page, title)

    def enter(self, title: str) -> str:
        """Add a section; returns the address of its heading."""
        address = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self.entries.append((address, title))
        return address
