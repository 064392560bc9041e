"""Folders and object stores by their address, through fsspec."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from deploypipe.errors import DeploypipeError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.text.masked_addresses import masked, without_secrets


@contextmanager
def open_store(address: str, refusal: type[DeploypipeError]) -> Iterator[tuple[Any, str]]:
    """The file system of an address, what it was a moment ago forgotten, and the path in it.

    DeploypipeError where the package for it is absent, `refusal` for whatever the store refuses inside the block.
    """
    try:
        store, path = fsspec.url_to_fs(address)
        store.invalidate_cache()
        yield store, path.rstrip("/")
    except DeploypipeError:
        raise
    except ImportError as error:
        raise DeploypipeError(f"{masked(address)}: {without_secrets(str(error), address)}") from None
    except Exception as error:  # each store's library raises its own
        raise_if_exhausted(error)
        told = without_secrets(str(error), address) or type(error).__name__
        raise refusal(f"{masked(address)}: the store refuses ({told}); see that it can be reached") from None
