"""Addresses of servers and stores, as they may be told."""

from urllib.parse import urlsplit


def masked(address: str) -> str:
    """Without user, password and query, which may hold a token."""
    parts = urlsplit(address)
    if not parts.netloc:
        return address
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def without_secrets(text: str, address: str) -> str:
    """The words of an error about an address, without what `masked` leaves out of the address."""
    parts = urlsplit(address)
    for secret in (parts.netloc.rpartition("@")[0], parts.password, parts.query, parts.fragment):
        text = text.replace(secret, "***") if secret else text
    return text
