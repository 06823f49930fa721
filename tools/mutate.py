"""Breaks the networks one edit at a time and sees that the golden tests notice.

    python tools/mutate.py [--only WORD ...] [--jobs 2] [--list]

Mutants are made by rule (tools/mutants/): every epsilon x 10, every + and - of a computation, every
activation, every order of parts, arguments and `cat`, and in the weight maps every `cat`, third, swap,
reversed count, and pair of rows or blocks that could take each other's tensors. Each runs in a copy of the
project against the golden tests of its file (TESTS). The table goes to docs/mutants.md; with --only, that of
the files named, and the others' stay as they are. Exit code 1 if a mutant survives that
mutants/equivalent.toml does not explain, or if an explanation there is of no survivor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mutants.map_rules import map_mutants
from mutants.mutant import Mutant, numbered
from mutants.python_rules import python_mutants
from mutants.runner import Outcome, run_all

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "mutants.md"
EQUIVALENT = ROOT / "tools" / "mutants" / "equivalent.toml"
ORACLE = "tests/test_oracle.py"
FLUX = ("tests/test_golden_flux.py", ORACLE)
EDITING = "tests/test_flux_editing.py"
EVERY = (
    *FLUX,
    "tests/test_golden_t5.py",
    "tests/test_golden_clip.py",
    "tests/test_golden_autoencoder.py",
    "tests/test_golden_unet.py",
)
UNETS = tuple(
    f"{ORACLE}::test_networks_agree[unet_{kind}]" for kind in ("sdxl", "sd15", "sd21", "inpaint", "small")
)
SAMPLERS = ("tests/test_golden_schedulers.py", "tests/test_schedulers.py")
SCHEDULERS = (
    "noise", "spacing", "levels", "prediction", "ddim", "ddpm", "euler", "euler_ancestral",
    "dpm_solver_multistep", "uni_pc", "lcm", "sampler",
)  # fmt: skip
# file -> the tests that must notice a mutant of it, quickest first
TESTS: dict[str, tuple[str, ...]] = {
    "flux_sd/flux_mmdit.py": FLUX,
    "flux_sd/t5.py": ("tests/test_golden_t5.py", ORACLE, "tests/test_networks.py"),
    "flux_sd/clip.py": ("tests/test_golden_clip.py", ORACLE),
    "flux_sd/autoencoder.py": ("tests/test_golden_autoencoder.py", ORACLE),
    "flux_sd/sampling.py": ("tests/test_golden_sampling.py", "tests/test_sampling.py", EDITING, ORACLE),
    "flux_sd/flux_editing.py": (EDITING,),
    "flux_sd/ops.py": EVERY,
    "flux_sd/unet.py": (*UNETS, "tests/test_golden_unet.py"),
    **{f"flux_sd/schedulers/{name}.py": SAMPLERS for name in SCHEDULERS},
    "flux_sd/gguf_dequant.py": ("tests/test_gguf_dequant.py",),
}
MAP_TESTS = ("tests/test_map_values.py", "tests/test_weight_maps.py")
PAIRED = ("tests/test_sd_maps.py::test_names_are_paired_as_diffusers_pairs_them",)
TESTS_OF_MAPS: dict[str, tuple[str, ...]] = {
    "weights_maps/unet.ldm_sd.toml": PAIRED,
    "weights_maps/unet.ldm_xl.toml": PAIRED,
    "weights_maps/clip.openclip.toml": (
        "tests/test_sd_maps.py::test_rows_of_openclip_go_where_diffusers_puts_them",
    ),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="files whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name the mutants and run none")
    parser.add_argument("--results", type=Path, help="keep outcomes in this JSON file, and go on from it")
    arguments = parser.parse_args()
    mutants = find_mutants(arguments.only)
    if arguments.list:
        print(*mutants, sep="\n")
        sys.exit(0)
    start = time.monotonic()
    outcomes = run(mutants, arguments.jobs, arguments.results)
    reasons = explained()
    survivors = [key for key, outcome in outcomes.items() if outcome.survived]
    unexplained = [key for key in survivors if key not in reasons]
    stale = [key for key in reasons if key in outcomes and not outcomes[key].survived]
    stale += [key for key in reasons if not arguments.only and key not in outcomes]
    print(summary(mutants, outcomes, time.monotonic() - start))
    print(*(f"survived: {key}" for key in unexplained), *(f"no survivor: {key}" for key in stale), sep="\n")
    TABLE.parent.mkdir(exist_ok=True)
    before = sections(TABLE.read_text(encoding="utf-8")) if TABLE.exists() and arguments.only else {}
    found = {**before, **made_sections(mutants, outcomes, reasons)}
    TABLE.write_text(table({file: found[file] for file in files([]) if file in found}), encoding="utf-8")
    sys.exit(1 if unexplained or stale else 0)


def files(only: list[str]) -> list[str]:
    """The files that are mutated, those of the networks first."""
    maps = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "weights_maps").glob("*.*.toml"))
    return [file for file in (*TESTS, *maps) if not only or any(word in file for word in only)]


def find_mutants(only: list[str]) -> dict[str, Mutant]:
    """Every mutant by key."""
    found: list[Mutant] = []
    for file in files(only):
        found += python_mutants(ROOT, file) if file.endswith(".py") else map_mutants(ROOT, file)
    return numbered(found)


def run(mutants: dict[str, Mutant], jobs: int, results: Path | None) -> dict[str, Outcome]:
    """An outcome for each; those already in `results` are not run again."""
    known: dict[str, Outcome] = {}
    if results is not None and results.exists():
        stored = json.loads(results.read_text(encoding="utf-8"))
        known = {key: Outcome(**value) for key, value in stored.items() if key in mutants}
    every = {**TESTS, **TESTS_OF_MAPS}
    tests = {key: every.get(mutant.file, MAP_TESTS) for key, mutant in mutants.items()}

    def report(key: str, outcome: Outcome) -> None:
        known[key] = outcome
        print(f"{len(known)}/{len(mutants)} {'SURVIVED' if outcome.survived else 'killed'} {key}", flush=True)
        if results is not None:
            results.write_text(json.dumps({k: vars(o) for k, o in known.items()}), encoding="utf-8")

    left = {key: mutant for key, mutant in mutants.items() if key not in known}
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_project(Path(folder) / str(i)) for i in range(jobs)]
        run_all(copies, ROOT, left, tests, report)
    return {key: known[key] for key in mutants}


def copy_project(folder: Path) -> Path:
    """What the tests need, in a folder of its own; large data as links."""
    skipped = shutil.ignore_patterns("__pycache__", "models")
    for name in ("flux_sd", "weights_maps", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "reference_outputs").symlink_to(ROOT / "reference_outputs")
    (folder / "flux_sd" / "models").symlink_to(ROOT / "flux_sd" / "models")
    return folder


def explained() -> dict[str, str]:
    """Survivors that compute the same, each with its proof."""
    content = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {entry["mutant"]: entry["proof"] for entry in content.get("equivalent", [])}


def summary(mutants: dict[str, Mutant], outcomes: dict[str, Outcome], seconds: float) -> str:
    """Counts by file."""
    made = Counter(mutant.file for mutant in mutants.values())
    left = Counter(mutants[key].file for key, outcome in outcomes.items() if outcome.survived)
    lines = [f"{file}: {made[file] - left[file]} of {made[file]} killed" for file in made]
    return "\n".join([*lines, f"{sum(made.values())} mutants in {seconds:.0f} s"])


class Section(NamedTuple):
    """What the table says of one file."""

    counts: str  # its row of the first table
    rows: list[str]  # of its own


def made_sections(
    mutants: dict[str, Mutant], outcomes: dict[str, Outcome], reasons: dict[str, str]
) -> dict[str, Section]:
    """By file, of what was run."""
    made = Counter(mutant.file for mutant in mutants.values())
    left = Counter(mutants[key].file for key, outcome in outcomes.items() if outcome.survived)
    return {
        file: Section(
            f"| {file} | {made[file]} | {made[file] - left[file]} | {left[file]} |",
            [
                _table_row(mutant, outcomes[key], reasons.get(key, "**nothing**"))
                for key, mutant in mutants.items()
                if mutant.file == file
            ],
        )
        for file in made
    }


def sections(text: str) -> dict[str, Section]:
    """By file, of a table that was written before."""
    counts = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line[:2] == "| "}
    found = {}
    for part in text.split("\n## ")[1:]:
        file, _, rest = part.partition("\n")
        found[file] = Section(counts[file], rest.strip().splitlines()[2:])
    return found


def table(found: dict[str, Section]) -> str:
    """docs/mutants.md"""
    lines = [
        "# What the golden tests notice",
        "",
        "Written by `python tools/mutate.py`: wrong edits, made by rule, and the first test that failed on",
        "each. A crash counts as noticed and is marked. Survivors compute the same, for the reason given.",
        "",
        "| file | mutants | noticed | equivalent |",
        "|---|---|---|---|",
        *(section.counts for section in found.values()),
    ]
    for file, section in found.items():
        lines += [
            "",
            f"## {file}",
            "",
            "| line | where | rule | edit | noticed by |",
            "|---|---|---|---|---|",
            *section.rows,
        ]
    return "\n".join(lines) + "\n"


def _table_row(mutant: Mutant, outcome: Outcome, reason: str) -> str:
    edit = " ".join(f"`{mutant.before}` → `{mutant.after}`".split()).replace("|", "\\|")
    noticed = (
        f"equivalent: {reason}" if outcome.survived else outcome.test + (" (crash)" if outcome.crash else "")
    )
    return f"| {mutant.line} | `{mutant.where}` | {mutant.rule} | {edit} | {noticed} |"


if __name__ == "__main__":
    main()
