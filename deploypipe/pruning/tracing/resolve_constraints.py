"""Turn the recipe's constraints (patterns) into constraints on named groups and blocks."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from deploypipe.errors import ConfigError
from deploypipe.pruning.tracing.removable_units import Coupling
from deploypipe.recipe import Constraints
from deploypipe.records import Block, ChannelGroup, Frozen, Member, ResolvedConstraints, Side

_LEAST, _UNIFORM, _TIED = "constraints.least", "constraints.uniform", "constraints.tied"
_NUM_NEAREST = 5


def matching(key: str, pattern: str, names: Collection[str], what: str) -> list[str]:
    """The names that match `pattern`. Raises ConfigError with the nearest names if none does."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        nearest = get_close_matches(pattern, filter(None, names), n=_NUM_NEAREST, cutoff=0.0)
        listed = ", ".join(nearest) or "there are none"
        raise ConfigError("recipe", key, f"{pattern!r} matches no {what}", f"the nearest names are: {listed}")
    return found


def tie(
    couplings: Sequence[Coupling], tied: Sequence[Sequence[str]], frozen: Iterable[Frozen]
) -> tuple[list[Coupling], dict[str, str]]:
    """Merge the couplings of each tie into one, which takes the place and name of the first; and old name -> new name.

    Raises ConfigError where a tie matches nothing, one coupling alone, unlike ones, or one that stays.
    """
    by_name = {coupling.name: coupling for coupling in couplings}
    classes = []
    for patterns in tied:
        asked = ", ".join(patterns)
        names = [name for p in patterns for name in _removable(_TIED, p, by_name, frozen)]
        if len(set(names)) < 2:
            raise ConfigError(
                "recipe", _TIED, f"({asked}) names only {', '.join(names) or 'nothing'}", "name two or more groups"
            )
        _require_alike(_TIED, asked, [by_name[name] for name in dict.fromkeys(names)])
        classes.append(names)
    homes = {name: name for name in by_name}
    for names in _disjoint(classes):
        ordered = [name for name in by_name if name in names]
        homes |= dict.fromkeys(ordered, ordered[0])
        by_name[ordered[0]] = _as_one([by_name[name] for name in ordered])
    return [by_name[name] for name in by_name if homes[name] == name], homes


def resolve(
    constraints: Constraints,
    groups: Sequence[ChannelGroup],
    homes: Mapping[str, str],
    blocks: Sequence[Block],
    frozen: Sequence[Frozen],
) -> ResolvedConstraints:
    """The constraints by group name. homes: the name a group had by itself -> the name of the tied group.

    Raises ConfigError where a pattern matches nothing, or where no choice can hold to what is asked.
    """
    by_name = {group.name: group for group in groups}
    staying = {row.name for row in frozen if row.kind not in ("block", "weights")}
    least: dict[str, int] = {}
    for pattern, value in constraints.least.items():
        for name in matching(_LEAST, pattern, [*homes, *staying], "channel group"):
            if name in homes:
                home = homes[name]
                least[home] = max(least.get(home, 1), _units(pattern, value, by_name[home]))
    classes = []
    for pattern in constraints.uniform:
        names = list(dict.fromkeys(homes[name] for name in _removable(_UNIFORM, pattern, homes, frozen)))
        _require_alike(_UNIFORM, pattern, [by_name[name] for name in names])
        classes.append(names)
    uniform = [names for names in _disjoint(classes) if len(names) > 1]
    for names in uniform:
        highest = max(least.get(name, 1) for name in names)
        least |= dict.fromkeys(names, highest) if highest > 1 else {}
    if constraints.least_blocks > len(blocks):
        problem = f"{constraints.least_blocks} blocks must stay, but only {len(blocks)} can be removed at all"
        raise ConfigError("recipe", "constraints.least_blocks", problem, f"write {len(blocks)} or less")
    return ResolvedConstraints(least=least, uniform=tuple(map(tuple, uniform)), least_blocks=constraints.least_blocks)


def _removable(key: str, pattern: str, names: Collection[str], frozen: Iterable[Frozen]) -> list[str]:
    """The names that match. Raises ConfigError if a frozen structure matches: it would freeze the others too."""
    stays = {row.name: row.reason for row in frozen if row.kind not in ("block", "weights")}
    found = matching(key, pattern, [*names, *stays], "channel group")
    for name in found:
        if name not in names:
            problem = f"{pattern!r} matches {name!r}, which cannot be removed ({stays[name]})"
            raise ConfigError("recipe", key, problem, "name only groups that can shrink")
    return found


def _units(pattern: str, value: int | float, group: ChannelGroup) -> int:
    units = value if isinstance(value, int) else math.ceil(round(value * group.num_units, 6))
    if units > group.num_units:
        problem = f"{pattern!r} asks for {units} units of {group.name!r}, which has {group.num_units}"
        raise ConfigError("recipe", _LEAST, problem, f"write {group.num_units} or less, or a share such as 0.5")
    return max(units, 1)


def _require_alike(key: str, asked: str, groups: Sequence[Coupling | ChannelGroup]) -> None:
    if len({(group.num_units, group.kind) for group in groups}) > 1:
        listed = ", ".join(f"{group.name}: {group.num_units} {group.kind}" for group in groups)
        problem = f"{asked!r} matches groups that are not alike ({listed})"
        raise ConfigError("recipe", key, problem, "name groups of one width and kind, a pattern for each width")


def _disjoint(classes: Iterable[Iterable[str]]) -> list[list[str]]:
    """Merge classes that share a name."""
    found: list[list[str]] = []
    for names in classes:
        touching = [other for other in found if set(other) & set(names)]
        found = [other for other in found if other not in touching]
        found.append(list(dict.fromkeys(name for other in (*touching, names) for name in other)))
    return found


def _as_one(couplings: Sequence[Coupling]) -> Coupling:
    """Unit i of all couplings as one unit: one member for each side of each module."""
    units: dict[tuple[str, Side], tuple[tuple[int, ...], ...]] = {}
    for member in (member for coupling in couplings for member in coupling.members):
        place = (member.module, member.side)
        before = units.get(place, ((),) * len(member.units))
        units[place] = tuple(
            tuple(dict.fromkeys((*mine, *more))) for mine, more in zip(before, member.units, strict=True)
        )
    members = tuple(Member(module=module, side=side, units=u) for (module, side), u in units.items())
    first = couplings[0]
    return Coupling(name=first.name, kind=first.kind, num_units=first.num_units, members=members)
