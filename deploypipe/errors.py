"""The exceptions for everything a user can get wrong.

Any exception that is not a `DeploypipeError` is a bug of ours. The command line prints these as one message and exits
with 2.
"""

from deploypipe.text.printable_text import printable


class DeploypipeError(Exception):
    """Base class of all expected failures. The message says what was wrong, what was seen and what to do."""


class ConfigError(DeploypipeError):
    """A setting of a target file, a recipe or `--set` does not exist or cannot work."""

    def __init__(self, source: str, key: str, problem: str, remedy: str) -> None:
        self.source, self.key, self.problem, self.remedy = source, key, problem, remedy
        where = f"{printable(source)}: {printable(key)}" if key else printable(source)
        super().__init__(f"{where}: {problem}; {remedy}")


class PipelineError(DeploypipeError):
    """A pipeline module lacks a function, or one of its functions fails or returns the wrong type."""


class DataError(DeploypipeError):
    """Data is missing, empty, of the wrong shape, or makes the network produce NaN."""


class ModelError(DeploypipeError):
    """The network or model file cannot be used as it is (frozen, not traceable, nothing removable, damaged)."""


class PlanError(DeploypipeError):
    """A pruning plan does not fit the model it is applied to."""


class BudgetError(DeploypipeError):
    """No candidate meets the budget; the message names the closest one."""


class ParityError(DeploypipeError):
    """The outputs of an exported file differ from the network's."""


class RuntimeUnavailableError(DeploypipeError):
    """A runtime or provider that a target needs is not installed on this machine."""


class RunFolderError(DeploypipeError):
    """The run folder is locked, not writable, or belongs to something else."""


class ExhaustedError(DeploypipeError):
    """The machine has run out of something: disk, memory, open files."""


class StorageError(DeploypipeError):
    """The database of a shared search cannot be reached, has another version, or holds something else."""


class RanksError(DeploypipeError):
    """The processes of a multi-process fine-tune differ in code, network or data, or one of them has ended."""


class BundleError(DeploypipeError):
    """A release bundle is incomplete, was changed, or is not signed as required."""


class NoVersionError(BundleError):
    """A registry has no version for the alias."""
