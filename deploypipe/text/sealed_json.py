"""JSON objects with a checksum: their last key is the sha256 of the text before it.

The hash covers the bytes, so any flipped bit is detected. It is not a signature: an attacker can compute a new one.
"""

import hashlib
import re

_SEAL = "content_sha256"
_END = re.compile(rb', "%s": "([0-9a-f]{64})"\}\n\Z' % _SEAL.encode())


def seal(text: str) -> bytes:
    """Add the hash to a JSON object, given as text, that has at least one key."""
    return f'{text[:-1]}, "{_SEAL}": "{_sha256(text.encode())}"}}\n'.encode()


def unseal(content: bytes) -> bytes:
    """Return the text without its hash; ValueError if it was changed, or has no hash."""
    end = _END.search(content)
    if end is None:
        raise ValueError(f"does not end with its {_SEAL}")
    text = content[: end.start()] + b"}"
    if _sha256(text) != end[1].decode():
        raise ValueError(f"was changed: its {_SEAL} does not match")
    return text


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
