"""Pruning plans as table rows, for the terminal: what a plan removes, and how two plans differ."""

from collections.abc import Iterable

from deploypipe.records import Edit, GroupCut, PruningPlan


def plan_rows(plan: PruningPlan) -> list[tuple[str, ...]]:
    """One row for each group: its name, width before and after, width asked for, and why they differ."""
    return [(c.group, f"{c.num_units} -> {_width(c)}", str(c.asked), c.reason) for c in plan.cuts]


def plan_differences(first: PruningPlan, second: PruningPlan) -> list[tuple[str, ...]]:
    """One row for each difference: what, in the first plan, in the second, and what the second removes more or less.

    Plans that remove the same from the same model have no rows, whatever was asked for. Edits of single modules are
    compared only if groups and blocks agree, because they follow from those.
    """
    hashes = zip(*(plan.model_fingerprint.partition("-")[::2] for plan in (first, second)), strict=True)
    parts = zip(("structure", "weights"), hashes, strict=True)
    rows: list[tuple[str, ...]] = [(f"model {part}", a[:12], b[:12], "") for part, (a, b) in parts if a != b]
    cuts, others = ({cut.group: cut for cut in plan.cuts} for plan in (first, second))
    removals = [(name, cuts.get(name), others.get(name)) for name in dict.fromkeys((*cuts, *others))]
    found: list[tuple[str, ...]] = [
        (name, _cut(a), _cut(b), _change(_removed(a), _removed(b))) for name, a, b in removals
    ]
    found = [row for row in found if row[1] != row[2] or row[3]]
    for name in dict.fromkeys((*first.blocks, *second.blocks)):
        states = ["removed" if name in plan.blocks else "stays" for plan in (first, second)]
        found += [(f"block {name}", *states, "")] if states[0] != states[1] else []
    return rows + (found or _edit_differences(first.edits, second.edits))


def ranges(indices: Iterable[int], most: int = 6) -> str:
    """Write indices as "0-3, 7, 9". After `most` ranges the other indices are only counted."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]]
    rest = sum(map(len, runs[most:]))
    return ", ".join([*texts, f"{rest} more"] if rest else texts)


def _edit_differences(first: Iterable[Edit], second: Iterable[Edit]) -> list[tuple[str, ...]]:
    gone, others = ({(e.module, e.side): e.removed for e in edits} for edits in (first, second))
    pairs = [(key, gone.get(key, ()), others.get(key, ())) for key in dict.fromkeys((*gone, *others))]
    return [
        (f"{module} {side}", f"{len(a)} removed", f"{len(b)} removed", _change(a, b))
        for (module, side), a, b in pairs
        if a != b
    ]


def _width(cut: GroupCut) -> int:
    return cut.num_units - len(cut.removed)


def _cut(cut: GroupCut | None) -> str:
    return "whole" if cut is None or not cut.removed else f"{_width(cut)} of {cut.num_units}"


def _removed(cut: GroupCut | None) -> tuple[int, ...]:
    return cut.removed if cut else ()


def _change(first: Iterable[int], second: Iterable[int]) -> str:
    more, less = ranges(set(second) - set(first)), ranges(set(first) - set(second))
    return "; ".join([f"removes {more}"] * bool(more) + [f"keeps {less}"] * bool(less))
