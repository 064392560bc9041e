"""Everything a user can get wrong, as one family of exceptions.

Whatever is not a `DeploypipeError` is a bug of ours. The command line prints these as one message and exits with 2.
"""

from deploypipe.text.printable_text import printable


class DeploypipeError(Exception):
    """Root of all expected failures. The message says what was wrong, what was seen and what to do."""


class ConfigError(DeploypipeError):
    """A target file, an override or a recipe asks for something that does not exist or cannot work."""

    def __init__(self, source: str, key: str, problem: str, remedy: str) -> None:
        self.source, self.key, self.problem, self.remedy = source, key, problem, remedy
        where = f"{printable(source)}: {printable(key)}" if key else printable(source)
        super().__init__(f"{where}: {problem}; {remedy}")


class PipelineError(DeploypipeError):
    """A pipeline module lacks a function, or one of its functions returns the wrong thing."""


class DataError(DeploypipeError):
    """Data is absent, empty, of the wrong shape, or makes the network produce NaN."""


class ModelError(DeploypipeError):
    """The network cannot be worked on as it is (frozen, not traceable, nothing removable)."""


class PlanError(DeploypipeError):
    """A pruning plan does not fit the model it is applied to."""


class BudgetError(DeploypipeError):
    """No candidate meets the budget; the message names the nearest miss."""


class ParityError(DeploypipeError):
    """An exported file does not compute what the network computes."""


class RuntimeUnavailableError(DeploypipeError):
    """A runtime or provider a target asks for is not installed on this machine."""


class RunFolderError(DeploypipeError):
    """The run folder is locked, unwritable, or belongs to something else."""


class ExhaustedError(DeploypipeError):
    """The machine has run out of something: disk, memory, open files."""


class StorageError(DeploypipeError):
    """A database that a search is shared by is away, of another version, or holds something else."""


class RanksError(DeploypipeError):
    """The processes of one job differ in their code, network or data, or one of them has ended."""


class BundleError(DeploypipeError):
    """A release bundle is incomplete, was changed, or is not signed as it should be."""


class NoVersionError(BundleError):
    """A registry has no version that the alias means."""
