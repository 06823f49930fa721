"""From a checkpoint's header to a filled network: plan, check, report every problem, fill. Floor 4.

`plan_load` holds the header against a model on the meta device and either returns a complete plan or raises
with every problem at once, before any tensor is read. `fill` then makes each parameter once, from slices of
the memory map straight into its final place, so that no tensor exists twice. Weights that `keep_stored` chose
are not made at all: their layers get the rows as the file has them. `Piece` records which rows land where,
which is also what an adapter needs to place a delta.

Replaces Candle's `VarBuilder` prefixes and `rename` closures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import WeightMapError
from .ggml_types import GGML_TYPES
from .quantized import PackedRows, PackedWeight, QuantizedEmbedding, QuantizedLinear
from .tensor_info import FLOAT8, TensorInfo
from .weight_map import Row, WeightMap, find_kinds, find_parts, identify, of_no_component, several

LISTED_GROUPS = 12  # of problems, in a message; `WeightMapError.problems` has all
LISTED_NAMES = 3  # of tensors, in each group
# When packed weights are decoded: as they are used, row block by row block, or all at once while loading.
Decode = Literal["on_use", "on_load"]
DECODES: tuple[Decode, ...] = ("on_use", "on_load")


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + rows` of a checkpoint tensor, and the row of our parameter they begin at."""

    source: str  # as the checkpoint calls it, prefix included
    first: int
    rows: int
    at: int
    filled: bool = False  # of the base that completes an incomplete checkpoint, not of the checkpoint


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
    base: Checkpoint | None = None  # where pieces marked `filled` are

    def holder(self, piece: Piece) -> Checkpoint:
        """The checkpoint that a piece is read from."""
        if piece.filled and self.base is not None:
            return self.base
        return self.checkpoint

    def info(self, piece: Piece) -> TensorInfo:
        """The tensor that a piece is cut from."""
        return self.holder(piece).info(piece.source)

    def bytes_of(self, parameter: PlannedParameter) -> int:
        """Bytes that make one parameter, as stored."""
        infos = [(piece, self.info(piece)) for piece in parameter.pieces]
        return sum(i.nbytes * piece.rows // max(1, i.shape[0] if i.shape else 1) for piece, i in infos)

    @property
    def files(self) -> tuple[Path, ...]:
        """What will be read."""
        filled = () if self.base is None or not self.filled else self.base.files
        return (*self.checkpoint.files, *filled)

    def release(self) -> None:
        """Gives back the pages of the files, those that packed weights still view included."""
        self.checkpoint.release()
        if self.base is not None:
            self.base.release()

    def close(self) -> None:
        """Closes the files; weights that are views on them stay readable as long as they live."""
        self.checkpoint.close()
        if self.base is not None:
            self.base.close()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that will be read."""
        return sum(self.bytes_of(parameter) for parameter in self.parameters)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the parameters that have a packed type, or a part that has one."""
        packed = [p for p in self.parameters if any(self.info(piece).packed for piece in p.pieces)]
        return sum(self.bytes_of(parameter) for parameter in packed)

    @property
    def stored_dtypes(self) -> dict[str, int]:
        """How many of the tensors that will be read are of each stored type."""
        pieces = [piece for parameter in self.parameters for piece in parameter.pieces]
        sources = {(piece.filled, piece.source): self.info(piece).dtype for piece in pieces}
        counts: dict[str, int] = {}
        for dtype in sources.values():
            counts[dtype] = counts.get(dtype, 0) + 1
        return dict(sorted(counts.items()))

    @property
    def filled(self) -> dict[str, tuple[str, ...]]:
        """Our parameters that the base had to complete, and its tensors that did it."""
        names = {p.target: tuple(q.source for q in p.pieces if q.filled) for p in self.parameters}
        return {target: sources for target, sources in names.items() if sources}

    def sources_of(self, target: str) -> PlannedParameter:
        """How one of our parameters is made. Raises KeyError for a name that is none."""
        for parameter in self.parameters:
            if parameter.target == target:
                return parameter
        raise KeyError(target)


def place(
    row: Row, shapes: Sequence[tuple[int, ...]], want: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
    """(shape of the result, its pieces) of a row on sources of these shapes; ValueError says why not.

    `want`: the shape of our parameter, where it is known; `either_1x1` follows it."""
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
        case "squeeze_1x1" | "unsqueeze_1x1" | "conv_1x1":
            if len(shape) != 2 and (len(shape) != 4 or shape[2:] != (1, 1)):
                raise ValueError("a matrix or a 1x1 convolution was expected")
            return (shape[:2] if row.operation == "squeeze_1x1" else (*shape[:2], 1, 1)), whole
        case "either_1x1":
            same = want is not None and {*shape[2:], *want[2:]} <= {1} and shape[:2] == want[:2]
            return (want if same and want is not None else shape), whole
    raise ValueError(f"unknown operation {row.operation!r}")


@dataclass(frozen=True)
class Problem:
    """One thing that does not fit. `name` is the tensor, without prefix, that groups and hints go by."""

    kind: str  # "missing", "unexpected", "misshapen", "unmapped"
    name: str
    text: str


def plan_load(
    component: str,
    module: nn.Module,
    config: object,
    checkpoint: Checkpoint,
    base: Checkpoint | None = None,
    prefix: str | None = None,
) -> LoadPlan:
    """Holds a checkpoint's headers against a model (on meta) and its config; reads no tensor.

    base: another checkpoint of the component, in any dialect, that gives the tensors this one lacks. prefix:
    which to take, where the checkpoint has several of the component (an SDXL file has two text encoders);
    None: the one whose names and shapes fit. Raises WeightMapError with all problems: parameters without a
    row; tensors that are missing (in both), left over, misshapen, of an integer type, used twice or in part.
    """
    spare = None
    if base is not None:  # what is wrong with it matters only where it is needed
        spare = _nearest(component, module, config, base)[0]
    plan, problems = _nearest(component, module, config, checkpoint, prefix, spare)
    if problems:
        raise WeightMapError(report(plan, config, problems), [problem.text for problem in problems])
    return plan


def _nearest(
    component: str,
    module: nn.Module,
    config: object,
    checkpoint: Checkpoint,
    prefix: str | None = None,
    spare: LoadPlan | None = None,
) -> tuple[LoadPlan, list[Problem]]:
    """`compare` for the component of a checkpoint that fits best; an error where two fit."""
    hits = find_parts(component, checkpoint.infos.keys(), checkpoint.label)
    chosen = [hit for hit in hits if prefix in (None, hit.prefix)]
    if not chosen:
        found = " and ".join(map(str, hits))
        raise WeightMapError(f"{checkpoint.label} holds {found}: nothing stands behind {prefix!r}")
    tried = [compare(hit.map, hit.prefix, module, config, checkpoint, spare) for hit in chosen]
    best = min(tried, key=lambda entry: len(entry[1]))
    if [len(problems) for _, problems in tried].count(len(best[1])) > 1:
        raise several(chosen, checkpoint.label)
    return best


def compare(
    weight_map: WeightMap,
    prefix: str,
    module: nn.Module,
    config: object,
    checkpoint: Checkpoint,
    spare: LoadPlan | None = None,
) -> tuple[LoadPlan, list[Problem]]:
    """As `plan_load` for a given map and prefix, returning what can be planned and what is wrong.

    `spare`: what can be planned of the base."""
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
            if not isinstance(made, PlannedParameter) and spare is not None:
                made = _complete(rows[name], prefix, want[name], checkpoint, have, spare) or made
            if isinstance(made, PlannedParameter):
                planned.append(made)
            else:
                problems += made
    wanted = {source for row in rows.values() for source in row.sources}
    problems += _misused(planned, checkpoint) + _unscaled(planned, module, prefix, checkpoint)
    ignored, left = left_over(weight_map, prefix, wanted, checkpoint)
    base = None if spare is None else spare.checkpoint
    return LoadPlan(weight_map, prefix, checkpoint, tuple(planned), ignored, base), problems + left


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
        if not info.is_float:
            text = f"type: {info.name} is {info.dtype}, a floating-point type was expected"
            return [Problem("misshapen", source, text)]
    shapes = [info.shape for info in infos]
    found = " and ".join(str(list(shape)) for shape in shapes)
    try:
        shape, pieces = place(
            Row(row.target, row.operation, tuple(info.name for info in infos)), shapes, want
        )
    except ValueError as error:
        return [Problem("misshapen", row.target, f"shape: {row} found {found}: {error}")]
    if shape != want:
        names = " and ".join(info.name for info in infos)
        makes = "" if shape == infos[0].shape else f", which makes {list(shape)}"
        text = f"shape: {names} is {found}{makes}; our {row.target} is {list(want)}"
        return [Problem("misshapen", row.target, text)]
    return PlannedParameter(row, want, pieces)


def _complete(
    row: Row,
    prefix: str,
    want: tuple[int, ...],
    checkpoint: Checkpoint,
    have: Collection[str],
    spare: LoadPlan,
) -> PlannedParameter | None:
    """A parameter of which the checkpoint lacks tensors, with the base's rows in their place; None where
    nothing is missing, where the base lacks it too, or where it is unclear which rows are missing."""
    theirs = next((p for p in spare.parameters if p.target == row.target), None)
    present = [source for source in row.sources if source in have]
    if theirs is None or len(present) == len(row.sources):
        return None
    if not present:
        return replace(theirs, pieces=tuple(replace(piece, filled=True) for piece in theirs.pieces))
    sizes = _part_rows(row, prefix, want, checkpoint, spare)
    if sizes is None or theirs.transposed:
        return None
    pieces: list[Piece] = []
    at = 0
    for source, size in zip(row.sources, sizes, strict=True):
        own = [Piece(prefix + source, 0, size, at)]
        pieces += own if source in have else _rows_of(theirs.pieces, at, at + size)
        at += size
    return PlannedParameter(row, want, tuple(pieces))


def _part_rows(
    row: Row, prefix: str, want: tuple[int, ...], checkpoint: Checkpoint, spare: LoadPlan
) -> list[int] | None:
    """Rows of each tensor that a parameter is joined from, missing ones included; None if they do not fit.

    A base of the same dialect tells them; with one of another, a single missing tensor has what is left."""
    own = [checkpoint.infos.get(prefix + source) for source in row.sources]
    theirs = [spare.checkpoint.infos.get(spare.prefix + source) for source in row.sources]
    if any(info is not None and (not info.is_float or info.shape[1:] != want[1:]) for info in own):
        return None
    known = [mine or other for mine, other in zip(own, theirs, strict=True)]
    counts = [info.shape[0] if info is not None and info.shape else 0 for info in known]
    if counts.count(0) == 1:
        counts[counts.index(0)] = want[0] - sum(counts)
    return counts if min(counts) > 0 and sum(counts) == want[0] else None


def _rows_of(pieces: Iterable[Piece], begin: int, end: int) -> list[Piece]:
    """The base's pieces for rows `begin` to `end` of a parameter."""
    cut = []
    for piece in pieces:
        first, last = max(begin, piece.at), min(end, piece.at + piece.rows)
        if first < last:
            cut.append(Piece(piece.source, piece.first + first - piece.at, last - first, first, filled=True))
    return cut


def _misused(planned: Iterable[PlannedParameter], checkpoint: Checkpoint) -> list[Problem]:
    """Rows of a tensor that go to two places, and rows of a tensor in use that go nowhere."""
    uses: dict[str, list[tuple[int, int, str]]] = {}
    for parameter in planned:
        for piece in parameter.pieces:
            if piece.filled:
                continue  # a base may hold more than is wanted of it
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


def _unscaled(
    planned: Iterable[PlannedParameter], module: nn.Module, prefix: str, checkpoint: Checkpoint
) -> list[Problem]:
    """See `lost_scales`; for the linears, since embeddings have no scale in any layout."""
    linears = {f"{path}.weight" for path, layer in module.named_modules() if type(layer) is nn.Linear}
    pieces = [piece for p in planned if p.target in linears for piece in p.pieces if not piece.filled]
    lost = lost_scales((piece.source for piece in pieces), checkpoint)
    return [Problem("missing", name[len(prefix) :], text) for name, text in lost.items()]


def lost_scales(sources: Iterable[str], checkpoint: Checkpoint) -> dict[str, str]:
    """What is wrong, by name, with fp8 weights that lack a scale where others among `sources` have one: their
    values mean nothing, and they would load."""
    fp8 = [info for info in map(checkpoint.info, dict.fromkeys(sources)) if info.dtype in FLOAT8]
    lacking = [info.name for info in fp8 if info.scale is None]
    if len(lacking) == len(fp8):
        return {}
    return {name: f"missing: a scale for the fp8 weight {name}, as others have" for name in lacking}


def left_over(
    weight_map: WeightMap, prefix: str, wanted: Collection[str], checkpoint: Checkpoint
) -> tuple[dict[str, str], list[Problem]]:
    """(tensors ignored with their reasons, problems) among those that no row wants."""
    own = (weight_map.component, prefix)
    others = [hit for hit in identify(checkpoint.infos.keys()) if (hit.map.component, hit.prefix) != own]
    kinds = [other for _, other in find_kinds(checkpoint.infos.keys()) if not prefix.startswith(other)]
    elsewhere = tuple(filter(None, (*(hit.prefix for hit in others), *kinds)))
    ignored: dict[str, str] = {}
    problems = []
    for full in checkpoint.infos:
        name = full[len(prefix) :] if full.startswith(prefix) else full
        if full.startswith(prefix) and name in wanted:
            continue
        reason = weight_map.ignored(name) or weight_map.ignored(full)
        if reason is None and (full.startswith(elsewhere) or any(hit.map.ignored(full) for hit in others)):
            reason = "belongs to another component in the same file"
        reason = reason or of_no_component(full)
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
        groups.setdefault((problem.text.partition(":")[0], block_of(problem.name)), []).append(problem)
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


def block_of(name: str) -> str:
    """The part of a name that says which block it is in: up to its first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return "outside the blocks"


# filling --------------------------------------------------------------------------------------------------


def staying(
    module: nn.Module, plan: LoadPlan, dtype: torch.dtype, everything: bool = False
) -> list[PlannedParameter]:
    """The parameters that can stay as the file has them, to be decoded as they are used in `dtype`.

    They are weights of linears and embeddings, made of whole rows, of a packed type; with `everything`, of
    any type but `dtype`. Norms, biases and convolutions are decoded while loading, whatever their type.
    """
    found = []
    for parameter in plan.parameters:
        path, _, leaf = parameter.target.rpartition(".")
        layer = module.get_submodule(path)
        if leaf != "weight" or parameter.transposed or type(layer) not in (nn.Linear, nn.Embedding):
            continue
        infos = [plan.info(piece) for piece in parameter.pieces]
        whole = all(i.torch_dtype or parameter.shape[1] % GGML_TYPES[i.dtype].block == 0 for i in infos)
        if whole and any(i.packed or (everything and i.torch_dtype != dtype) for i in infos):
            found.append(parameter)
    return found


def keep_stored(module: nn.Module, plan: LoadPlan, dtype: torch.dtype, everything: bool = False) -> None:
    """Swaps the layers of `staying` parameters, on meta, for ones that decode as they compute in `dtype`."""
    for parameter in staying(module, plan, dtype, everything):
        path = parameter.target.rpartition(".")[0]
        layer = module.get_submodule(path)
        parts = []
        for piece in parameter.pieces:
            shape = (piece.rows, parameter.shape[1])
            parts.append(PackedRows(torch.empty(shape, device="meta"), plan.info(piece).dtype, None, shape))
        if isinstance(layer, nn.Linear):
            module.set_submodule(path, QuantizedLinear(parts, layer.bias, dtype))
        else:
            module.set_submodule(path, QuantizedEmbedding(parts, dtype))


def fill(
    module: nn.Module,
    plan: LoadPlan,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    decode: Decode = "on_use",
    on_tensor: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter of a model on meta its values, as `dtype` on `device`, without gradients.

    `dtype` None keeps stored float types (float32 where parts differ and for packed ones). Layers that
    `keep_stored` swapped get their rows as stored: on a CPU as views on the file, which then has to stay as
    it is; `decode` "on_load" decodes them now, for the same results. `on_tensor(done, total)` runs before
    each parameter and once at the end; whatever it raises stops the load. After any failure the whole module
    is back on meta. Memory: the parameters and one piece.
    """
    total, where = len(plan.parameters), torch.device(device)
    try:
        for done, parameter in enumerate(plan.parameters):
            if on_tensor is not None:
                on_tensor(done, total)
            path, _, leaf = parameter.target.rpartition(".")
            owner = module.get_submodule(path)
            if isinstance(owner, QuantizedLinear | QuantizedEmbedding) and leaf == "weight":
                once = owner.dtype if decode == "on_load" else None
                owner.weight = PackedWeight([_take(piece, plan, where, once) for piece in parameter.pieces])
            else:
                _assign(module, parameter.target, _make(parameter, plan, dtype, where))
        _check_filled(module)
        if on_tensor is not None:
            on_tensor(total, total)
    except BaseException:
        for name, tensor in module.state_dict().items():
            _assign(module, name, torch.empty_like(tensor, device="meta"))
        raise


def _take(piece: Piece, plan: LoadPlan, device: torch.device, dtype: torch.dtype | None) -> PackedRows:
    """The rows of one piece as stored, or decoded to `dtype`, on `device`."""
    holder, info = plan.holder(piece), plan.info(piece)
    chosen = slice(piece.first, piece.first + piece.rows)
    data, scale = holder.mapped(piece.source).view(info.shape[0], -1)[chosen], holder.scale(piece.source)
    if info.packed:
        data = data.view(torch.uint8)
    if scale is not None and scale.ndim:
        scale = scale[chosen]
    rows = PackedRows(data, info.dtype, scale, (piece.rows, math.prod(info.shape[1:]))).to(device)
    if dtype is not None:
        rows = rows.decoded(dtype)
    if rows.data.device.type != "cpu" or dtype is not None:
        holder.release(piece.source)
    return rows


def _make(
    parameter: PlannedParameter, plan: LoadPlan, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    """One parameter; `dtype` None for the type its sources are stored in."""
    if dtype is None:
        infos = [plan.info(piece) for piece in parameter.pieces]
        stored = {None if info.scale else info.torch_dtype for info in infos}
        dtype = (stored.pop() if len(stored) == 1 else None) or torch.float32
    out = torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.transposed:
        piece = parameter.pieces[0]
        out.copy_(plan.holder(piece).read(piece.source).t())  # [n, m] -> [m, n]
        return out
    flat = out.view(-1)
    width = out[0].numel() if parameter.shape and parameter.shape[0] else out.numel()  # elements in a row
    for piece in parameter.pieces:
        rows = flat[piece.at * width : (piece.at + piece.rows) * width]
        plan.holder(piece).copy_into(piece.source, rows, start=piece.first * width)
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
