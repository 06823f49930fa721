"""From one dialect to another: where in a checkpoint the rows of every tensor of another layout lie. Floor 5.

A weight map says how our parameters are made of a file's tensors. Here two maps of a component meet: the one
of the file is read as when loading, the one of the wanted dialect backwards. Every operation moves whole
rows, so the result is a list of row ranges, and rows of packed weights can be moved without decoding them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from .checkpoint import Checkpoint
from .errors import RequestError, WeightMapError
from .load_plan import Piece, PlannedParameter, left_over, lost_scales, place
from .targets import EMBEDDINGS
from .weight_map import TITLES, Hit, Row, WeightMap, find_parts, identify, load_maps, recognise_other

LISTED = 5  # names in a message; WeightMapError.problems has all


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the wanted dialect, and the pieces of the checkpoint that fill it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # of the transpose, where `transposed`
    transposed: bool
    parameters: tuple[str, ...]  # ours, of which it holds rows

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that it is made of, each once."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))


@dataclass(frozen=True)
class Translation:
    """One component of a checkpoint under the names of `wanted`."""

    found: WeightMap
    prefix: str
    wanted: WeightMap
    tensors: tuple[OutputTensor, ...]  # in the order of the checkpoint
    ignored: Mapping[str, str]  # tensors of the checkpoint that are not part of it -> reason


@dataclass(frozen=True)
class Part:
    """Rows `first` to `first + rows` of our parameter, which are theirs from row `at` on."""

    name: str  # theirs
    shape: tuple[int, ...]  # of all of theirs
    parameter: str
    first: int
    rows: int
    at: int
    transposed: bool = False


def translate(
    checkpoint: Checkpoint, component: str | None = None, dialect: str | None = None
) -> Translation:
    """Every tensor of `component` under the names of `dialect` (None: as in the file), without a prefix.

    Reads headers only. What the file lacks, the result lacks; sizes come from the file. Of two of a kind, as
    SDXL's text encoders, `component` names one by its map, such as clip.openclip. Raises RequestError for a
    file of several components where none is chosen and for an unknown dialect; WeightMapError for a
    file of no known layout, for tensors that no row uses, for fp8 that lost its scale, and for a dialect that
    cannot be written.
    """
    found, prefix = _chosen(component or _only_component(checkpoint), checkpoint)
    component = found.component
    wanted = found if dialect is None else _map_of(component, dialect)
    config = _sizes(found, prefix, checkpoint)
    parameters = _parameters(found, prefix, config, checkpoint)
    used = {source for parameter in parameters.values() for source in parameter.row.sources}
    ignored, problems = left_over(found, prefix, used, checkpoint)
    texts = [problem.text for problem in problems]
    embeddings = EMBEDDINGS.get(component, ())
    matrices = [p for p in parameters.values() if len(p.shape) == 2 and not p.target.startswith(embeddings)]
    texts += lost_scales((piece.source for p in matrices for piece in p.pieces), checkpoint).values()
    if texts:
        raise WeightMapError(f"{checkpoint.label} ({found.name}): {_some(texts)}", texts)
    sizes = vars(config) | wanted.counts(parameters.keys(), every=True, ours=True)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    parts = undo_all(wanted, SimpleNamespace(**sizes), shapes)
    order = {name: index for index, name in enumerate(checkpoint.infos)}
    tensors = [_gather(name, group, parameters) for name, group in parts.items()]
    tensors.sort(key=lambda tensor: min((order[source] for source in tensor.sources), default=0))
    return Translation(found, prefix, wanted, tuple(tensors), ignored)


def _some(texts: Collection[str]) -> str:
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return "; ".join(itertools.islice(texts, LISTED)) + more


def _chosen(name: str, checkpoint: Checkpoint) -> tuple[WeightMap, str]:
    """The map of the component called `name`, or the map of that name, and its prefix in the file."""
    component, dot, _ = name.partition(".")
    hits = find_parts(component, checkpoint.infos.keys(), checkpoint.label)
    fitting: list[Hit] = [hit for hit in hits if not dot or hit.map.name == name]
    if len(fitting) != 1:
        there = " and ".join(map(str, hits))
        choices = " or ".join(dict.fromkeys(hit.map.name for hit in hits))
        raise RequestError(f"{checkpoint.label} holds {there}: choose one with --component {choices}")
    return fitting[0].map, fitting[0].prefix


def _only_component(checkpoint: Checkpoint) -> str:
    """The one component of a file."""
    components = list(dict.fromkeys(hit.map.component for hit in identify(checkpoint.infos.keys())))
    if len(components) > 1:
        listed = ", ".join(f"{name} ({TITLES.get(name, name)})" for name in components)
        raise RequestError(
            f"{checkpoint.label} holds several components: {listed}; choose one with --component"
        )
    if not components:
        given = recognise_other(checkpoint.infos.keys())
        if given:
            raise WeightMapError(f"{checkpoint.label} is {given}, which cannot be converted")
        known = ", ".join(weight_map.name for weight_map in load_maps())
        found = f"its {len(checkpoint)} tensors have none of the names of {known}"
        raise WeightMapError(f"{checkpoint.label} is of no known layout: {found}")
    return components[0]


def _map_of(component: str, dialect: str) -> WeightMap:
    known = {
        weight_map.dialect: weight_map for weight_map in load_maps() if weight_map.component == component
    }
    if dialect not in known:
        what = TITLES.get(component, component)
        raise RequestError(f"no dialect of {what} is called {dialect!r}: choose {', '.join(known)}")
    return known[dialect]


def _sizes(found: WeightMap, prefix: str, checkpoint: Checkpoint) -> SimpleNamespace:
    """What the maps ask of a config (numbers of blocks and levels), counted in the file."""
    names = [name[len(prefix) :] for name in checkpoint.infos if name.startswith(prefix)]
    counts = found.counts(names, every=True)
    for what, count in counts.items():
        if count > len(names):  # else a header of one odd name would be expanded to millions of rows
            text = f"its numbers say that {what} is {count}, it has {len(names)} tensors"
            raise WeightMapError(f"{checkpoint.label} ({found.name}): {text}", [text])
    return SimpleNamespace(**counts)


def _parameters(
    found: WeightMap, prefix: str, config: object, checkpoint: Checkpoint
) -> dict[str, PlannedParameter]:
    """our name -> how the file makes it, for every parameter that it has."""
    have = {name[len(prefix) :] for name in checkpoint.infos if name.startswith(prefix)}
    made: dict[str, PlannedParameter] = {}
    for target, row in found.expand(config, None, have).items():
        missing = [prefix + source for source in row.sources if source not in have]
        if len(missing) == len(row.sources):
            continue  # an optional layer that this file does not have
        if missing:
            text = f"missing: {', '.join(missing)} (needed for our {target})"
            raise WeightMapError(f"{checkpoint.label} ({found.name}): {text}", [text])
        infos = [checkpoint.info(prefix + source) for source in row.sources]
        full = Row(target, row.operation, tuple(info.name for info in infos))
        try:
            if not all(info.is_float for info in infos):
                raise ValueError("a floating-point type was expected")
            shape, pieces = place(full, [info.shape for info in infos])
        except ValueError as error:
            stored = " and ".join(f"{info.dtype} {list(info.shape)}" for info in infos)
            raise WeightMapError(f"{checkpoint.label}: {full} found {stored}: {error}") from error
        made[target] = PlannedParameter(row, shape, pieces)
    return made


# rows read backwards ------------------------------------------------------------------------------------


def undo(row: Row, shape: tuple[int, ...], part_rows: int | None = None) -> list[Part]:
    """Where the rows of our parameter of this shape go in the tensors that `row` makes it of.

    `part_rows`: of a cat, the rows of every part but the last (None: equal parts). ValueError says why not.
    """
    rows = shape[0] if shape else 1
    name = row.sources[0]
    match row.operation:
        case "copy" | "conv_1x1" | "either_1x1":
            return [Part(name, shape, row.target, 0, rows, 0)]
        case "cat":
            return _undo_cat(row, shape, part_rows)
        case "third_0" | "third_1" | "third_2":
            whole = (3 * rows, *shape[1:])
            return [Part(name, whole, row.target, 0, rows, int(row.operation[-1]) * rows)]
        case "swap_halves":
            if not shape or rows % 2:
                raise ValueError("the number of rows is odd")
            half = rows // 2
            return [Part(name, shape, row.target, first, half, half - first) for first in (0, half)]
        case "transpose":
            return [Part(name, shape[::-1], row.target, 0, rows, 0, transposed=True)]
        case "squeeze_1x1":
            return [Part(name, (*shape, 1, 1), row.target, 0, rows, 0)]
        case "unsqueeze_1x1":
            return [Part(name, shape[:2], row.target, 0, rows, 0)]
    raise ValueError(f"the operation {row.operation!r} cannot be undone")


def _undo_cat(row: Row, shape: tuple[int, ...], part_rows: int | None) -> list[Part]:
    rows, count = shape[0], len(row.sources)
    if part_rows is None and rows % count:
        raise ValueError(f"{rows} rows cannot be split into {count} equal parts")
    each = rows // count if part_rows is None else part_rows
    last = rows - (count - 1) * each
    if last < 1:
        raise ValueError(f"{rows} rows cannot be split into {count} parts of {each}")
    return [
        Part(name, (size, *shape[1:]), row.target, i * each, size, 0)
        for i, name in enumerate(row.sources)
        for size in [each if i < count - 1 else last]
    ]


def undo_all(
    wanted: WeightMap, config: object, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Part]]:
    """their name -> the parts of it in the order of its rows, for our parameters of these shapes.

    Raises WeightMapError that names the dialect and the row.
    """
    rows = wanted.expand(config, shapes.keys())
    lacking = [name for name in shapes if name not in rows]
    if lacking:
        raise WeightMapError(f"the dialect {wanted.name} has no name for our {_some(lacking)}", lacking)
    parts: dict[str, list[Part]] = {}
    for target, row in rows.items():
        try:
            if row.part_rows and row.part_rows not in shapes:
                raise ValueError(f"the size of its parts is that of {row.part_rows}, which the file lacks")
            undone = undo(row, shapes[target], shapes[row.part_rows][0] if row.part_rows else None)
        except ValueError as error:
            where = f"{row} on {list(shapes[target])}"
            raise WeightMapError(f"the dialect {wanted.name} cannot be written: {where}: {error}") from error
        for part in undone:
            parts.setdefault(part.name, []).append(part)
    for name, group in parts.items():
        group.sort(key=lambda part: part.at)
        if not _is_whole(group):
            made_of = ", ".join(f"rows {p.at} to {p.at + p.rows} ({p.parameter})" for p in group)
            raise WeightMapError(
                f"the dialect {wanted.name} cannot be written: {name} of shape {list(group[0].shape)} "
                f"would be made of {made_of}"
            )
    return parts


def _is_whole(group: list[Part]) -> bool:
    """Whether the parts of one of their tensors, sorted, follow one another without hole or overlap."""
    shape = group[0].shape
    if any(part.shape != shape or part.transposed for part in group):
        return len(group) == 1
    ends = list(itertools.accumulate((part.rows for part in group), initial=0))
    return [part.at for part in group] == ends[:-1] and ends[-1] == (shape[0] if shape else 1)


def _gather(name: str, group: list[Part], parameters: Mapping[str, PlannedParameter]) -> OutputTensor:
    """Follows every row of one of their tensors through our parameter into the checkpoint."""
    pieces: list[Piece] = []
    transposed = group[0].transposed
    for part in group:
        parameter = parameters[part.parameter]
        pieces += _rows_of(parameter, part)
        if parameter.transposed:
            if len(group) > 1 or part.rows != parameter.shape[0]:
                text = f"{name} would be a part of our {part.parameter}, which the file has transposed"
                raise WeightMapError(text)
            transposed = not transposed
    owners = tuple(dict.fromkeys(part.parameter for part in group))
    return OutputTensor(name, group[0].shape, tuple(pieces), transposed, owners)


def _rows_of(parameter: PlannedParameter, part: Part) -> Iterable[Piece]:
    """The pieces of the checkpoint that hold the rows of `part`."""
    end = part.first + part.rows
    for piece in parameter.pieces:
        low, high = max(part.first, piece.at), min(end, piece.at + piece.rows)
        if parameter.transposed:
            yield piece
        elif low < high:
            yield Piece(piece.source, piece.first + low - piece.at, high - low, part.at + low - part.first)
