"""Mask addresses of servers and stores before they are shown: no user, password, token or query.

Users often write addresses that are not valid (a password with '/', '#', '?' or '[' that is not encoded), and libraries
disagree about their meaning. So nothing is parsed here: whatever could be secret under any reading is left out.
"""

import re
from urllib.parse import quote, unquote, unquote_plus

_HIDDEN = "***"
_OF_A_FILE = ("sqlite", "file", "local")  # schemes without a server: an '@' belongs to the path
_SECRET_KEYS = re.compile(r"(?i)\b(password|passwd|pwd|secret|token|sig|signature|api_?key|access_?key)\s*=")
_MIN_PIECE = 3  # characters of a part of a secret that is looked for in a text


def masked(address: str) -> str:
    """Scheme, host and path of an address, with "***" for parts that may hold a secret. A plain path is unchanged."""
    scheme, is_address, rest = address.partition("://")
    if not is_address:
        is_secret = _has_password(address.removeprefix("models:")) or _SECRET_KEYS.search(address)
        return _HIDDEN if is_secret else address
    if _is_of_a_file(scheme, rest):
        return f"{scheme}://{re.split('[?#]', rest)[0]}"
    head, _, place = rest.rpartition("@")
    place = re.split("[?#;]", place)[0]
    host, _, path = place.partition("/")
    port = host.rpartition("]")[2].rpartition(":")[2] if ":" in host else ""
    is_odd = (port and not port.isdecimal()) or _SECRET_KEYS.search(path)
    if re.search("[?#;]", head) or is_odd:  # a query with an '@' in it, or a password with an odd sign: which one?
        return f"{scheme}://{_HIDDEN}"
    return f"{scheme}://{place}"


def masked_reference(reference: str) -> str:
    """Mask REGISTRY/NAME@ALIAS, but keep its alias."""
    path, at, alias = reference.rpartition("@")
    is_alias = at and "/" not in alias and "/" in path.partition(":")[2].removeprefix("//")
    return f"{masked(path)}@{alias}" if is_alias else masked(reference)


def without_secrets(text: str, address: str) -> str:
    """The text of an error about an address, without the parts that `masked` hides.

    Pieces of a secret are removed as well: a driver that reads a password as part of the host quotes only that part.
    """
    shown = masked(address)
    if shown == address:
        return text
    scheme, _, rest = address.rpartition("://") if address.count("://") == 1 else ("", "", address)
    head, _, place = ("", "", rest) if _is_of_a_file(scheme, rest) else rest.rpartition("@")
    hidden = {rest} if shown.endswith(_HIDDEN) else {head, *re.split("[?#;]", place, maxsplit=1)[1:]}
    wholes = {address, *hidden, head.partition(":")[2]}
    pieces = {piece for whole in hidden for way in (str, unquote_plus) for piece in re.split(r"[\W_]+", way(whole))}
    secrets = {way(secret) for secret in wholes | pieces for way in (str, unquote, unquote_plus, quote, _escaped)}
    for secret in sorted(secrets, key=lambda secret: (-len(secret), secret)):
        if len(secret) >= _MIN_PIECE:
            text = text.replace(secret, _HIDDEN)
    return text


def _is_of_a_file(scheme: str, rest: str) -> bool:
    """Whether a path follows the scheme; an '@' in a path is an ordinary character."""
    return scheme.partition("+")[0] in _OF_A_FILE and (rest.startswith("/") or not _has_password(rest))


def _has_password(text: str) -> bool:
    return re.match(r"[^@]*:[^@]*@", text) is not None


def _escaped(secret: str) -> str:
    """As Python prints it."""
    return repr(secret)[1:-1]
