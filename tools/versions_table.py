"""Writes README.md's table of versions: what each loads from and what it can do, asked of the code itself.

    python tools/versions_table.py            # writes the table between its two markers
    python tools/versions_table.py --print    # leaves README.md alone

A layout is listed where a map of weights_maps/ makes every tensor of the version's denoiser, a task or a
sampler where the version takes such a request. EVIDENCE names the tests that hold each cell to that; the tool
fails where one of them does not exist: nothing is claimed that nothing tests.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from parity_table import write_between
from PIL import Image
from synthetic_sd import SINGLE_FILES

from flux_sd import GenerationRequest
from flux_sd.errors import RequestError
from flux_sd.model_files import config_of, layout_of
from flux_sd.model_loader import FAMILIES, check_request
from flux_sd.numerics import reference
from flux_sd.schedulers import SAMPLERS, SCHEDULES, check_pair
from flux_sd.versions import SDVersion, VersionInfo
from flux_sd.weight_map import load_maps

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- versions table: tools/versions_table.py -->", "<!-- end of versions -->"
HEADER = ("version", "diffusers folder", "authors' single file", "GGUF", "tasks", "samplers", "LoRA")
PICTURE, MASK = Image.new("RGB", (256, 256)), Image.new("L", (256, 256), 255)
TASKS = {
    "text": GenerationRequest(""),
    "picture": GenerationRequest("", init_image=PICTURE),
    "inpaint": GenerationRequest("", init_image=PICTURE, mask=MASK),
    "control": GenerationRequest("", control_image=PICTURE),
    "reference": GenerationRequest("", reference=PICTURE),
}
FLUX_SAMPLER = "flow Euler"
# Dialect of a denoiser -> the column it fills.
COLUMNS = {"diffusers": "diffusers", "bfl": "single", "ldm_sd": "single", "ldm_xl": "single"}
SD, HERE = "tests/test_sd_generation.py", "tests/test_versions_table.py"
FLUX = "tests/test_flux_pictures.py"
# (family, what is claimed) -> the test that covers it, with the version's key where it takes one.
EVIDENCE = {
    ("sd", "diffusers"): "tests/test_sd_maps.py::test_a_diffusers_folder_loads_without_a_problem[{key}]",
    ("sd", "single"): "tests/test_sd_maps.py::test_a_single_file_loads_without_a_problem[{key}]",
    ("sd", "gguf"): f"{HERE}::test_a_gguf_of_the_real_shapes_loads[{{key}}]",
    ("sd", "lora"): f"{HERE}::test_an_adapter_finds_every_layer[{{key}}]",
    ("sd", "text"): f"{SD}::test_a_picture_of_the_asked_size_and_its_record[{{key}}]",
    ("sd", "picture"): f"{SD}::test_strength_0_is_the_autoencoder_alone_and_strength_1_is_without_the_picture"
    "[{key}]",
    ("sd", "inpaint"): f"{SD}::test_what_the_mask_keeps_comes_back_byte_for_byte[{{key}}]",
    ("flux", "diffusers"): f"{HERE}::test_a_transformer_of_the_real_shapes_loads[{{key}}-diffusers]",
    ("flux", "single"): f"{HERE}::test_a_transformer_of_the_real_shapes_loads[{{key}}-bfl]",
    ("flux", "gguf"): f"{HERE}::test_a_gguf_of_the_real_shapes_loads[{{key}}]",
    ("flux", "lora"): f"{HERE}::test_an_adapter_finds_every_layer[{{key}}]",
    ("flux", "text"): "tests/test_flux_generation.py::test_a_picture_of_the_asked_size_and_its_record",
    ("flux", "picture"): f"{FLUX}::test_strength_0_is_the_autoencoder_alone_and_strength_1_is_without_the_"
    "picture[{key}]",
    ("flux", "inpaint"): f"{FLUX}::test_what_the_mask_keeps_comes_back_byte_for_byte[{{key}}]",
    ("flux", "control"): f"{FLUX}::test_a_control_picture_is_followed[{{key}}]",
    ("flux", "reference"): f"{FLUX}::test_a_reference_is_looked_at[{{key}}]",
    ("flux", FLUX_SAMPLER): "tests/test_oracle.py::test_schedules_agree",
}  # fmt: skip
# What a sampler computes, and that a picture comes of it; that a version takes it, the table's own test asks.
SOLVED = (
    "tests/test_schedulers.py::test_noise_added_at_a_step_is_what_that_step_begins_with[{name}]",
    f"{HERE}::test_every_sampler_runs_on_every_version[{{key}}-{{name}}]",
)


@dataclass(frozen=True)
class Claims:
    """What one version can, by the code."""

    layouts: tuple[str, ...]
    gguf: bool
    lora: bool
    tasks: tuple[str, ...]
    samplers: tuple[str, ...]  # the default first
    default: str


@functools.cache
def claims(version: SDVersion) -> Claims:
    """Asks the maps for layouts, and the version's plan for tasks and samplers."""
    info = version.info
    found = tuple(dict.fromkeys(COLUMNS[dialect] for dialect in dialects(version)))
    layouts = tuple(name for name in found if name != "single" or info.sd is None or info.key in SINGLE_FILES)
    tasks = tuple(name for name, request in TASKS.items() if takes(version, request))
    lora = bool(found)  # adapters are placed through the same maps
    if info.sd is None:
        return Claims(layouts, True, lora, tasks, (FLUX_SAMPLER,), FLUX_SAMPLER)
    own = (info.sd.sampler, *(name for name in SAMPLERS if name != info.sd.sampler))
    samplers = tuple(name for name in own if takes(version, request_for(info, name)))
    return Claims(
        layouts, "single" in found, lora, tasks, samplers, f"{info.sd.sampler} ({info.sd.schedule})"
    )


def request_for(info: VersionInfo, sampler: str) -> GenerationRequest:
    """One that the version takes, with this sampler."""
    pictures = {"init_image": PICTURE, "mask": MASK} if info.is_inpainting else {}
    return GenerationRequest("", sampler=sampler, **pictures)


def takes(version: SDVersion, request: GenerationRequest) -> bool:
    """Whether the version accepts the request."""
    try:
        check_request(version, request)
    except RequestError:
        return False
    return True


def dialects(version: SDVersion) -> list[str]:
    """The dialects whose map makes every tensor of the denoiser."""
    layout = layout_of(version.info)
    component = layout.maps[layout.denoiser]
    config = config_of(layout.denoiser, version.info)
    networks = FAMILIES[version.info.family].networks(version.info, reference())
    names = set(networks[layout.denoiser].on_meta().state_dict())
    return [
        weight_map.dialect
        for weight_map in load_maps()
        if weight_map.component == component and weight_map.expand(config, names).keys() == names
    ]  # fmt: skip


def schedules() -> dict[str, list[str]]:
    """The schedules that each sampler takes."""
    table: dict[str, list[str]] = {name: [] for name in SAMPLERS}
    for name in SAMPLERS:
        for schedule in SCHEDULES:
            try:
                check_pair(name, schedule)
            except RequestError:
                continue
            table[name].append(schedule)
    return table


# the tests behind it ----------------------------------------------------------------------------------------


def evidence(version: SDVersion) -> list[str]:
    """The tests that cover every claim about a version."""
    info, made = version.info, claims(version)
    said = [*made.layouts, *(("gguf",) if made.gguf else ()), *(("lora",) if made.lora else ()), *made.tasks]
    tests = [EVIDENCE[info.family, claim].format(key=info.key) for claim in said]
    if info.sd is None:
        return [*tests, EVIDENCE["flux", FLUX_SAMPLER]]
    return tests + [test.format(key=info.key, name=name) for name in made.samplers for test in SOLVED]


def collected(tests: Iterable[str]) -> set[str]:
    """Those tests, of the files that they name, that exist."""
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", *files]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return set(listed.splitlines())


# the table --------------------------------------------------------------------------------------------------

RELEASED = tuple(version for version in SDVersion if version.info.repo is not None)


def row(version: SDVersion) -> tuple[str, ...]:
    info, made = version.info, claims(version)
    samplers = made.default if info.sd is None else f"all {len(made.samplers)}; {made.default}"
    if info.sd is not None and set(made.samplers) != set(SAMPLERS):
        samplers = ", ".join(made.samplers)
    yes = {True: "yes", False: "no"}
    return (
        f"`{info.key}`",
        yes["diffusers" in made.layouts],
        "yes" if "single" in made.layouts else "none exists",
        yes[made.gguf],
        ", ".join(made.tasks),
        samplers,
        yes[made.lora],
    )


def table() -> str:
    """The lines between the markers."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ("---",) * len(HEADER))]
    lines += [f"| {' | '.join(row(version))} |" for version in RELEASED]
    lines += ["", "| sampler | schedules |", "|---|---|"]
    for name, taken in schedules().items():
        lines.append(f"| `{name}` | {'all' if len(taken) == len(SCHEDULES) else ', '.join(taken)} |")
    return "\n".join([*lines, "", f"All schedules: {', '.join(SCHEDULES)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--print", action="store_true", dest="shows", help="leave README.md alone")
    arguments = parser.parse_args()
    wanted = [test for version in RELEASED for test in evidence(version)]
    lacking = sorted(set(wanted) - collected(wanted))
    if lacking:
        sys.exit("claimed and not tested:\n" + "\n".join(lacking))
    if arguments.shows:
        print(table())
        return
    readme = ROOT / "README.md"
    readme.write_text(
        write_between(readme.read_text(encoding="utf-8"), table(), (BEGIN, END)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
