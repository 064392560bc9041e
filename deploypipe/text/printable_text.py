"""Make text from elsewhere (names, reasons, errors) safe to print: on one line, without control characters."""

import re

# Control characters (which steer a terminal), invisible characters and those that change the direction of text (Unicode
# UTR 36, "Trojan Source"), line and paragraph separators, halves of surrogate pairs.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


# Commands that CI servers read from a log: GitHub's ::add-mask::, ##[error], ##vso[...], ##teamcity[...].
_ORDER = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)")


def printable(text: str) -> str:
    """Replace each hidden character by its escape: a line break by \\n, U+202E by \\u202e. The first character of a CI
    server's command is replaced too. The escapes are valid in a JSON string."""
    shown = HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)
    return _ORDER.sub(lambda found: f"{found[1] or ''}\\u00{ord(found[0][-1]):02x}", shown)


def printable_lines(text: str) -> str:
    """Apply `printable` to each line of a text."""
    return "\n".join(map(printable, text.split("\n")))
