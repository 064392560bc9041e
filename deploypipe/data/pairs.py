"""Batches of any loader as pairs (inputs, target), by the names or places of their members."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from deploypipe.data.batch_forms import described, example
from deploypipe.data.repeatable import require_repeatable, set_epoch
from deploypipe.errors import DataError

# Which part of a batch: a key or an index; several of them (the part is then a dict or a tuple); or a function.
Selector: TypeAlias = str | int | Sequence[str] | Sequence[int] | Callable[[Any], Any]


class Pairs:
    """Batches of any loader as pairs (inputs, target).

        >>> rows = [{"left": torch.ones(2, 3), "right": torch.zeros(2, 3), "score": torch.ones(2), "id": ["a", "b"]}]
        >>> pairs = Pairs(rows, inputs=["left", "right"], target="score")
        >>> inputs, target = next(iter(pairs))
        >>> sorted(inputs), target
        (['left', 'right'], tensor([1., 1.]))

    inputs, target: a key or an index of a batch; a list of keys (gives a dict, which forward() gets by name) or of
    indices (gives a tuple, by position); or a function of the batch. target=None: there is none, for `calib`.

    Length, order and `set_epoch` are the loader's. PipelineError if it cannot be iterated twice; DataError, with the
    members of the batch, if it has no such key or index.
    """

    def __init__(self, loader: Iterable[Any], *, inputs: Selector, target: Selector | None) -> None:
        self.loader = require_repeatable(loader, "Pairs() was given a {}", "loader")
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # TypeError without a length, as Python does

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, if the loader can."""
        set_epoch(self.loader, epoch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader:
            target = None if self.target is None else _selected(batch, self.target, "target")
            yield _selected(batch, self.inputs, "inputs"), target


def _selected(batch: Any, selector: Selector, role: str) -> Any:
    if callable(selector):
        return selector(batch)
    if isinstance(selector, str | int):
        return _member(batch, selector, role)
    found = [_member(batch, key, role) for key in selector]
    names = [key for key in selector if isinstance(key, str)]
    return dict(zip(names, found, strict=True)) if names else tuple(found)


def _member(batch: Any, key: str | int, role: str) -> Any:
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        pass
    raise DataError(f"Pairs({role}={key!r}): a batch has no such member, it holds {described(batch)}; {example(batch)}")
