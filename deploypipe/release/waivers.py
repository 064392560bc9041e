"""Waivers: a person takes responsibility, for a limited time, for a check that does not pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from deploypipe.errors import ConfigError
from deploypipe.files.json_records import load_toml
from deploypipe.records import Check, Status, Waiver

_DATES = ("granted", "expires")


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    waiver: tuple[Waiver, ...] = ()


def load_waivers(path: Path) -> tuple[Waiver, ...]:
    """The `[[waiver]]` tables of a TOML file. ConfigError if one lacks a check, a reason, a person or a valid date."""
    waivers = load_toml(_File, path).waiver
    for number, waiver in enumerate(waivers):
        key = f"waiver.{number}"
        for name in ("check", "reason", "by"):
            if not getattr(waiver, name).strip():
                raise ConfigError(str(path), f"{key}.{name}", "is empty", "write the check, the reason and the person")
        for name in _DATES:
            _parse(path, f"{key}.{name}", getattr(waiver, name))
        if waiver.expires < waiver.granted:
            raise ConfigError(str(path), f"{key}.expires", "is before the date granted", "write a later date")
    return waivers


def waived(checks: Sequence[Check], waivers: Sequence[Waiver], today: date) -> tuple[Check, ...]:
    """The checks. One that does not pass gets its waiver in force, or the reason why its waiver is not in force."""
    return tuple(check if check.status is Status.PASS else _with_waiver(check, waivers, today) for check in checks)


def _with_waiver(check: Check, waivers: Sequence[Waiver], today: date) -> Check:
    own = [waiver for waiver in waivers if waiver.check == check.name]
    in_force = [w for w in own if date.fromisoformat(w.granted) <= today <= date.fromisoformat(w.expires)]
    if in_force:
        return replace(check, waiver=max(in_force, key=lambda waiver: waiver.expires))
    if not own:
        return check
    latest = max(own, key=lambda waiver: waiver.expires)
    is_past = date.fromisoformat(latest.expires) < today
    why = f"expired on {latest.expires}" if is_past else f"starts on {latest.granted}, and today is {today}"
    return replace(check, reason=f"{check.reason}; the waiver by {latest.by} {why}")


def _parse(path: Path, key: str, text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ConfigError(str(path), key, f"{text!r} is not a date", "write it like 2026-12-31") from None
