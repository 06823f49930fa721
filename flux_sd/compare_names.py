"""Another program's names for stages, from a TOML file, turned into ours. Floor 1.

    [names]                                             # theirs = ours
    "transformer_blocks.{i}.hidden" = "step.0.double_blocks.{i}.img"
    "text/*" = "t5.encoder.*"

`{i}` (any word) stands for a whole number, the same wherever it occurs in a row; `*` for any text, in order.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import RequestError

_SLOT = re.compile(r"\{(\w+)\}|\*", re.ASCII)


@dataclass(frozen=True)
class NameRule:
    """One row of a names file."""

    theirs: str
    ours: str

    def __post_init__(self) -> None:
        """Raises RequestError where the right side needs what the left does not catch."""
        slots = {side: [slot[0] for slot in _SLOT.finditer(side)] for side in (self.theirs, self.ours)}
        unknown = [slot for slot in slots[self.ours] if slot not in slots[self.theirs]]
        if unknown:
            raise RequestError(f"{self.ours!r} uses {unknown[0]}, which {self.theirs!r} does not have")
        if slots[self.theirs].count("*") != slots[self.ours].count("*"):
            raise RequestError(f"{self.theirs!r} and {self.ours!r} have different numbers of *")

    def apply(self, name: str) -> str | None:
        """Our name for theirs, None where the row is about other names."""
        match = re.fullmatch(self._expression(), name)
        if match is None:
            return None
        texts = iter(match[f"star_{i}"] for i in range(self.theirs.count("*")))
        return _SLOT.sub(lambda slot: next(texts) if slot[0] == "*" else match[f"slot_{slot[1]}"], self.ours)

    def _expression(self) -> str:
        """The left side as a regular expression: groups slot_i for {i}; star_0, star_1, ... for the stars."""
        parts, end, seen, stars = [], 0, set(), 0
        for slot in _SLOT.finditer(self.theirs):
            parts.append(re.escape(self.theirs[end : slot.start()]))
            end = slot.end()
            if slot[0] == "*":
                parts.append(f"(?P<star_{stars}>.+?)")
                stars += 1
            else:
                group = f"slot_{slot[1]}"
                parts.append(f"(?P={group})" if slot[1] in seen else rf"(?P<{group}>\d+)")
                seen.add(slot[1])
        return "".join([*parts, re.escape(self.theirs[end:])])


def read_names(path: Path) -> tuple[NameRule, ...]:
    """The rows of a names file. Raises RequestError for anything but a table [names] of strings."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"the names file {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the names file {str(path)!r} is no TOML: {error}") from error
    table = content.pop("names", None)
    if content or not isinstance(table, dict) or not all(isinstance(ours, str) for ours in table.values()):
        raise RequestError(
            f'the names file {str(path)!r} should hold one table, [names], of rows "their name" = "our name"'
        )
    return tuple(NameRule(theirs, ours) for theirs, ours in table.items())


def our_names(names: Iterable[str], rules: Iterable[NameRule], used: set[NameRule]) -> Mapping[str, str]:
    """Our name -> the name in the file, for every name of a file; one that no rule is about stays as it is.

    The first rule that fits is taken, and added to `used`. Raises RequestError where two names become one.
    """
    found: dict[str, str] = {}
    for name in names:
        ours = name
        for rule in rules:
            renamed = rule.apply(name)
            if renamed is not None:
                ours = renamed
                used.add(rule)
                break
        if ours in found:
            raise RequestError(f"the names file makes {ours!r} of both {found[ours]!r} and {name!r}")
        found[ours] = name
    return found
