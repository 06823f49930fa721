"""Wrong edits of the weight maps that leave every name plausible: parts of a `cat` exchanged, another third,
a forgotten swap, blocks counted from the wrong end, two rows or two blocks that take each other's tensors."""

from __future__ import annotations

import tomllib
from itertools import combinations, pairwise
from pathlib import Path

from mutants.mutant import Mutant

# Names that stand for tensors of one shape: a row that reads one may read the other unnoticed.
TWINS = (
    ("to_q", "to_k"), ("to_k", "to_v"), ("add_q_proj", "add_k_proj"), ("query", "key"), ("key", "value"),
    ("q_proj", "k_proj"), ("k_proj", "v_proj"), ("attn_q", "attn_k"), ("attn_k", "attn_v"), ("wi_0", "wi_1"),
    ("ffn_gate", "ffn_up"), ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"), ("norm1", "norm2"),
    ("layer_norm1", "layer_norm2"), ("attn_norm", "ffn_norm"), ("linear_1", "linear_2"), ("conv1", "conv2"),
    ("norm1", "norm1_context"), ("ff", "ff_context"), ("attn", "attn_context"), ("ln_1", "ln_2"),
    ("block_1", "block_2"), ("layer.0", "layer.1"), ("resnets.0", "resnets.1"), ("to_out", "to_add_out"),
    ("in_layers.0", "out_layers.0"), ("in_layers.2", "out_layers.3"), ("time_embed.0", "time_embed.2"),
    ("label_emb.0.0", "label_emb.0.2"),
)  # fmt: skip


def map_mutants(root: Path, file: str) -> list[Mutant]:
    """Every mutant of one map."""
    text = (root / file).read_text(encoding="utf-8")
    content = tomllib.loads(text)
    found: list[Mutant] = []
    rows = {target: made for target, made in content.get("rows", {}).items() if isinstance(made, str)}
    for target, made in rows.items():
        for rule, after in _operations(made) + _mirrors(made, content.get("axes", {})):
            found.append(_row_mutant(file, text, target, made, after, rule))
    for (one, takes), (two, gives) in combinations(rows.items(), 2):
        if _are_twins(takes, gives):
            found.append(_exchange(file, text, (one, takes), (two, gives), "rows exchanged"))
    for blocks in content.get("pairs", {}).values():
        for one, two in pairwise(blocks.items()):
            found.append(_exchange(file, text, one, two, "blocks exchanged"))
    return found


def _operations(made: str) -> list[tuple[str, str]]:
    """(rule, the mutated expression) for one row that is more than a copy."""
    head, bracket, rest = made.partition("(")
    if not bracket:
        return []
    sources = [part.strip() for part in rest.removesuffix(")").split(",")]
    if head == "cat":
        orders = []
        for i, _ in enumerate(pairwise(sources)):
            swapped = [*sources[:i], sources[i + 1], sources[i], *sources[i + 2 :]]
            orders.append(("order of cat", f"cat({', '.join(swapped)})"))
        return orders
    if head.startswith("third_"):
        other = f"third_{(int(head[-1]) + 1) % 3}"
        return [("another third", f"{other}({sources[0]})")]
    if head in ("swap_halves", "transpose"):
        return [(f"no {head}", sources[0])]
    return []


def _mirrors(made: str, axes: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """Slots that count from the other end, counted from this one."""
    reversed_slots = {slot: axis["reverse"] for slot, axis in axes.items() if "reverse" in axis}
    return [
        ("not reversed", made.replace("{" + slot + "}", "{" + axis + "}"))
        for slot, axis in reversed_slots.items()
        if "{" + slot + "}" in made
    ]


def _are_twins(one: str, two: str) -> bool:
    """Whether two expressions differ in exactly one pair of twin words."""
    return one != two and any(
        _words(one, a).replace("*", b) == two or _words(one, b).replace("*", a) == two for a, b in TWINS
    )


def _words(expression: str, word: str) -> str:
    """The expression with `*` for each `word` that stands between dots or brackets."""
    marked = expression
    for before in ".(":
        for after in ".,)":
            marked = marked.replace(f"{before}{word}{after}", f"{before}*{after}")
    for after in ".,":  # at the beginning
        marked = "*" + marked[len(word) :] if marked.startswith(word + after) else marked
    return marked


def _row_mutant(file: str, text: str, target: str, made: str, after: str, rule: str) -> Mutant:
    start = _place(text, target, made)
    return Mutant(file, _line(text, start), target, rule, start, start + len(made), made, after)


def _exchange(file: str, text: str, one: tuple[str, str], two: tuple[str, str], rule: str) -> Mutant:
    first, second = sorted((_place(text, *row), row[1]) for row in (one, two))
    end = second[0] + len(second[1])
    before = text[first[0] : end]
    between = before[len(first[1]) : second[0] - first[0]]
    after = second[1] + between + first[1]
    where = f"{one[0]} and {two[0]}"
    return Mutant(file, _line(text, first[0]), where, rule, first[0], end, before, after)


def _place(text: str, target: str, made: str) -> int:
    """Where the expression of a row stands."""
    row = next(
        at for quote in (f'"{target}"', target)
        if (at := text.find(f"\n{quote} ")) >= 0 or (at := text.find(f"\n{quote}=")) >= 0
    )  # fmt: skip
    return text.index(f'"{made}"', row + 1 + len(target)) + 1


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
