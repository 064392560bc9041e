"""Text from elsewhere (names, reasons, other people's errors) as it may be printed: one line, nothing that acts."""

import re

# Control characters (which steer a terminal), characters that turn the direction of what follows them or cannot be
# seen (Unicode UTR 36, "Trojan Source"), line and paragraph separators, halves of surrogate pairs.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


# What CI servers read in a log as orders to themselves: GitHub's ::add-mask::, ##[error], ##vso[...], ##teamcity[...].
_ORDER = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)")


def printable(text: str) -> str:
    """Show each hidden character as its escape: a line break as \\n, U+202E as \\u202e; and so the first sign of what
    a CI server would obey (valid in a JSON string, too)."""
    shown = HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)
    return _ORDER.sub(lambda found: f"{found[1] or ''}\\u00{ord(found[0][-1]):02x}", shown)


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which stay lines."""
    return "\n".join(map(printable, text.split("\n")))
