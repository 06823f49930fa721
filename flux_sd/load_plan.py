"""From a checkpoint's header to a filled network: plan, check, report every problem, fill. Floor 4.

`plan_load` holds the header against a model on the meta device and either returns a complete plan or raises
with every problem at once, before any tensor is read. `fill` then makes each parameter once, from slices of
the memory map straight into its final place, so that no tensor exists twice. `Piece` records which rows land
where, which is also what an adapter needs to place a delta.

Replaces Candle's `VarBuilder` prefixes and `rename` closures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import DTYPES, Checkpoint
from .errors import WeightMapError
from .weight_map import Row, WeightMap, find_map, identify

LISTED_GROUPS = 12  # of problems, in a message; `WeightMapError.problems` has all
LISTED_NAMES = 3  # of tensors, in each group


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
            *starts, end = itertools.accumulate((other[0] for other in shapes), initial=0)
            parts = zip(row.sources, shapes, starts, strict=True)
            return (end, *shape[1:]), tuple(Piece(name, 0, other[0], at) for name, other, at in parts)
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
