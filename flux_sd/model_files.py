"""Which files make a model: from a folder, from one file that holds several parts, or given one by one.

Floor 5. All is told from directories and headers, before any weight is read: which file plays which role, and
whether each is what its role wants. Counterpart in the Rust worker: the beginnings of `flux_loader.rs` and
`loader.rs`.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import SUFFIXES, Checkpoint, file_mode, folder_candidates, open_checkpoint
from .errors import AmbiguousFileError, FluxSdError, MissingFileError, WeightMapError
from .pickle_reader import SUFFIXES as PICKLES
from .sniff import OTHER, Found, load_facts, sniff
from .versions import SDVersion, VersionInfo
from .weight_map import TITLES

TOKENIZER_SUFFIX = "_tokenizer"


@dataclass(frozen=True)
class Layout:
    """What a family's models consist of, in the order of the stages, and where people keep it."""

    maps: dict[str, str]  # role -> the name of its maps (weights_maps/<name>.*.toml)
    places: Mapping[str, tuple[str, ...]]  # role -> patterns under the model's folder
    tokenizers: Mapping[str, tuple[str, ...]]  # role -> folders that would do
    denoiser: str  # the role of the network that runs at every step

    def role_of(self, component: str) -> str | None:
        """The first role that a component plays."""
        return next((role for role, own in self.maps.items() if own == component), None)


FLUX = Layout(
    {"clip": "clip", "t5": "t5", "transformer": "flux_mmdit", "vae": "autoencoder"},
    {
        "transformer": ("transformer", "flux1-*.safetensors", "flux1-*.gguf"),
        "vae": ("vae", "ae.safetensors", "ae.gguf"),
        "clip": ("text_encoder", "clip_l*.safetensors", "clip_l*.gguf"),
        "t5": ("text_encoder_2", "t5xxl*.safetensors", "t5xxl*.gguf", "t5-v1_1-xxl*.gguf"),
    },
    {"clip": ("tokenizer",), "t5": ("tokenizer_2",)},
    "transformer",
)
SD = Layout(
    {"clip": "clip", "unet": "unet", "vae": "autoencoder"},
    {"unet": ("unet",), "vae": ("vae",), "clip": ("text_encoder",)},
    {"clip": ("tokenizer",)},
    "unet",
)
# Both encoders of XL have one vocabulary, so either tokenizer's files serve both.
SDXL = Layout(
    {"clip": "clip", "clip_2": "clip", "unet": "unet", "vae": "autoencoder"},
    {**SD.places, "clip_2": ("text_encoder_2",)},
    {"clip": ("tokenizer", "tokenizer_2"), "clip_2": ("tokenizer_2", "tokenizer")},
    "unet",
)
LAYOUTS = (FLUX, SD, SDXL)
PLAIN_ENDINGS = [
    ending
    for suffix in (*SUFFIXES, *PICKLES)
    for ending in (suffix[1:], f"{suffix[1:]}.index.json")  # of files whose names say no variant
]
LOOKED_AT = 32  # files of a folder whose headers are read to find one that would serve


def layout_of(info: VersionInfo) -> Layout:
    """What a version consists of."""
    if info.flux is not None:
        return FLUX
    return SDXL if info.sd is not None and info.sd.clip_2 is not None else SD


def config_of(role: str, info: VersionInfo) -> Any:
    """The config dataclass of one network of a built version."""
    return getattr(info.flux or info.sd, role)


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model are; two networks may be in one file."""

    networks: Mapping[str, Path]  # role -> file or folder
    tokenizers: Mapping[str, Path]  # role -> folder or file
    scheduler: Path | None = None  # Stable Diffusion's scheduler_config.json


def find_files(
    info: VersionInfo, source: Path | None, given: Mapping[str, Path], more_tokenizers: Iterable[Path] = ()
) -> ModelFiles:
    """The files of a model: those `given` by role ("clip", "clip_tokenizer", ...), the rest from `source`.

    `source` is a diffusers folder, a BFL folder (flux1-*.safetensors, ae.safetensors and the encoders'
    folders or flat files), or one file that holds some of the parts, the others being beside it; None if
    every role is given. Tokenizers may also lie beside the encoder's file or in one of `more_tokenizers`.
    Raises MissingFileError naming each role that nothing serves and what would, AmbiguousFileError naming
    all candidates, WeightMapError for a single file with no part of such a model in it.
    """
    layout = layout_of(info)
    for name, path in (({"path": source} if source else {}) | dict(given)).items():
        check_exists(name, path)
    single = source is not None and not source.is_dir()
    held = _roles_in(source, info, layout) if source is not None and single else {}
    folder = source.parent if source is not None and single else source
    found = {role: given.get(role) or held.get(role) or search(role, folder, layout) for role in layout.maps}
    chosen = {role: one_checkpoint(role, path) for role, path in found.items() if path is not None}
    if len(chosen) < len(layout.maps):
        lacking = [role for role in layout.maps if role not in chosen]
        raise MissingFileError(_missing(source, held, lacking, layout))
    tokenizers = {}
    for role, names in layout.tokenizers.items():
        own = chosen[role]
        around = [own.parent, own.parent.parent] if own.is_file() else [own.parent]
        homes = [*([folder] if folder else []), *around, *more_tokenizers]
        key = f"{role}{TOKENIZER_SUFFIX}"
        tokenizers[role] = given.get(key) or _first_tokenizer(role, names, homes)
    return ModelFiles(chosen, tokenizers, find_scheduler(given, folder, layout))


def find_scheduler(given: Mapping[str, Path], folder: Path | None, layout: Layout) -> Path | None:
    """The scheduler's config where there is one; a model needs none. That of a model's `folder` says nothing
    of a denoiser that was given apart from it: then only what stands beside that counts."""
    apart = given.get(layout.denoiser)
    home = folder if apart is None else apart.parent
    place = given.get("scheduler") or (None if home is None else home / "scheduler")
    if place is None:
        return None
    config = place / "scheduler_config.json" if place.is_dir() else place
    return config if config.is_file() else None


def check_exists(role: str, path: Path) -> None:
    """Raises MissingFileError, naming the role, for a path where nothing is or that cannot be reached."""
    try:
        file_mode(path)
    except MissingFileError as error:
        raise MissingFileError(f"{role}: {error}") from error


def _roles_in(file: Path, info: VersionInfo, layout: Layout) -> dict[str, Path]:
    """The roles that one file can play."""
    with open_checkpoint(file) as checkpoint:
        parts = sniff(checkpoint)
    held = {}
    for role, component in layout.maps.items():
        own = [part for part in parts if part.map is not None and part.component == component]
        alone = list(layout.maps.values()).count(component) == 1
        if own and (alone or any(not differences(part, config_of(role, info), True) for part in own)):
            held[role] = file
    if not held:
        wanted = " or ".join(TITLES[component] for component in dict.fromkeys(layout.maps.values()))
        raise WeightMapError(
            f"--path {file} holds {listed(parts)}: a folder, or a file with {wanted}, was expected"
        )
    return held


def search(role: str, folder: Path | None, layout: Layout) -> Path | None:
    """The one file or folder for a role in a model's folder, None where there is none."""
    if folder is None:
        return None
    matches = [path for pattern in layout.places[role] for path in sorted(folder.glob(pattern))]
    if len(matches) > 1:  # a folder with no weights, such as one of configs, competes with none
        matches = [path for path in matches if not path.is_dir() or folder_candidates(path)] or matches[:1]
    if len(matches) > 1:
        raise AmbiguousFileError(_choices(role, folder, matches))
    return matches[0] if matches else None


def one_checkpoint(role: str, path: Path) -> Path:
    """The one checkpoint to take of a folder with several, such as model.safetensors and
    model.fp16.safetensors: that without a variant in its name, as diffusers does. Raises AmbiguousFileError
    where that does not decide."""
    candidates = folder_candidates(path) if path.is_dir() else []
    if len(candidates) < 2:
        return path
    plain = [files for files in candidates if files[0].name.partition(".")[2] in PLAIN_ENDINGS]
    if len(plain) == 1 and len(plain[0]) == 1:
        return plain[0][0]
    raise AmbiguousFileError(_choices(role, path, [files[0] for files in candidates]))


def _choices(role: str, folder: Path, paths: Sequence[Path]) -> str:
    names = " and ".join(path.name for path in paths)
    options = " or ".join(f"--{role} {shlex.quote(str(path))}" for path in paths[:4])
    return f"{str(folder)!r} holds {names} for the {role}: choose one with {options}"


def _missing(source: Path | None, held: Mapping[str, Path], roles: Sequence[str], layout: Layout) -> str:
    """One sentence on the roles that nothing serves, and what would."""
    accepted = {role: " or ".join(layout.places[role]) for role in roles}
    if source is None:
        return "; ".join(
            f"no file for the {role}: give --{_option(role)} FILE, or --path FOLDER that holds {places}"
            for role, places in accepted.items()
        )
    folder = source.parent if held else source
    spare = _spare(folder, layout)
    every = {spare.get(layout.role_of(component) or "") for component in layout.maps.values()}
    whole = every.pop() if len(every) == 1 else None
    if whole is not None:
        found = f"{str(folder)!r} is no model's folder, but {whole.name} there holds every part"
        return f"{found}: give it as --path"
    wants = [f"no {role}: expected {accepted[role]} there, or give --{_option(role)} FILE" for role in roles]
    for at, role in enumerate(roles):
        if role in spare:
            wants[at] += f" ({spare[role].name} there is {TITLES[layout.maps[role]]})"
    start = f"{source.name} holds the {' and '.join(held)} only, and " if held else ""
    return f"{start}{str(folder)!r} holds {'; '.join(wants)}"


def _option(role: str) -> str:
    """A role as the command line spells it."""
    return "-".join(role.split("_"))


def _spare(folder: Path, layout: Layout) -> dict[str, Path]:
    """role -> a file or folder in the folder that could play it, whatever its name."""
    found: dict[str, Path] = {}
    inner = sorted(folder.glob("*"))
    files = [path for path in inner if path.suffix in SUFFIXES and path.is_file()]
    for path in [*files, *(path for path in inner if path.is_dir())][:LOOKED_AT]:
        try:
            with open_checkpoint(path) as checkpoint:
                parts = sniff(checkpoint)
        except FluxSdError:
            continue  # a damaged file and a folder without weights serve nothing
        for part in parts:
            role = layout.role_of(part.component)
            if part.map is not None and role is not None:
                found.setdefault(role, path)
    return found


def _first_tokenizer(role: str, names: Sequence[str], homes: Iterable[Path]) -> Path:
    for home, name in itertools.product(homes, names):
        if os.path.isdir(home / name):  # unlike Path.is_dir, it fails for no folder
            return home / name
    kinds = "spiece.model or tokenizer.json" if role == "t5" else "vocab.json + merges.txt or tokenizer.json"
    raise MissingFileError(
        f"no tokenizer for the {role} encoder: expected a folder {names[0]}/ with {kinds}, as in the "
        f"released repository, beside the model or its encoder; or give --{_option(role)}-tokenizer FOLDER"
    )


# whether each file is what its role wants -------------------------------------------------------------------


def check_roles(info: VersionInfo, checkpoints: Mapping[str, Checkpoint], complete: bool = True) -> None:
    """Refuses files in wrong roles, and those of another model, all in one sentence.

    Says only what is plain from names and shapes; `load_plan` finds every tensor that does not fit.
    complete: False where another file will add what these lack. Raises WeightMapError.
    """
    wrong = [
        text
        for role, checkpoint in checkpoints.items()
        if (text := _misplaced(role, info, checkpoint, complete)) is not None
    ]
    if wrong:
        raise WeightMapError("; ".join(wrong))


def _misplaced(role: str, info: VersionInfo, checkpoint: Checkpoint, complete: bool) -> str | None:
    parts = sniff(checkpoint)
    layout = layout_of(info)
    component = layout.maps[role]
    fitting = [part for part in parts if part.map is not None and part.component == component]
    if fitting:
        config = config_of(role, info)
        best = min(fitting, key=lambda part: len(differences(part, config, complete)))
        return _misfit(role, info, checkpoint.label, best, complete)
    known = [part for part in parts if part.component != OTHER]
    title = TITLES[component]
    if not known:
        found = f"its {len(checkpoint)} tensors have names of no known layout"
        return f"{role}: {checkpoint.label} is not {title}: {found}"
    if len(known) > 1:
        return f"{role}: {checkpoint.label} holds {listed(known)}, and not {title}"
    other = _role_for(known[0], info, layout, complete)
    advice = f"give it as --{_option(other)}" if other else f"{title} was expected"
    return f"{role}: {checkpoint.label} is {known[0]}; {advice}"


def _role_for(part: Found, info: VersionInfo, layout: Layout, complete: bool) -> str | None:
    """The role of a model that a part would fit, None if there is none."""
    roles = [role for role, component in layout.maps.items() if component == part.component]
    fitting = (role for role in roles if not differences(part, config_of(role, info), complete))
    return None if part.map is None else next(fitting, None)


def _misfit(role: str, info: VersionInfo, label: str, part: Found, complete: bool) -> str | None:
    """What to say of a part that is the network of another model, None if nothing is plain."""
    wrong = differences(part, config_of(role, info), complete)
    if not wrong:
        return None
    others = [version.info for version in SDVersion if _has(version.info, role, part.component)]
    fitting = [other for other in others if not differences(part, config_of(role, other), complete)]
    fits = [o.key for o in fitting if not o.shares_tensors] or [o.key for o in fitting]
    named = any(
        fact.of == part.component
        and any(isinstance(fact.when.get(size), int) for size in wrong)
        and fact.holds([], part.sizes)
        for fact in load_facts()
    )
    if not fits and not named:
        return None
    found = ", ".join(f"{size} {value}, expected {wanted}" for size, (value, wanted) in wrong.items())
    advice = f"choose --model {' or '.join(fits)}" if fits else f"give the {role} of {info.key}"
    return f"{role}: {label} is {part}, which {info.key} does not take ({found}): {advice}"


def differences(part: Found, config: Any, complete: bool = True) -> dict[str, tuple[int, int]]:
    """size -> (the file's, the model's) where they differ; sizes are fields of the network's config."""
    wrong = {}
    for size, value in part.sizes.items():
        wanted = getattr(config, size)
        wanted = len(wanted) if isinstance(wanted, tuple | list) else int(wanted or 0)
        if value != wanted and (complete or value):
            wrong[size] = (value, wanted)
    return wrong


def _has(info: VersionInfo, role: str, component: str) -> bool:
    return layout_of(info).maps.get(role) == component


def listed(parts: Sequence[Found]) -> str:
    return " and ".join(str(part) for part in parts)
