"""Which tensors of a checkpoint make which of our parameters: reads and recognises `weights_maps/`. Floor 3.

A map has one row per family of our parameters. Every operation moves whole rows of a tensor (dimension 0) or
transposes it. `load_plan.py` holds maps against files; weights_maps/README.md describes the format.
"""

from __future__ import annotations

import functools
import itertools
import string
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import MissingFileError, WeightMapError

THIRDS = ("third_0", "third_1", "third_2")
RESHAPES = ("squeeze_1x1", "unsqueeze_1x1", "conv_1x1", "either_1x1")
OPERATIONS = ("copy", "cat", *THIRDS, "swap_halves", "transpose", *RESHAPES)
TITLES = {
    "flux_mmdit": "a FLUX.1 transformer",
    "unet": "a Stable Diffusion UNet",
    "autoencoder": "an autoencoder (VAE)",
    "clip": "a CLIP text encoder",
    "t5": "a T5 encoder",
}


def maps_folder() -> Path:
    """Where the maps are: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "weights_maps", package.parent / "weights_maps"):
        if folder.is_dir():
            return folder
    raise MissingFileError(f"weights_maps/ is neither in {package} nor beside it: install the package again")


# maps and their rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One of our parameters and how to make it: `operation` on `sources` (names without prefix)."""

    target: str
    operation: str
    sources: tuple[str, ...]
    instead: tuple[str, ...] = ()  # tensors that would do in their place
    part_rows: str = ""  # of a cat: our parameter with as many rows as each part but the last; "": equal

    def __str__(self) -> str:
        made = self.sources[0] if self.operation == "copy" else f"{self.operation}({', '.join(self.sources)})"
        return f"{self.target} <- {made}"


@dataclass(frozen=True)
class Template:
    """A row as written: `{slots}` unfilled, `ways` by preference, each an operation and its sources."""

    target: str
    ways: tuple[tuple[str, tuple[str, ...]], ...]
    part_rows: str = ""  # as in Row


@dataclass(frozen=True)
class Axis:
    """A slot that counts 0 .. n-1, n being a config field (a tuple's length) plus `plus`; or, where it is
    `largest`, the largest number in several fields."""

    fields: tuple[str, ...]
    label: str = ""  # what it counts, in messages; "" for one that only follows another
    plus: int = 0
    largest: bool = False

    @property
    def field(self) -> str:
        return self.fields[0]

    def length(self, config: object) -> int:
        values = [getattr(config, field) for field in self.fields]
        if self.largest:
            return max(max(value) if isinstance(value, tuple | list) else int(value) for value in values)
        (value,) = values
        return (len(value) if isinstance(value, tuple | list) else int(value)) + self.plus


@dataclass(frozen=True)
class Hint:
    """A sentence for the reader when the tensor `name` has a problem of this `kind`."""

    kind: str  # "missing", "unexpected" or "misshapen"
    name: str
    says: str


@dataclass(frozen=True)
class WeightMap:
    """One file of `weights_maps/`: a component's names in one dialect."""

    component: str
    dialect: str
    about: str
    probe: tuple[str, ...]
    prefixes: tuple[str, ...]
    ignore: tuple[tuple[str, str], ...]
    axes: Mapping[str, Axis]
    mirrors: Mapping[str, str]  # slot -> the axis that it counts backwards
    words: Mapping[str, tuple[str, ...]]
    pairs: Mapping[str, Mapping[str, str]]  # slot -> what we write there, and what they write instead
    templates: tuple[Template, ...]
    hints: tuple[Hint, ...]

    @property
    def name(self) -> str:
        return f"{self.component}.{self.dialect}"

    def expand(
        self, config: object, parameters: Collection[str] | None, have: Collection[str] | None = None
    ) -> dict[str, Row]:
        """our name -> Row, for those `parameters` that a row makes (None: for all that the config allows).

        `have` (the file's names) settles which way of a row is taken. Raises WeightMapError when two rows
        make one parameter.
        """
        rows: dict[str, Row] = {}
        for template in self.templates:
            for ours, theirs in self.spellings(template.target, config):
                target = template.target.format_map(ours)
                if parameters is not None and target not in parameters:
                    continue  # an optional layer that this model does not have
                if target in rows:
                    raise WeightMapError(f"the map {self.name} makes {target} twice")
                part_rows = template.part_rows.format_map(ours)
                ways = [
                    Row(target, operation, tuple(s.format_map(theirs) for s in sources), (), part_rows)
                    for operation, sources in template.ways
                ]
                present = [row for row in ways if have is not None and all(s in have for s in row.sources)]
                instead = tuple(source for row in ways[1:] for source in row.sources)
                rows[target] = present[0] if present else replace(ways[0], instead=instead)
        return rows

    def ignored(self, name: str) -> str | None:
        """Why a tensor may be left unused, or None."""
        return _reason(self.ignore, name)

    def counts(self, names: Collection[str], every: bool = False, ours: bool = False) -> dict[str, int]:
        """config field -> how many a file has, by the largest number at that place; for axes with a label,
        or for `every` one. Tensors that are ignored do not count. ours: `names` are our parameters'."""
        sources = [source for template in self.templates for _, way in template.ways for source in way]
        if ours:
            sources = [template.target for template in self.templates]
        numbered = _numbered(name for name in names if self.ignored(name) is None)
        found: dict[str, int] = {}
        for slot, axis in self.axes.items():
            if not (axis.label or (every and axis.largest)):
                continue
            parts = [source.partition("{" + slot + "}") for source in sources]
            heads = {head for head, at, _ in parts if at}
            places = {
                zeroed(head.format_map(spelling[0 if ours else 1]).removesuffix("."))
                for head in heads
                for spelling in self.spellings(head)
            }
            if places:
                found |= dict.fromkeys(axis.fields, max(numbered.get(place, 0) for place in places))
        return found

    def spellings(
        self, template: str, config: object | None = None
    ) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        """Every filling of a template's slots: (as we write it, as they do). Without a config every axis
        stands at 0. A mirror's value follows from its axis."""
        slots = sorted(_slots(template) - self.mirrors.keys())
        asked = self.axes.keys() & {*slots, *self.mirrors.values()}
        lengths = {slot: 1 if config is None else self.axes[slot].length(config) for slot in asked}
        for chosen in itertools.product(*(self._choices(slot, lengths) for slot in slots)):
            ours = {slot: pair[0] for slot, pair in zip(slots, chosen, strict=True)}
            theirs = {slot: pair[1] for slot, pair in zip(slots, chosen, strict=True)}
            for mirror, axis in self.mirrors.items():
                ours[mirror] = theirs[mirror] = str(lengths[axis] - 1 - int(ours.get(axis, 0)))
            yield ours, theirs

    def _choices(self, slot: str, lengths: Mapping[str, int]) -> list[tuple[str, str]]:
        """What a slot can be, each as we and as they write it."""
        if slot in self.pairs:
            return list(self.pairs[slot].items())
        words = self.words[slot] if slot in self.words else map(str, range(lengths[slot]))
        return [(word, word) for word in words]


def _reason(patterns: Iterable[tuple[str, str]], name: str) -> str | None:
    for pattern, reason in patterns:
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def _slots(template: str) -> set[str]:
    return {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """What stands before a number in names, numbers in it as 0 -> the largest such number, plus one."""
    largest: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal() and len(part) < 6:
                place = zeroed(".".join(parts[:at]))
                largest[place] = max(largest.get(place, 0), int(part) + 1)
    return largest


def zeroed(name: str) -> str:
    """A name with every number in it at 0."""
    return ".".join("0" if part.isdecimal() else part for part in name.split("."))


@functools.cache  # the files do not change while a program runs, and every load asks several times
def load_maps() -> tuple[WeightMap, ...]:
    """Every map of the package, sorted by name."""
    return tuple(read_map(path) for path in sorted(maps_folder().glob("*.*.toml")))


def read_map(path: Path) -> WeightMap:
    """Reads and checks one map file. Raises WeightMapError that names the file and the row."""
    content = read_toml(path)
    try:
        weight_map = _parse_map(content)
        _check_map(weight_map)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightMapError(f"the map file {path.name} is not well formed: {error}") from error
    if path.stem != weight_map.name:
        raise WeightMapError(f"the map file {path.name} says that it is {weight_map.name}")
    return weight_map


def read_toml(path: Path) -> dict[str, Any]:
    """One file of weights_maps/. Raises WeightMapError that names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightMapError(f"the map file {path.name} cannot be read: {error}") from error


def _parse_map(content: Mapping[str, Any]) -> WeightMap:
    slots = content.get("axes", {}).items()
    rows = [(name, name) for name in content.get("same", ())] + list(content.get("rows", {}).items())
    part_rows = content.get("part_rows", {})
    if not part_rows.keys() <= dict(rows).keys():
        raise ValueError(
            f"part_rows is given for {sorted(part_rows.keys() - dict(rows).keys())}: no such row"
        )
    return WeightMap(
        component=content["component"],
        dialect=content["dialect"],
        about=content["about"],
        probe=tuple(content["probe"]),
        prefixes=tuple(content["prefixes"]),
        ignore=tuple((pattern, reason) for pattern, reason in content["ignore"]),
        axes={slot: _parse_axis(entry) for slot, entry in slots if "reverse" not in entry},
        mirrors={slot: entry["reverse"] for slot, entry in slots if "reverse" in entry},
        words={slot: tuple(words) for slot, words in content.get("words", {}).items()},
        pairs={slot: dict(pairs) for slot, pairs in content.get("pairs", {}).items()},
        templates=tuple(_parse_row(target, made, part_rows.get(target, "")) for target, made in rows),
        hints=tuple(
            Hint(kind, hint[kind], hint["says"])
            for hint in content.get("hint", ())
            for kind in ("missing", "unexpected", "misshapen")
            if kind in hint
        ),
    )


def _parse_axis(entry: Mapping[str, Any]) -> Axis:
    if "largest" in entry:
        return Axis(tuple(entry["largest"]), largest=True)
    return Axis((entry["count"],), entry.get("label", ""), entry.get("plus", 0))


def _parse_row(target: str, made: str | list[str], part_rows: str) -> Template:
    ways: list[tuple[str, tuple[str, ...]]] = []
    for text in [made] if isinstance(made, str) else made:
        head, bracket, rest = text.partition("(")
        if not bracket:
            ways.append(("copy", (text,)))
            continue
        if head not in OPERATIONS or not rest.endswith(")"):
            raise ValueError(f"{text!r} is no operation of {', '.join(OPERATIONS)}")
        sources = tuple(part.strip() for part in rest[:-1].split(","))
        if head != "cat" and len(sources) != 1:
            raise ValueError(f"{text!r}: {head} takes one tensor")
        ways.append((head, sources))
    return Template(target, tuple(ways), part_rows)


def _check_map(weight_map: WeightMap) -> None:
    slots = [*weight_map.axes, *weight_map.mirrors, *weight_map.words, *weight_map.pairs]
    known = set(slots)
    if len(known) < len(slots):
        raise ValueError("a slot is declared twice")
    targets = [template.target for template in weight_map.templates]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"{target!r} has two rows")
    for template in weight_map.templates:
        own = _slots(template.target)
        given = own | {mirror for mirror, axis in weight_map.mirrors.items() if axis in own}
        used = {slot for _, sources in template.ways for source in sources for slot in _slots(source)}
        used |= _slots(template.part_rows)
        if not own <= known - set(weight_map.mirrors) or not used <= given:
            raise ValueError(f"{template.target!r} uses a slot that is not declared or not on its left side")


# which map a file needs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """A component found in a file: its map, and what stands before every name."""

    map: WeightMap
    prefix: str

    def __str__(self) -> str:
        return self.map.name + (f" behind {self.prefix!r}" if self.prefix else "")


def identify(names: Collection[str], maps: Sequence[WeightMap] | None = None) -> tuple[Hit, ...]:
    """Every component of ours that a file's tensor names give away.

    Files of the kinds in recognised.toml are left out where their names would pass for a component: an
    adapter that carries a model's tensors, a relative of FLUX.1.
    """
    kinds = find_kinds(names)
    if any(kind.whole for kind, _ in kinds):
        return ()
    others = {(kind.unlike, prefix) for kind, prefix in kinds}
    return tuple(
        Hit(weight_map, prefix)
        for weight_map in (load_maps() if maps is None else maps)
        for prefix in weight_map.prefixes
        if any(prefix + name in names for name in weight_map.probe)
        and (weight_map.component, prefix) not in others
    )


@dataclass(frozen=True)
class Kind:
    """A component that no map loads, or an adapter, as recognised.toml describes it."""

    what: str
    component: str
    dialect: str
    any: tuple[str, ...]
    all: tuple[str, ...]
    none: tuple[str, ...]
    ends: tuple[str, ...]
    beside: tuple[str, ...]
    unlike: str
    prefixes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether it makes the whole file what it is."""
        return self.component == "adapter"

    def prefix(self, names: Collection[str]) -> str | None:
        """What stands before the names of this kind in a file, None for a file that has none of it."""
        if self.ends and any(name.endswith(self.ends) for name in names):
            return ""
        if self.beside and not any(name in names for name in self.beside):
            return None
        for prefix in self.prefixes:
            if any(prefix + name in names for name in self.any) and all(
                (prefix + name in names) == wanted
                for group, wanted in ((self.all, True), (self.none, False))
                for name in group
            ):
                return prefix
        return None


@functools.cache  # as load_maps
def load_kinds() -> tuple[Kind, ...]:
    """Every kind of recognised.toml, in its order. Raises WeightMapError."""
    content = read_toml(maps_folder() / "recognised.toml")
    try:
        return tuple(_parse_kind(entry, content["prefixes"]) for entry in content["kind"])
    except (KeyError, TypeError) as error:
        raise WeightMapError(f"the file recognised.toml is not well formed: {error}") from error


def _parse_kind(entry: Mapping[str, Any], prefixes: Sequence[str]) -> Kind:
    unknown = entry.keys() - {field.name for field in fields(Kind)}
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    lists = ("any", "all", "none", "ends", "beside")
    some, each, none, ends, beside = (tuple(entry.get(key, ())) for key in lists)
    dialect, unlike = (str(entry.get(key, "")) for key in ("dialect", "unlike"))
    behind = tuple(entry.get("prefixes", prefixes))
    return Kind(entry["what"], entry["component"], dialect, some, each, none, ends, beside, unlike, behind)


def find_kinds(names: Collection[str]) -> tuple[tuple[Kind, str], ...]:
    """(kind, prefix) of whatever in a file is of a kind in recognised.toml: the first that fits a prefix."""
    names = names if isinstance(names, set | frozenset | dict) else frozenset(names)
    found: dict[str, Kind] = {}
    for kind in load_kinds():
        prefix = kind.prefix(names)
        if prefix is None:
            continue
        if kind.whole:
            return ((kind, prefix),)
        found.setdefault(prefix, kind)
    return tuple((kind, prefix) for prefix, kind in found.items())


@functools.cache  # as load_maps
def _leftovers() -> tuple[tuple[str, str], ...]:
    leftovers = read_toml(maps_folder() / "recognised.toml")["leftovers"]
    return tuple((pattern, reason) for pattern, reason in leftovers)


def of_no_component(name: str) -> str | None:
    """Why a file of several components may hold this tensor although it is of none of them, or None."""
    return _reason(_leftovers(), name)


def recognise_other(names: Collection[str]) -> str | None:
    """What a file is that none of our components fits, if it is of a kind listed in recognised.toml."""
    return " and ".join(dict.fromkeys(kind.what for kind, _ in find_kinds(names))) or None


def find_map(component: str, names: Collection[str], label: str = "the checkpoint") -> tuple[WeightMap, str]:
    """(map, prefix) of `component` in a file with these tensor names; `label` is the file, for messages.

    Raises WeightMapError when none or two fit, saying what the file is where that can be told.
    """
    hits = find_parts(component, names, label)
    if len(hits) > 1:
        raise several(hits, label)
    return hits[0].map, hits[0].prefix


def several(hits: Sequence[Hit], label: str) -> WeightMapError:
    """The error for a file in which one component was looked for and several were found."""
    found = " and as ".join(map(str, hits))
    return WeightMapError(f"{label} can be read as {found}: one of them was expected")


def find_parts(component: str, names: Collection[str], label: str = "the checkpoint") -> tuple[Hit, ...]:
    """As `find_map`, for files that may hold several of a component, as SDXL's do text encoders: all."""
    names = names if isinstance(names, set | frozenset | dict) else frozenset(names)
    maps = load_maps()
    if component not in {weight_map.component for weight_map in maps}:
        raise WeightMapError(f"no file in weights_maps/ is for the component {component!r}")
    hits = identify(names, maps)
    fitting = tuple(hit for hit in hits if hit.map.component == component)
    if fitting:
        return fitting
    others = " and ".join(dict.fromkeys(TITLES.get(hit.map.component, str(hit)) for hit in hits))
    known = ", ".join(weight_map.name for weight_map in maps if weight_map.component == component)
    what = TITLES.get(component, component)
    given = others or recognise_other(names)
    if given:
        raise WeightMapError(f"{label} is {given}, not {what}")
    found = f"its {len(names)} tensors have names of no known layout ({known})"
    raise WeightMapError(f"{label} is not {what}: {found}")
