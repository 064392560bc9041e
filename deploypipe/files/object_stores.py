"""Open folders and object stores by address, through fsspec."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from deploypipe.errors import DeploypipeError
from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.text.masked_addresses import masked, without_secrets


@contextmanager
def open_store(address: str, refusal: type[DeploypipeError]) -> Iterator[tuple[Any, str]]:
    """The file system of an address, with an empty cache, and the path in it.

    DeploypipeError if the package for it is missing; `refusal` for errors of the store inside the block.
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
        message = without_secrets(str(error), address) or type(error).__name__
        raise refusal(f"{masked(address)}: the store refuses ({message}); check that it can be reached") from None
