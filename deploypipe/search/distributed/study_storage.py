"""Where a study lives: the run's own SQLite file, or a database that the workers of one search share."""

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
    ProgrammingError,
    SQLAlchemyError,
)

from deploypipe.errors import RunFolderError, StorageError
from deploypipe.files.cache_folder import cache_folder
from deploypipe.files.hashing import digest
from deploypipe.scheduling.exclusive_measurement import pause
from deploypipe.text.masked_addresses import masked, without_secrets

T = TypeVar("T")

_OWN = "search"  # name of the study in a run's own file
_DRIVER = "postgresql+psycopg"
_LOCK_TIMEOUT_S = 60  # a process killed a moment ago may hold a file's lock while the kernel takes it down
_OPENED_AT_ONCE = 5  # attempts
_PAUSE_S = 1.0  # before a database that is away is asked again
_AGAIN = "run the same command again: it goes on after the last finished trial"
_REMEDIES = (  # what SQLite says, and what to do
    ("is full", f"make room on its disk, and {_AGAIN}"),
    ("readonly", f"make it writable, and {_AGAIN}"),
    ("locked", "end the other process that uses it, and run the same command again"),
    ("", "check its disk and the room on it, and run the same command again; if that fails too, delete the file"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """A study's database, by its SQLAlchemy address, and the study's name in it."""

    url: str = field(repr=False)  # may hold a password
    study: str = _OWN
    is_shared: bool = True  # several processes may be at work on it
    stages: str = field(
        default="", repr=False
    )  # where workers find the finished stages: a folder, or the address of one in an object store
    job: Mapping[str, Any] = field(
        default_factory=dict, repr=False
    )  # what a worker needs to know to build the same network
    heartbeat_s: int = 15  # how often a worker shows that it is at its trial
    grace_s: int = 60  # without a heartbeat, after which the trial is somebody else's
    patience_s: float = 120.0  # how long the database may be away

    @classmethod
    def own(cls, path: Path) -> "Storage":
        """A file that no other process uses."""
        return cls(url=f"sqlite:///{path}", is_shared=False, patience_s=0.0)

    @property
    def shown(self) -> str:
        """How it is named to people: the file, or the address without what is secret in it."""
        return masked(self.url) if self.is_shared else self.url.removeprefix("sqlite:///")

    @property
    def place(self) -> Path:
        """Where all that work with it on this machine are side by side."""
        return cache_folder() / "side_by_side" / digest(self.shown)

    def open(self) -> RDBStorage:
        """The database, with Optuna's tables in it. StorageError where it cannot be used, SQLAlchemyError where it is
        away."""
        try:
            address = sa.make_url(self.url)
            if address.drivername == "postgresql":
                address = address.set(drivername=_DRIVER)
            if address.get_backend_name() == "sqlite" and address.database:
                _make_whole(Path(address.database))
            return _connect(address, *((self.heartbeat_s, self.grace_s) if self.is_shared else (None, None)))
        except (ArgumentError, ValueError, TypeError):  # the two last: a port that is not a number, an unknown option
            raise StorageError(
                f"{self.shown}: is no address of a database; write postgresql://USER:PASSWORD@HOST/NAME, odd "
                f"signs of a password encoded (%2F for /), or sqlite:///FILE for processes of one machine"
            ) from None
        except (ImportError, NoSuchModuleError) as error:
            told = without_secrets(str(error), self.url).rstrip(".")
            raise StorageError(
                f"{self.shown}: {told}; write postgresql://..., and pip install 'deploypipe[postgres]'"
            ) from None
        except RuntimeError as error:  # tables of another Optuna
            told = without_secrets(str(error), self.url)
            raise StorageError(f"{self.shown}: {told} Or give the search a database of its own") from None

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns, called again while the database is away, for at most `patience_s`."""
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return call()
            except (DBAPIError, StorageInternalError) as error:
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                is_away = isinstance(cause, DBAPIError) and not isinstance(cause, IntegrityError)
                if not is_away or time.monotonic() >= until:
                    raise
            pause(_PAUSE_S)

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """What the database refuses, as StorageError, or RunFolderError for a run's own file, that says what to do."""
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
            reason = " ".join(without_secrets(str(getattr(cause, "orig", None) or cause), self.url).split())
            told = f"{self.shown}: the study cannot be read or written ({reason})"
            if self.is_shared:
                raise StorageError(f"{told}; see that the database runs and lets you in, and {_AGAIN}") from None
            remedy = next(remedy for text, remedy in _REMEDIES if text in reason)
            raise RunFolderError(f"{told}; {remedy}") from None


def _connect(address: sa.URL, heartbeat_s: int | None, grace_s: int | None) -> RDBStorage:
    is_file = address.get_backend_name() == "sqlite"
    options = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}} if is_file else {"pool_pre_ping": True}
    text = address.render_as_string(hide_password=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
        for _ in range(_OPENED_AT_ONCE - 1):
            with suppress(ProgrammingError, IntegrityError, AssertionError):  # others make the tables just now
                return RDBStorage(text, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s)
            time.sleep(_PAUSE_S)
        return RDBStorage(text, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s)


def _make_whole(path: Path) -> None:
    """An empty database under that name, which whoever finds it finds whole; of several at once, one is kept."""
    if path.exists():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    RDBStorage(f"sqlite:///{part}").engine.dispose()
    with suppress(FileExistsError):
        os.link(part, path)
    part.unlink()
