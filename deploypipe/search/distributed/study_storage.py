"""The database of a study: the run's own SQLite file, or one that the workers of a search share."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from deploypipe.errors import RunFolderError, StorageError
from deploypipe.files.cache_folder import cache_folder
from deploypipe.files.hashing import digest
from deploypipe.scheduling.exclusive_measurement import sleep_without_blocking
from deploypipe.text.masked_addresses import masked, without_secrets

T = TypeVar("T")

_OWN = "search"  # the study's name in a run's own file
_DRIVER = "postgresql+psycopg"
_LOCK_TIMEOUT_S = 60  # a process that was just killed may hold the file's lock while the kernel cleans up
_OPEN_ATTEMPTS = 5
_PAUSE_S = 1.0  # before a database that could not be reached is tried again
_AGAIN = "run the same command again: it continues after the last finished trial"
_REMEDIES = (  # what SQLite says, and what to do
    ("is full", f"free space on its disk, and {_AGAIN}"),
    ("readonly", f"make it writable, and {_AGAIN}"),
    ("locked", "end the other process that uses it, and run the same command again"),
    ("", "check its disk and the free space, and run the same command again; if that fails too, delete the file"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """A study's database, by its SQLAlchemy address, and the study's name in it."""

    url: str = field(repr=False)  # may hold a password
    study: str = _OWN
    is_shared: bool = True  # several processes may work on it
    # Where workers find the finished stages: a folder, or the address of one in an object store.
    stages: str = field(default="", repr=False)
    job: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what a worker needs to build the same network
    heartbeat_s: int = 15  # how often a worker reports that it works on its trial
    grace_s: int = 60  # after so long without a heartbeat, another worker may take the trial
    patience_s: float = 120.0  # how long the database may be unreachable

    @classmethod
    def own(cls, path: Path) -> "Storage":
        """The storage in a file that no other process uses."""
        return cls(url=f"sqlite:///{path}", is_shared=False, patience_s=0.0)

    @property
    def shown(self) -> str:
        """The name for people: the file, or the address without its password."""
        return masked(self.url) if self.is_shared else self.url.removeprefix("sqlite:///")

    @property
    def place(self) -> Path:
        """Folder that all processes of this machine that work with this storage share."""
        return cache_folder() / "shared_machine" / digest(self.shown)

    def open(self) -> RDBStorage:
        """Open the database, with Optuna's tables in it.

        StorageError if it cannot be used, SQLAlchemyError if it cannot be reached.
        """
        try:
            address = sa.make_url(self.url)
            if address.drivername == "postgresql":
                address = address.set(drivername=_DRIVER)
            if address.get_backend_name() == "sqlite" and address.database:
                _make_whole(Path(address.database))
            return _connect(address, *((self.heartbeat_s, self.grace_s) if self.is_shared else (None, None)))
        except (ArgumentError, ValueError, TypeError):  # the last two: a port that is not a number, an unknown option
            raise StorageError(
                f"{self.shown}: is not the address of a database; write postgresql://USER:PASSWORD@HOST/NAME, with "
                "special characters of the password encoded (%2F for /), or sqlite:///FILE for processes of one machine"
            ) from None
        except (ImportError, NoSuchModuleError) as error:
            reason = without_secrets(str(error), self.url).rstrip(".")
            raise StorageError(
                f"{self.shown}: {reason}; write postgresql://..., and pip install 'deploypipe[postgres]'"
            ) from None
        except RuntimeError as error:  # tables of another Optuna version
            reason = without_secrets(str(error), self.url)
            raise StorageError(f"{self.shown}: {reason} Or give the search a database of its own") from None

    def retry_while_away(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; call it again while the database cannot be reached, for at most `patience_s`."""
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return call()
            except (DBAPIError, PendingRollbackError, StorageInternalError) as error:
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                # The second: the connection was lost between two statements of one transaction.
                is_away = isinstance(cause, DBAPIError | PendingRollbackError) and not isinstance(cause, IntegrityError)
                if not is_away or time.monotonic() >= until:
                    raise
            sleep_without_blocking(_PAUSE_S)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn the database's errors into StorageError, or RunFolderError for a run's own file, with a remedy."""
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
            reason = " ".join(without_secrets(str(getattr(cause, "orig", None) or cause), self.url).split())
            problem = f"{self.shown}: the study cannot be read or written ({reason})"
            if self.is_shared:
                raise StorageError(f"{problem}; check that the database runs and accepts you, and {_AGAIN}") from None
            remedy = next(remedy for text, remedy in _REMEDIES if text in reason)
            raise RunFolderError(f"{problem}; {remedy}") from None


def _connect(address: sa.URL, heartbeat_s: int | None, grace_s: int | None) -> RDBStorage:
    is_file = address.get_backend_name() == "sqlite"
    options = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}} if is_file else {"pool_pre_ping": True}
    text = address.render_as_string(hide_password=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
        for _ in range(_OPEN_ATTEMPTS - 1):
            with suppress(ProgrammingError, IntegrityError, AssertionError):  # another process is creating the tables
                return RDBStorage(text, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s)
            time.sleep(_PAUSE_S)
        return RDBStorage(text, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s)


def _make_whole(path: Path) -> None:
    """Create an empty database under that name in one step. If several processes do so at once, one file is kept."""
    if path.exists():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    RDBStorage(f"sqlite:///{part}").engine.dispose()
    with suppress(FileExistsError):
        os.link(part, path)
    part.unlink()
