"""One wrong edit of one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """Characters `start` to `end` of `file` become `after`."""

    file: str  # relative to the root of the project
    line: int
    where: str  # class and function, or the row of a map
    rule: str
    start: int
    end: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """Names the edit without its line, so that it stays valid when lines move."""
        return f"{self.file} {self.where} [{self.rule}] {_short(self.before)} -> {_short(self.after)}"

    def apply(self, source: Path, destination: Path) -> None:
        """Writes the mutated `source` to `destination`."""
        text = source.read_text(encoding="utf-8")
        assert text[self.start : self.end] == self.before, f"{self.file} changed under {self.key}"
        mutated = text[: self.start] + self.after + text[self.end :]
        destination.write_text(mutated, encoding="utf-8")


def numbered(mutants: list[Mutant]) -> dict[str, Mutant]:
    """By key; the second and later of equal keys get a number behind theirs."""
    named: dict[str, Mutant] = {}
    counts: dict[str, int] = {}
    for mutant in mutants:
        counts[mutant.key] = counts.get(mutant.key, 0) + 1
        more = f" #{counts[mutant.key]}" if counts[mutant.key] > 1 else ""
        named[mutant.key + more] = mutant
    return named


def _short(text: str) -> str:
    return " ".join(text.split())
