"""What a file holds, told by its header: components, families, variants, whose names, types, bytes. Floor 4.

Names decide what a component is (the maps, and `weights_maps/recognised.toml` for what no map loads), shapes
which of its family it is (`weights_maps/facts.toml`). No file name is looked at, and no tensor is read.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint
from .errors import WeightMapError
from .tensor_info import FLOAT8, TensorInfo
from .weight_map import (
    TITLES,
    Hit,
    Kind,
    WeightMap,
    find_kinds,
    identify,
    load_maps,
    maps_folder,
    read_toml,
    zeroed,
)

OTHER = "other"  # tensors of no component that is known


@dataclass(frozen=True)
class Found:
    """One component of a file."""

    component: str  # as weights_maps/ calls it: "flux_mmdit", or a kind of recognised.toml: "unet", "adapter"
    what: str  # the same in words, with an article
    family: str
    variant: str
    dialect: str  # whose names the tensors have
    prefix: str  # what stands before each of them
    map: WeightMap | None  # None for what no map loads
    sizes: Mapping[str, int]  # what shapes say; where there is a map, by the fields of our config
    dtypes: Mapping[str, int]  # type as stored -> number of tensors
    bytes: int  # as stored
    names: tuple[str, ...]  # of its tensors, prefix included
    packing: str  # "" for plain numbers

    @property
    def tensors(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        more = [text for text in (self.family, self.variant) if text and text not in self.what]
        return ", ".join([self.what, *more])


def sniff(checkpoint: Checkpoint) -> tuple[Found, ...]:
    """Every component of a checkpoint, in the order of the file; tensors of none come last, as "other"."""
    return sniff_header(checkpoint.infos)


def sniff_header(infos: Mapping[str, TensorInfo]) -> tuple[Found, ...]:
    """As `sniff`, for a header of which no checkpoint can be made: packings that are not read."""
    names = infos.keys()
    parts: list[Hit | tuple[Kind, str]] = [*identify(names), *find_kinds(names)]
    owned: dict[int, list[str]] = {}
    for name in names:
        owned.setdefault(_owner(name, parts), []).append(name)
    found = []
    for index, own in owned.items():
        if index >= 0:
            found.append(_describe(parts[index], {name: infos[name] for name in own}, names))
    left = {name: infos[name] for name in owned.get(-1, ())}
    if left:
        what = "tensors of no known component"
        found.append(Found(OTHER, what, "", "", "", "", None, {}, *_totals(left.values()), tuple(left), ""))
    return tuple(found)


def _prefix(part: Hit | tuple[Kind, str]) -> str:
    return part.prefix if isinstance(part, Hit) else part[1]


def _owner(name: str, parts: Sequence[Hit | tuple[Kind, str]]) -> int:
    """Which part a tensor belongs to, -1 for none: that of the longest prefix; of several with the same
    prefix the one whose map knows the name, else the one without a map."""
    fitting = [index for index, part in enumerate(parts) if name.startswith(_prefix(part))]
    if not fitting:
        return -1
    longest = max(len(_prefix(parts[index])) for index in fitting)
    nearest = [index for index in fitting if len(_prefix(parts[index])) == longest]
    if len(nearest) == 1:
        return nearest[0]
    for index in nearest:
        part = parts[index]
        if isinstance(part, Hit) and zeroed(name[longest:]) in _vocabulary(part.map.name):
            return index
    return next((index for index in nearest if not isinstance(parts[index], Hit)), -1)


def _totals(infos: Iterable[TensorInfo]) -> tuple[dict[str, int], int]:
    """(type -> number of tensors, most first; bytes)"""
    counts: Counter[str] = Counter()
    total = 0
    for info in infos:
        counts[info.dtype] += 1
        total += info.nbytes
    return dict(counts.most_common()), total


def _describe(
    part: Hit | tuple[Kind, str], infos: Mapping[str, TensorInfo], in_file: Collection[str]
) -> Found:
    """One part with its tensors; marks of the training may stand in the file without the part's prefix."""
    prefix = _prefix(part)
    bare = {name[len(prefix) :]: info for name, info in infos.items()}
    if isinstance(part, Hit):
        component, dialect, weight_map = part.map.component, part.map.dialect, part.map
        what = TITLES.get(component, component)
        sizes = weight_map.counts(bare) | _sizes(component, bare, _first_rows(weight_map.name))
    else:
        component, dialect, weight_map = part[0].component, part[0].dialect, None
        what, sizes = part[0].what, _sizes(component, bare, {})
    holding = [fact for fact in load_facts() if fact.of == component and fact.holds(bare, sizes, in_file)]
    family = next((fact.family for fact in holding if fact.family), "")
    variants = [fact.variant.format_map(sizes) for fact in holding if fact.variant]
    return Found(
        component, what, family, ", ".join(variants), dialect, prefix, weight_map,
        sizes, *_totals(infos.values()), tuple(infos), _packing(infos.values()),
    )  # fmt: skip


def _packing(infos: Iterable[TensorInfo]) -> str:
    kinds = set()
    for info in infos:
        if info.torch_dtype is None:
            kinds.add("GGML blocks")
        elif info.dtype in FLOAT8:
            kinds.add("fp8 with scales" if info.scale else "fp8")
    return " and ".join(sorted(kinds))


# facts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One [[fact]] of facts.toml: what may be said of a component where every test holds."""

    of: str
    family: str
    variant: str
    when: Mapping[str, int | str]
    has: tuple[str, ...]
    starts: tuple[str, ...]
    ends: tuple[str, ...]

    def holds(self, names: Collection[str], sizes: Mapping[str, int], in_file: Collection[str] = ()) -> bool:
        """Whether it is true of a component with these tensor names (without prefix) and sizes, in a file
        with these names."""
        return (
            all(size in sizes and _is(sizes[size], wanted) for size, wanted in self.when.items())
            and (not self.has or any(name in names or name in in_file for name in self.has))
            and (not self.starts or any(name.startswith(self.starts) for name in names))
            and (not self.ends or any(name.endswith(self.ends) for name in names))
        )


def _is(value: int, wanted: int | str) -> bool:
    return value < int(wanted.removeprefix("<")) if isinstance(wanted, str) else value == wanted


@functools.cache  # the file does not change while a program runs
def _facts_file() -> Mapping[str, Any]:
    return read_toml(maps_folder() / "facts.toml")


@functools.cache  # as _facts_file
def load_facts() -> tuple[Fact, ...]:
    """Every fact of facts.toml, in its order. Raises WeightMapError."""
    return tuple(_parse_fact(entry) for entry in _facts_file()["fact"])


def _parse_fact(entry: Mapping[str, Any]) -> Fact:
    unknown = entry.keys() - {"of", "family", "variant", "when", "has", "starts", "ends"}
    if unknown or "of" not in entry:
        raise WeightMapError(f"facts.toml has an entry that is not well formed: {dict(entry)}")
    has, starts, ends = (tuple(entry.get(key, ())) for key in ("has", "starts", "ends"))
    texts = entry.get("family", ""), entry.get("variant", "")
    return Fact(entry["of"], *texts, entry.get("when", {}), has, starts, ends)


def _sizes(
    component: str, infos: Mapping[str, TensorInfo], ours: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
    """What facts.toml wants to know of a component; `ours` leads from our names to those of the file."""
    found: dict[str, int] = {}
    for size, places in _facts_file()["sizes"].get(component, {}).items():
        for wanted, *axis in places:
            info = _lookup(wanted, infos, ours)
            if not axis:
                found[size] = int(info is not None)
            elif info is not None and len(info.shape) > axis[0]:
                found[size] = info.shape[axis[0]]
            if info is not None:
                break
    return found


def _lookup(
    wanted: str, infos: Mapping[str, TensorInfo], ours: Mapping[str, tuple[str, ...]]
) -> TensorInfo | None:
    if wanted.startswith("*"):
        return next((info for name, info in infos.items() if name.endswith(wanted[1:])), None)
    return next((infos[name] for name in ours.get(wanted, (wanted,)) if name in infos), None)


# the names of a map ---------------------------------------------------------------------------------------


@functools.cache  # the maps do not change while a program runs
def _first_rows(map_name: str) -> Mapping[str, tuple[str, ...]]:
    """our name -> the file's names that may make it, with every count of blocks at 0."""
    weight_map = next(known for known in load_maps() if known.name == map_name)
    rows: dict[str, tuple[str, ...]] = {}
    for template in weight_map.templates:
        for ours, theirs in weight_map.spellings(template.target):
            sources = (source for _, way in template.ways for source in way)
            rows[template.target.format_map(ours)] = tuple(source.format_map(theirs) for source in sources)
    return rows


@functools.cache  # as _first_rows
def _vocabulary(map_name: str) -> frozenset[str]:
    """Every name that a map reads, with all numbers at 0."""
    return frozenset(zeroed(name) for sources in _first_rows(map_name).values() for name in sources)
