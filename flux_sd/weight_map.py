"""Which tensors of a checkpoint make which of our parameters: reads `weights_maps/`, checks, fills. Floor 3.

`plan_load` holds a checkpoint's header against a model on the meta device and either returns a complete plan
or raises with every problem at once, before any tensor is read. `fill` then makes each parameter once, from
slices of the memory map straight into its final place, so that no tensor exists twice. Every operation moves
whole rows (dimension 0) or transposes: that is what `Piece` records and what adapters need to place a delta.

Replaces Candle's `VarBuilder` prefixes and `rename` closures; weights_maps/README.md describes the format.
"""

from __future__ import annotations

import functools
import itertools
import string
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import DTYPES, Checkpoint
from .errors import MissingFileError, WeightMapError

THIRDS = ("third_0", "third_1", "third_2")
OPERATIONS = ("copy", "cat", *THIRDS, "swap_halves", "transpose", "squeeze_1x1", "unsqueeze_1x1")
TITLES = {
    "flux_mmdit": "a FLUX.1 transformer",
    "autoencoder": "an autoencoder (VAE)",
    "clip": "a CLIP text encoder",
    "t5": "a T5 encoder",
}
LISTED_GROUPS = 12  # of problems, in a message; `WeightMapError.problems` has all
LISTED_NAMES = 3  # of tensors, in each group


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

    def __str__(self) -> str:
        made = self.sources[0] if self.operation == "copy" else f"{self.operation}({', '.join(self.sources)})"
        return f"{self.target} <- {made}"


@dataclass(frozen=True)
class Template:
    """A row as written: `{slots}` unfilled, `ways` by preference, each an operation and its sources."""

    target: str
    ways: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Axis:
    """A slot that counts 0 .. n-1, n being a config field (a tuple's length) plus `plus`."""

    field: str
    label: str = ""  # what it counts, in messages; "" for one that only follows another
    plus: int = 0

    def length(self, config: object) -> int:
        value = getattr(config, self.field)
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
    reject: tuple[tuple[str, str], ...]
    ignore: tuple[tuple[str, str], ...]
    axes: Mapping[str, Axis]
    mirrors: Mapping[str, str]  # slot -> the axis that it counts backwards
    words: Mapping[str, tuple[str, ...]]
    templates: tuple[Template, ...]
    hints: tuple[Hint, ...]

    @property
    def name(self) -> str:
        return f"{self.component}.{self.dialect}"

    def expand(
        self, config: object, parameters: Collection[str], have: Collection[str] | None = None
    ) -> dict[str, Row]:
        """our name -> Row, for those `parameters` that a row makes.

        `have` (the file's names) settles which way of a row is taken. Raises WeightMapError when two rows
        make one parameter.
        """
        rows: dict[str, Row] = {}
        for template in self.templates:
            for values in self._assignments(template.target, config):
                target = template.target.format_map(values)
                if target not in parameters:
                    continue  # an optional layer that this model does not have
                if target in rows:
                    raise WeightMapError(f"the map {self.name} makes {target} twice")
                ways = [
                    Row(target, operation, tuple(source.format_map(values) for source in sources))
                    for operation, sources in template.ways
                ]
                present = [row for row in ways if have is not None and all(s in have for s in row.sources)]
                instead = tuple(source for row in ways[1:] for source in row.sources)
                rows[target] = present[0] if present else replace(ways[0], instead=instead)
        return rows

    def ignored(self, name: str) -> str | None:
        """Why a tensor may be left unused, or None."""
        for pattern, reason in self.ignore:
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return reason
        return None

    def counts(self, names: Collection[str]) -> dict[str, int]:
        """config field -> how many a file has, by the largest number at that place; for axes with a label."""
        zeros = dict.fromkeys((*self.axes, *self.mirrors), "0")
        sources = [source for template in self.templates for _, way in template.ways for source in way]
        found: dict[str, int] = {}
        for slot, axis in self.axes.items():
            parts = [source.partition("{" + slot + "}") for source in sources]
            heads = {head.format_map(zeros) for head, at, _ in parts if at and _slots(head) <= zeros.keys()}
            if axis.label and heads:
                found[axis.field] = max(_count(head, names) for head in heads)
        return found

    def _assignments(self, target: str, config: object) -> Iterator[dict[str, str]]:
        """Every filling of a target's slots; a mirror's value follows from its axis."""
        slots = sorted(_slots(target))
        lengths = {slot: self.axes[slot].length(config) for slot in slots if slot in self.axes}
        ranges = [
            [str(i) for i in range(lengths[slot])] if slot in lengths else self.words[slot] for slot in slots
        ]
        for chosen in itertools.product(*ranges):
            values = dict(zip(slots, chosen, strict=True))
            for mirror, axis in self.mirrors.items():
                if axis in values:
                    values[mirror] = str(lengths[axis] - 1 - int(values[axis]))
            yield values


def _slots(template: str) -> set[str]:
    return {slot for _, slot, _, _ in string.Formatter().parse(template) if slot}


def _count(head: str, names: Iterable[str]) -> int:
    numbers = [0]
    for name in names:
        if name.startswith(head):
            number = name[len(head) :].partition(".")[0]
            if number.isdecimal() and len(number) < 6:
                numbers.append(int(number) + 1)
    return max(numbers)


@functools.cache  # the files do not change while a program runs, and every load asks several times
def load_maps() -> tuple[WeightMap, ...]:
    """Every map of the package, sorted by name."""
    files = sorted(maps_folder().glob("*.toml"))
    return tuple(read_map(path) for path in files if path.stem != "recognised")


def read_map(path: Path) -> WeightMap:
    """Reads and checks one map file. Raises WeightMapError that names the file and the row."""
    content = _read_toml(path)
    try:
        weight_map = _parse_map(content)
        _check_map(weight_map)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightMapError(f"the map file {path.name} is not well formed: {error}") from error
    if path.stem != weight_map.name:
        raise WeightMapError(f"the map file {path.name} says that it is {weight_map.name}")
    return weight_map


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightMapError(f"the map file {path.name} cannot be read: {error}") from error


def _parse_map(content: Mapping[str, Any]) -> WeightMap:
    slots = content.get("axes", {}).items()
    rows = [(name, name) for name in content.get("same", ())] + list(content.get("rows", {}).items())
    return WeightMap(
        component=content["component"],
        dialect=content["dialect"],
        about=content["about"],
        probe=tuple(content["probe"]),
        prefixes=tuple(content["prefixes"]),
        reject=tuple((name, what) for name, what in content.get("reject", ())),
        ignore=tuple((pattern, reason) for pattern, reason in content["ignore"]),
        axes={
            slot: Axis(entry["count"], entry.get("label", ""), entry.get("plus", 0))
            for slot, entry in slots
            if "count" in entry
        },
        mirrors={slot: entry["reverse"] for slot, entry in slots if "reverse" in entry},
        words={slot: tuple(words) for slot, words in content.get("words", {}).items()},
        templates=tuple(_parse_row(target, made) for target, made in rows),
        hints=tuple(
            Hint(kind, hint[kind], hint["says"])
            for hint in content.get("hint", ())
            for kind in ("missing", "unexpected", "misshapen")
            if kind in hint
        ),
    )


def _parse_row(target: str, made: str | list[str]) -> Template:
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
    return Template(target, tuple(ways))


def _check_map(weight_map: WeightMap) -> None:
    known = {*weight_map.axes, *weight_map.mirrors, *weight_map.words}
    targets = [template.target for template in weight_map.templates]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"{target!r} has two rows")
    for template in weight_map.templates:
        own = _slots(template.target)
        given = own | {mirror for mirror, axis in weight_map.mirrors.items() if axis in own}
        used = {slot for _, sources in template.ways for source in sources for slot in _slots(source)}
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
    """Every component that a file's tensor names give away; relatives that a map rejects are left out."""
    hits = []
    for weight_map in load_maps() if maps is None else maps:
        for prefix in weight_map.prefixes:
            rejected = any(prefix + name in names for name, _ in weight_map.reject)
            if not rejected and any(prefix + name in names for name in weight_map.probe):
                hits.append(Hit(weight_map, prefix))
    return tuple(hits)


def recognise_other(names: Collection[str]) -> str | None:
    """What a file is that none of our components fits, if it is of a kind listed in recognised.toml."""
    content = _read_toml(maps_folder() / "recognised.toml")
    for kind in content["kind"]:
        if any(prefix + name in names for name in kind.get("any", ()) for prefix in content["prefixes"]):
            return str(kind["what"])
        if any(name.endswith(ending) for ending in kind.get("ends", ()) for name in names):
            return str(kind["what"])
    return None


def find_map(component: str, names: Collection[str], label: str = "the checkpoint") -> tuple[WeightMap, str]:
    """(map, prefix) of `component` in a file with these tensor names; `label` is the file, for messages.

    Raises WeightMapError when none or two fit, saying what the file is where that can be told.
    """
    names = names if isinstance(names, set | frozenset | dict) else frozenset(names)
    maps = load_maps()
    if component not in {weight_map.component for weight_map in maps}:
        raise WeightMapError(f"no file in weights_maps/ is for the component {component!r}")
    hits = identify(names, maps)
    fitting = [hit for hit in hits if hit.map.component == component]
    if len(fitting) > 1:
        found = " and as ".join(map(str, fitting))
        raise WeightMapError(f"{label} can be read as {found}: one of them was expected")
    if fitting:
        return fitting[0].map, fitting[0].prefix
    others = " and ".join(dict.fromkeys(TITLES.get(hit.map.component, str(hit)) for hit in hits))
    known = ", ".join(weight_map.name for weight_map in maps if weight_map.component == component)
    what = TITLES.get(component, component)
    given = others or _rejected(component, names, maps) or recognise_other(names)
    if given:
        raise WeightMapError(f"{label} is {given}, not {what}")
    found = f"its {len(names)} tensors have names of no known layout ({known})"
    raise WeightMapError(f"{label} is not {what}: {found}")


def _rejected(component: str, names: Collection[str], maps: Sequence[WeightMap]) -> str | None:
    return next(
        (what for weight_map in maps if weight_map.component == component
         for prefix in weight_map.prefixes for name, what in weight_map.reject if prefix + name in names),
        None,
    )  # fmt: skip


# the plan: everything that headers can tell ---------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + rows` of a checkpoint tensor, and the row of our parameter they begin at."""

    source: str  # as the checkpoint calls it, prefix included
    first: int
    rows: int
    at: int


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter, its final shape, and the pieces that fill it (of the transpose, where `transposed`)."""

    row: Row
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def target(self) -> str:
        return self.row.target

    @property
    def transposed(self) -> bool:
        return self.row.operation == "transpose"


@dataclass(frozen=True)
class LoadPlan:
    """A load that headers show to be exact: each parameter, where it comes from, and what is left unread."""

    map: WeightMap
    prefix: str
    checkpoint: Checkpoint
    parameters: tuple[PlannedParameter, ...]
    ignored: Mapping[str, str]  # tensor -> reason

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that will be read."""
        sources = {piece.source for parameter in self.parameters for piece in parameter.pieces}
        return sum(self.checkpoint.info(source).nbytes for source in sources)

    @property
    def stored_dtypes(self) -> dict[str, int]:
        """How many of the tensors that will be read are of each stored type."""
        sources = {piece.source for parameter in self.parameters for piece in parameter.pieces}
        counts: dict[str, int] = {}
        for source in sorted(sources):
            dtype = self.checkpoint.info(source).dtype
            counts[dtype] = counts.get(dtype, 0) + 1
        return counts

    def sources_of(self, target: str) -> PlannedParameter:
        """How one of our parameters is made. Raises KeyError for a name that is none."""
        for parameter in self.parameters:
            if parameter.target == target:
                return parameter
        raise KeyError(target)


def place(row: Row, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
    """(shape of the result, its pieces) of a row on sources of these shapes; ValueError says why not."""
    shape, source = shapes[0], row.sources[0]
    rows = shape[0] if shape else 1
    whole = (Piece(source, 0, rows, 0),)
    match row.operation:
        case "copy":
            return shape, whole
        case "cat":
            if any(not other or other[1:] != shape[1:] for other in shapes):
                raise ValueError("the parts differ in more than their rows")
            starts = itertools.accumulate((other[0] for other in shapes), initial=0)
            parts = zip(row.sources, shapes, starts, strict=False)  # `starts` also has the end
            pieces = tuple(Piece(name, 0, other[0], at) for name, other, at in parts)
            return (sum(other[0] for other in shapes), *shape[1:]), pieces
        case "third_0" | "third_1" | "third_2":
            if not shape or rows % 3:
                raise ValueError("the number of rows is no multiple of 3")
            third = rows // 3
            return (third, *shape[1:]), (Piece(source, int(row.operation[-1]) * third, third, 0),)
        case "swap_halves":
            if not shape or rows % 2:
                raise ValueError("the number of rows is odd")
            half = rows // 2
            return shape, (Piece(source, half, half, 0), Piece(source, 0, half, half))
        case "transpose":
            if len(shape) != 2:
                raise ValueError("only a matrix can be transposed")
            return shape[::-1], whole
        case "squeeze_1x1" | "unsqueeze_1x1":
            if len(shape) != 2 and (len(shape) != 4 or shape[2:] != (1, 1)):
                raise ValueError("a matrix or a 1x1 convolution was expected")
            return (shape[:2] if row.operation == "squeeze_1x1" else (*shape[:2], 1, 1)), whole
    raise ValueError(f"unknown operation {row.operation!r}")


@dataclass(frozen=True)
class Problem:
    """One thing that does not fit. `name` is the tensor, without prefix, that groups and hints go by."""

    kind: str  # "missing", "unexpected", "misshapen", "unmapped"
    name: str
    text: str


def plan_load(component: str, module: nn.Module, config: object, checkpoint: Checkpoint) -> LoadPlan:
    """Holds a checkpoint's headers against a model (on meta) and its config; reads no tensor.

    Raises WeightMapError with all problems: parameters without a row; tensors that are missing, left over,
    misshapen, of an integer type, used twice or in part.
    """
    weight_map, prefix = find_map(component, checkpoint.infos.keys(), checkpoint.label)
    plan, problems = compare(weight_map, prefix, module, config, checkpoint)
    if problems:
        raise WeightMapError(report(plan, config, problems), [problem.text for problem in problems])
    return plan


def compare(
    weight_map: WeightMap, prefix: str, module: nn.Module, config: object, checkpoint: Checkpoint
) -> tuple[LoadPlan, list[Problem]]:
    """As `plan_load` for a given map and prefix, returning what can be planned and what is wrong."""
    want = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    have = {name[len(prefix) :] for name in checkpoint.infos if name.startswith(prefix)}
    rows = weight_map.expand(config, want.keys(), have)
    problems = [
        Problem("unmapped", name, f"no row: {weight_map.name} does not make our {name}")
        for name in want
        if name not in rows
    ]
    planned: list[PlannedParameter] = []
    for name in want:
        if name in rows:
            made = _plan_row(rows[name], prefix, want[name], checkpoint, have)
            if isinstance(made, PlannedParameter):
                planned.append(made)
            else:
                problems += made
    wanted = {source for row in rows.values() for source in row.sources}
    problems += _misused(planned, checkpoint)
    ignored, left = _left_over(weight_map, prefix, wanted, checkpoint)
    return LoadPlan(weight_map, prefix, checkpoint, tuple(planned), ignored), problems + left


def _plan_row(
    row: Row, prefix: str, want: tuple[int, ...], checkpoint: Checkpoint, have: Collection[str]
) -> PlannedParameter | list[Problem]:
    missing = [source for source in row.sources if source not in have]
    if missing:
        more = "".join(f" or {prefix}{name}" for name in row.instead)
        more += "" if missing == [row.target] else f" (needed for our {row.target})"
        return [Problem("missing", source, f"missing: {prefix}{source}{more}") for source in missing]
    infos = [checkpoint.info(prefix + source) for source in row.sources]
    for info, source in zip(infos, row.sources, strict=True):
        if not DTYPES[info.dtype].is_floating_point:
            text = f"type: {info.name} is {info.dtype}, a floating-point type was expected"
            return [Problem("misshapen", source, text)]
    shapes = [info.shape for info in infos]
    found = " and ".join(str(list(shape)) for shape in shapes)
    try:
        shape, pieces = place(Row(row.target, row.operation, tuple(info.name for info in infos)), shapes)
    except ValueError as error:
        return [Problem("misshapen", row.target, f"shape: {row} found {found}: {error}")]
    if shape != want:
        names = " and ".join(info.name for info in infos)
        makes = "" if shape == infos[0].shape else f", which makes {list(shape)}"
        text = f"shape: {names} is {found}{makes}; our {row.target} is {list(want)}"
        return [Problem("misshapen", row.target, text)]
    return PlannedParameter(row, want, pieces)


def _misused(planned: Iterable[PlannedParameter], checkpoint: Checkpoint) -> list[Problem]:
    """Rows of a tensor that go to two places, and rows of a tensor in use that go nowhere."""
    uses: dict[str, list[tuple[int, int, str]]] = {}
    for parameter in planned:
        for piece in parameter.pieces:
            span = (piece.first, piece.first + piece.rows, parameter.target)
            uses.setdefault(piece.source, []).append(span)
    problems = []
    for source, spans in uses.items():
        spans.sort()
        for before, after in itertools.pairwise(spans):
            if after[0] < before[1]:
                text = f"used twice: {source} goes to our {before[2]} and to our {after[2]}"
                problems.append(Problem("unmapped", source, text))
        shape = checkpoint.info(source).shape
        rows, used = (shape[0] if shape else 1), sum(end - begin for begin, end, _ in spans)
        if used < rows:
            text = f"used in part: {used} of the {rows} rows of {source}"
            problems.append(Problem("unmapped", source, text))
    return problems


def _left_over(
    weight_map: WeightMap, prefix: str, wanted: Collection[str], checkpoint: Checkpoint
) -> tuple[dict[str, str], list[Problem]]:
    """(tensors ignored with their reasons, problems) among those that no row wants."""
    others = [hit for hit in identify(checkpoint.infos.keys()) if hit.map.component != weight_map.component]
    elsewhere = tuple(hit.prefix for hit in others if hit.prefix)
    ignored: dict[str, str] = {}
    problems = []
    for full in checkpoint.infos:
        name = full[len(prefix) :] if full.startswith(prefix) else full
        if full.startswith(prefix) and name in wanted:
            continue
        reason = weight_map.ignored(name) or weight_map.ignored(full)
        if reason is None and (full.startswith(elsewhere) or any(hit.map.ignored(full) for hit in others)):
            reason = "belongs to another component in the same file"
        if reason is None:
            problems.append(Problem("unexpected", name, f"unexpected: {full}"))
        else:
            ignored[full] = reason
    return ignored, problems


def report(plan: LoadPlan, config: object, problems: Sequence[Problem]) -> str:
    """The message for people: what is wrong in a sentence, then a bounded list grouped by kind and block."""
    weight_map, checkpoint = plan.map, plan.checkpoint
    sentences = _depth_sentences(weight_map, plan.prefix, checkpoint, config)
    told = {(problem.kind, problem.name) for problem in problems}
    sentences += [hint.says for hint in weight_map.hints if (hint.kind, hint.name) in told]
    head = f"{checkpoint.label} does not fit the model ({weight_map.name}): "
    if len(problems) == 1 and not sentences:
        return head + problems[0].text
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.text.partition(":")[0], _block(problem.name)), []).append(problem)
    lines = [head + "; ".join([*sentences, f"{len(problems)} problem" + "s" * (len(problems) > 1)])]
    for (kind, block), members in itertools.islice(groups.items(), LISTED_GROUPS):
        texts = [problem.text.removeprefix(kind + ": ") for problem in members[:LISTED_NAMES]]
        more = f"; and {len(members) - LISTED_NAMES} more" if len(members) > LISTED_NAMES else ""
        lines.append(f"  {kind}, {block} ({len(members)}): {'; '.join(texts)}{more}")
    rest = list(groups.values())[LISTED_GROUPS:]
    if rest:
        lines.append(f"  ... and {sum(map(len, rest))} problems in {len(rest)} more places")
    return "\n".join(lines)


def _depth_sentences(weight_map: WeightMap, prefix: str, checkpoint: Checkpoint, config: object) -> list[str]:
    names = [name[len(prefix) :] for name in checkpoint.infos if name.startswith(prefix)]
    found = weight_map.counts(names)
    axes = {axis.field: axis for axis in weight_map.axes.values() if axis.label}
    return [
        f"the file has {count} {axes[field].label}, the model {axes[field].length(config)}"
        for field, count in found.items()
        if count != axes[field].length(config)
    ]


def _block(name: str) -> str:
    """The part of a name that says which block it is in: up to its first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return "outside the blocks"


# filling --------------------------------------------------------------------------------------------------


def fill(
    module: nn.Module,
    plan: LoadPlan,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    keep_stored: Callable[[str], bool] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter of a model on meta its values, as `dtype` on `device`, without gradients.

    `dtype` None keeps stored types, and so does `keep_stored` for the parameters it says yes to (float32
    where parts differ). `on_tensor(done, total)` runs before each parameter and once at the end; whatever it
    raises stops the load. After any failure the whole module is back on meta. Memory: the parameters and one
    piece.
    """
    total = len(plan.parameters)
    try:
        for done, parameter in enumerate(plan.parameters):
            if on_tensor is not None:
                on_tensor(done, total)
            stored = dtype is None or (keep_stored is not None and keep_stored(parameter.target))
            made = _make(parameter, plan.checkpoint, None if stored else dtype, torch.device(device))
            _assign(module, parameter.target, made)
        _check_filled(module)
        if on_tensor is not None:
            on_tensor(total, total)
    except BaseException:
        for name, tensor in module.state_dict().items():
            _assign(module, name, torch.empty_like(tensor, device="meta"))
        raise


def _make(
    parameter: PlannedParameter, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    """One parameter; `dtype` None for the type its sources are stored in."""
    if dtype is None:
        stored = {DTYPES[checkpoint.info(piece.source).dtype] for piece in parameter.pieces}
        dtype = stored.pop() if len(stored) == 1 else torch.float32
    out = torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.transposed:
        out.copy_(checkpoint.read(parameter.pieces[0].source).t())  # [n, m] -> [m, n]
        return out
    flat = out.view(-1)
    width = out[0].numel() if parameter.shape and parameter.shape[0] else out.numel()  # elements in a row
    for piece in parameter.pieces:
        rows = flat[piece.at * width : (piece.at + piece.rows) * width]
        checkpoint.copy_into(piece.source, rows, start=piece.first * width)
    return out


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _check_filled(module: nn.Module) -> None:
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        names = ", ".join(left[:LISTED_NAMES])
        raise WeightMapError(f"after loading, {len(left)} tensors of the model have no values: {names}", left)
