"""What tools/mutate.py makes: wrong edits that are still programs, enough of them, and no stale proof."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from mutants.map_rules import map_mutants
from mutants.mutant import Mutant
from mutants.python_rules import python_mutants
from mutate import ROOT, Section, explained, find_mutants, sections, summary, table

NETWORKS = ("flux_mmdit", "t5", "clip", "autoencoder", "sampling", "unet", "schedulers/uni_pc")
SOURCE = """
EPS = 1e-6
def forward(x, y):
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * (1 + b) - torch.cat([x, y], dim=1) + norm(x, y, causal=True)
"""
MAP = """
[axes]
i = { count = "depth" }
mirror = { reverse = "i" }

[rows]
"a.weight" = "cat(q.weight, k.weight, v.weight)"
"b.weight" = "third_0(qkv.weight)"
"c.weight" = "swap_halves(c.weight)"
"up.{i}.d" = "blocks.{mirror}.d"
"e" = "attn.to_q.weight"
"f" = "attn.to_k.weight"

[pairs.resnet]
"down.0" = "input_blocks.1.0"
"down.1" = "input_blocks.2.0"
"""


@pytest.fixture(scope="module")
def mutants() -> dict[str, Mutant]:
    return find_mutants([])


def edits(found: list[Mutant]) -> set[tuple[str, str, str]]:
    return {(mutant.rule, mutant.before, mutant.after) for mutant in found}


def test_every_rule_finds_its_place_in_a_source(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    found = edits(python_mutants(tmp_path, "net.py"))
    assert {
        ("epsilon x 10", "1e-6", "9.999999999999999e-06"),
        ("order of parts", "a, b", "b, a"),
        ("order of cat", "x, y", "y, x"),
        ("order of arguments", "x, y", "y, x"),
        ("activation", "F.silu", "F.gelu"),
        ("sign", "1 + b", "1 - b"),
        ("product", "F.silu(a) * (1 + b)", "F.silu(a) / (1 + b)"),
        ("flag", "True", "False"),
    } <= found


def test_every_rule_finds_its_place_in_a_map(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MAP)
    found = edits(map_mutants(tmp_path, "m.toml"))
    assert ("order of cat", "cat(q.weight, k.weight, v.weight)", "cat(q.weight, v.weight, k.weight)") in found
    assert ("another third", "third_0(qkv.weight)", "third_1(qkv.weight)") in found
    assert ("no swap_halves", "swap_halves(c.weight)", "c.weight") in found
    assert ("not reversed", "blocks.{mirror}.d", "blocks.{i}.d") in found
    swapped = '"input_blocks.2.0"\n"down.1" = "input_blocks.1.0"'.strip('"')
    assert ("blocks exchanged", swapped) in {(rule, after) for rule, _, after in found}
    (exchanged,) = [mutant for mutant in map_mutants(tmp_path, "m.toml") if mutant.rule == "rows exchanged"]
    exchanged.apply(tmp_path / "m.toml", tmp_path / "after.toml")
    rows = tomllib.loads((tmp_path / "after.toml").read_text())["rows"]
    assert (rows["e"], rows["f"]) == ("attn.to_k.weight", "attn.to_q.weight")


def test_there_are_enough_and_all_are_programs(mutants: dict[str, Mutant], tmp_path: Path) -> None:
    counts = Counter(mutant.file[len("flux_sd/") : -len(".py")] for mutant in mutants.values())
    assert len(mutants) >= 300 and all(counts[network] >= 10 for network in NETWORKS)
    for mutant in mutants.values():
        mutant.apply(ROOT / mutant.file, tmp_path / "mutated")
        text = (tmp_path / "mutated").read_text(encoding="utf-8")
        assert text != (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.key
        (ast.parse if mutant.file.endswith(".py") else tomllib.loads)(text)


def test_every_proof_is_of_a_mutant_that_exists(mutants: dict[str, Mutant]) -> None:
    reasons = explained()
    assert reasons and set(reasons) <= set(mutants)
    assert summary(mutants, {}, 0.0).endswith(f"{len(mutants)} mutants in 0 s")


def test_the_table_has_a_row_for_each_network() -> None:
    text = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    assert all(f"## flux_sd/{network}.py" in text for network in NETWORKS) and "**nothing**" not in text


def test_a_table_that_is_read_back_is_the_same() -> None:
    text = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    assert table(sections(text)) == text
    made = {
        "a.py": Section("| a.py | 2 | 1 | 1 |", ["| 1 | `f` | sign | x | y |", "| 2 | `g` | sign | x | z |"])
    }
    assert sections(table(made)) == made
