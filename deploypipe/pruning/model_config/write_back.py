"""Update a network's config (`transformers`) if some values of its fields provably describe the pruned network.

Networks of `transformers` are built from `model.config`. This code knows no field names. It builds the class again,
without memory for weights, with one field changed at a time. The differences show which sizes each field decides. From
them it solves the fields for the pruned network's sizes, and builds the class from the solution. The config is written
only if that network has the pruned network's tensors, by name and shape, and every value that forward() reads is equal.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache
from typing import Any

from torch import nn

from deploypipe.pruning.model_config.build_from_config import (
    Fact,
    Field,
    Misfit,
    build,
    config_parts,
    dotted,
    facts_of,
    fields_of,
    is_config,
    set_field_,
    shapes_of,
    value_of,
    with_fields,
)
from deploypipe.pruning.model_config.config_proof import difference
from deploypipe.pruning.model_config.forward_reads import Reads, reads_of
from deploypipe.pruning.modules.bypass import Bypass

_TRIED = (64, 128)  # values tried for a field that is None


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFit:
    """The result for one config: new `values`, or the `reason` why it still describes the dense network."""

    module: str  # the outermost module that has the config
    values: dict[Field, int]  # those that change
    reason: str = ""

    def note(self) -> str:
        """One sentence for the user."""
        where = f"{self.module}.config" if self.module else "config"
        if self.reason:
            return f"{where} still describes the dense network: {self.reason}"
        values = ", ".join(f"{dotted(field)} {value}" for field, value in self.values.items())
        return f"{where} describes the pruned network: {values}"


def fit_configs(dense: nn.Module, pruned: nn.Module) -> tuple[ConfigFit, ...]:
    """For each config whose network was cut, the fields that describe what is left. Changes neither network.

    Cost: the dense class is constructed once for each whole number in its config, and a few times more.
    """
    fits = []
    left = dict(pruned.named_modules())
    for name in _owners(dense):
        before, after = dense.get_submodule(name), left.get(name)
        if after is None or isinstance(after, Bypass) or shapes_of(before) == shapes_of(after):
            continue
        try:
            fits.append(ConfigFit(module=name, values=_solve(before, after)))
        except Misfit as error:
            fits.append(ConfigFit(module=name, values={}, reason=str(error)))
        except Exception as error:  # a config that cannot be copied or compared; nothing depends on it
            fits.append(ConfigFit(module=name, values={}, reason=f"{type(error).__name__}: {error}"))
    return tuple(fits)


def write_configs_(pruned: nn.Module, fits: tuple[ConfigFit, ...]) -> None:
    """Update every config object inside `pruned`. They are not shared with other networks."""
    for fit in fits:
        if not fit.values:
            continue
        owner: Any = pruned.get_submodule(fit.module)
        for field, value in fit.values.items():
            set_field_(owner.config, field, value)
        known = [id(part) for part in config_parts(owner.config)]
        built = dict(build(type(owner), owner.config).named_modules())
        for name, module in owner.named_modules():  # some keep a changed copy of the config, such as T5's two stacks
            for attribute, copy in vars(module).items():
                if is_config(copy) and id(copy) not in known and name in built:
                    _follow_(copy, vars(built[name]).get(attribute), fit.values)


def _owners(model: nn.Module) -> Iterator[str]:
    """Names of the outermost modules that have a config."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(not other or name.startswith(f"{other}.") for other in found)
        if not is_inside and is_config(vars(module).get("config")):
            found.append(name)
            yield name


def _follow_(copy: Any, built: Any, fields: Mapping[Field, int]) -> None:
    for field in fields:
        name = next(step for step in reversed(field) if isinstance(step, str))
        if name in vars(copy) and built is not None and name in vars(built):
            setattr(copy, name, getattr(built, name))


# --- solving ----------------------------------------------------------------------------------------------------------


def _solve(dense: nn.Module, pruned: nn.Module) -> dict[Field, int]:
    """Fields that change, and their new values. Raises Misfit with the reason if no values fit."""
    kind: type[nn.Module] = type(dense)
    config: Any = dense.config
    built = build(kind, config)
    if shapes_of(built) != shapes_of(dense):
        raise Misfit(f"{kind.__name__}(config) is not the dense network: its tensors have other names or shapes")
    reads = reads_of(type(module) for module in dense.modules())
    try:
        return _solved(kind, config, pruned, reads)
    except Misfit:
        # A field that is None may mean a number derived from other fields, as n_inner of GPT-2 does.
        spare = _spare_fields(_Spec(kind=kind, text=_text(config), config=config))
        if not spare:
            raise
    values = {**spare, **_solved(kind, with_fields(config, spare), pruned, reads)}
    for field in spare:
        fewer = {f: v for f, v in values.items() if f != field}
        if not difference(kind, config, fewer, pruned, reads):
            values = fewer
    return values


def _solved(kind: type[nn.Module], config: Any, pruned: nn.Module, reads: Reads) -> dict[Field, int]:
    """Solve field by field. Each follows from the sizes that it alone decides once the earlier fields are known."""
    wanted = {fact: size for fact, size in facts_of(pruned).items() if _counts(fact, reads)}
    free = [field for field, value in fields_of(config) if value is not None and value > 0]
    values: dict[Field, int] = {}
    spec = _Spec(kind=kind, text=_text(config), config=config)
    while True:
        every = {field: _slopes(spec, field) for field in free}
        slopes = {field: {fact: by for fact, by in every[field].items() if fact in wanted} for field in free}
        free = [field for field in free if slopes[field]]
        settled = _settled(spec.config, {field: slopes[field] for field in free}, _facts_of(spec), wanted)
        if not settled:
            break
        free = [field for field in free if field not in settled]
        values |= settled
        current = with_fields(config, values)
        spec = _Spec(kind=kind, text=_text(current), config=current)
    values = {field: value for field, value in values.items() if value != value_of(config, field)}
    if reason := difference(kind, config, values, pruned, reads):
        raise Misfit(reason)
    return values


def _settled(
    config: Any, slopes: Mapping[Field, Mapping[Fact, float]], facts: Mapping[Fact, int], wanted: Mapping[Fact, int]
) -> dict[Field, int]:
    """Values of the fields that need not change, or that alone decide some size."""
    users = Counter(fact for found in slopes.values() for fact in found)
    moving = [found for found in slopes.values() if any(facts[fact] != wanted[fact] for fact in found)]
    moved = {fact for found in moving for fact in found}
    settled = {}
    for field, found in slopes.items():
        alone = {fact: slope for fact, slope in found.items() if users[fact] == 1}
        if moved.isdisjoint(found):
            settled[field] = value_of(config, field)
        elif alone:
            settled[field] = _agreed(config, field, alone, facts, wanted)
    return settled


def _counts(fact: Fact, reads: Reads) -> bool:
    return not fact[1].startswith("@") or fact[1][1:] in reads.attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """The class and configuration of a network. Two are equal if their class and `text` are."""

    kind: type[nn.Module]
    text: str
    config: Any = dataclass_field(compare=False)


@lru_cache(maxsize=256)  # a search cuts the same network many times
def _facts_of(spec: _Spec) -> dict[Fact, int]:
    return facts_of(build(spec.kind, spec.config))


@lru_cache(maxsize=1024)
def _slopes(spec: _Spec, field: Field) -> dict[Fact, float]:
    """How much each size grows with the field, for sizes that do. Empty if the field accepts no other value."""
    facts, old = _facts_of(spec), value_of(spec.config, field)
    for new in (2 * old, 3 * old, old + 1):
        try:
            seen = facts_of(build(spec.kind, spec.config, {field: new}))
        except Misfit:
            continue
        changed = [fact for fact in facts if fact in seen and seen[fact] != facts[fact]]
        return {fact: (seen[fact] - facts[fact]) / (new - old) for fact in changed}
    return {}


def _text(config: Any) -> str:
    return repr((type(config), config.to_dict()))


def _agreed(
    config: Any, field: Field, slopes: Mapping[Fact, float], facts: Mapping[Fact, int], wanted: Mapping[Fact, int]
) -> int:
    """The one value that gives all these sizes. Numbers in attributes decide only if no tensor does."""
    tensors = {fact: slope for fact, slope in slopes.items() if not fact[1].startswith("@")}
    old = value_of(config, field)
    asked: dict[float, Fact] = {}
    for fact, slope in (tensors or slopes).items():
        is_inverse = slope < 0 < wanted[fact]  # the size of a head is the width by the number of heads
        value = old * facts[fact] / wanted[fact] if is_inverse else old + (wanted[fact] - facts[fact]) / slope
        asked.setdefault(value, fact)
    (value, one), *others = asked.items()
    for other, two in others:
        raise Misfit(f"{dotted(field)} would be {value:g} for {one[0]!r}, but {other:g} for {two[0]!r}")
    if value != int(value) or value < 1:
        raise Misfit(f"{dotted(field)} would be {value:g} for {one[0]!r}")
    return int(value)


@lru_cache(maxsize=16)
def _spare_fields(spec: _Spec) -> dict[Field, int]:
    """Fields that are None, with the number that gives the same network."""
    kind, config, facts = spec.kind, spec.config, _facts_of(spec)
    found: dict[Field, int] = {}
    for field in [field for field, value in fields_of(config) if value is None]:
        try:
            low, high = (facts_of(build(kind, config, {field: value})) for value in _TRIED)
        except Misfit:
            continue
        if not low.keys() == high.keys() == facts.keys():
            continue
        tensors = [fact for fact in facts if not fact[1].startswith("@") and low[fact] != high[fact]]
        if not tensors:
            continue
        slope = (high[tensors[0]] - low[tensors[0]]) / (_TRIED[1] - _TRIED[0])
        value = round(_TRIED[0] + (facts[tensors[0]] - low[tensors[0]]) / slope)
        if facts_of(build(kind, config, {field: value})) == facts:
            found[field] = value
    return found
