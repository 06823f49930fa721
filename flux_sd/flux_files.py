"""Which files make a FLUX model: from a folder, from one file that holds several parts, or given one by one.

Floor 5. All is told from directories and headers, before any weight is read: which file plays which role, and
whether each is what its role wants. Counterpart in the Rust worker: the beginning of `flux_loader.rs`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import SUFFIXES, Checkpoint, file_mode, folder_candidates, open_checkpoint
from .errors import AmbiguousFileError, FluxSdError, MissingFileError, WeightMapError
from .sniff import OTHER, Found, load_facts, sniff
from .versions import SDVersion, VersionInfo
from .weight_map import TITLES

# Order of the stages. Values: the name of the maps (weights_maps/<name>.*.toml).
MAPS = {"clip": "clip", "t5": "t5", "transformer": "flux_mmdit", "vae": "autoencoder"}
ROLES = {component: role for role, component in MAPS.items()}
# Where each role lies in the layouts people have, as patterns under the model's folder.
PLACES = {
    "transformer": ("transformer", "flux1-*.safetensors", "flux1-*.gguf"),
    "vae": ("vae", "ae.safetensors", "ae.gguf"),
    "clip": ("text_encoder", "clip_l*.safetensors", "clip_l*.gguf"),
    "t5": ("text_encoder_2", "t5xxl*.safetensors", "t5xxl*.gguf", "t5-v1_1-xxl*.gguf"),
}
TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
LOOKED_AT = 32  # files of a folder whose headers are read to find one that would serve


@dataclass(frozen=True)
class FluxFiles:
    """One file or folder per role; two roles may have the same."""

    transformer: Path
    vae: Path
    clip: Path
    t5: Path
    clip_tokenizer: Path
    t5_tokenizer: Path


def find_files(
    source: Path | None, given: Mapping[str, Path], more_tokenizers: Iterable[Path] = ()
) -> FluxFiles:
    """The files of a model: those `given` by role (a key of FluxFiles), the rest from `source`.

    `source` is a diffusers folder, a BFL folder (flux1-*.safetensors, ae.safetensors and the encoders'
    folders or flat files), or one file that holds some of the parts, the others being beside it; None if
    every role is given. Tokenizers may also lie beside the encoder's file or in one of `more_tokenizers`.
    Raises MissingFileError naming each role that nothing serves and what would, AmbiguousFileError naming
    all candidates, WeightMapError for a single file with no part of FLUX in it.
    """
    for name, path in (({"path": source} if source else {}) | dict(given)).items():
        check_exists(name, path)
    single = source is not None and not source.is_dir()
    held = _roles_in(source) if source is not None and single else {}
    folder = source.parent if source is not None and single else source
    found = {role: given.get(role) or held.get(role) or _search(role, folder) for role in PLACES}
    chosen = {role: path for role, path in found.items() if path is not None}
    if len(chosen) < len(PLACES):
        raise MissingFileError(_missing(source, held, [role for role in PLACES if role not in chosen]))
    for role, path in chosen.items():
        _check_single(role, path)
    for role, name in TOKENIZERS.items():
        key = f"{role}_tokenizer"
        own = chosen[role]
        around = [own.parent, own.parent.parent] if own.is_file() else [own.parent]
        homes = [*([folder] if folder else []), *around, *more_tokenizers]
        chosen[key] = given.get(key) or _first_tokenizer(role, name, homes)
    return FluxFiles(**chosen)


def check_exists(role: str, path: Path) -> None:
    """Raises MissingFileError, naming the role, for a path where nothing is or that cannot be reached."""
    try:
        file_mode(path)
    except MissingFileError as error:
        raise MissingFileError(f"{role}: {error}") from error


def _roles_in(file: Path) -> dict[str, Path]:
    """The roles that one file can play."""
    with open_checkpoint(file) as checkpoint:
        parts = sniff(checkpoint)
    held = {ROLES[part.component]: file for part in parts if part.map is not None and part.component in ROLES}
    if not held:
        wanted = " or ".join(TITLES[component] for component in ROLES)
        raise WeightMapError(
            f"--path {file} holds {_listed(parts)}: a folder, or a file with {wanted}, was expected"
        )
    return held


def _search(role: str, folder: Path | None) -> Path | None:
    """The one file or folder for a role in a model's folder, None where there is none."""
    if folder is None:
        return None
    matches = [path for pattern in PLACES[role] for path in sorted(folder.glob(pattern))]
    if len(matches) > 1:  # a folder with no weights, such as one of configs, competes with none
        matches = [path for path in matches if not path.is_dir() or folder_candidates(path)] or matches[:1]
    if len(matches) > 1:
        raise AmbiguousFileError(_choices(role, folder, matches))
    return matches[0] if matches else None


def _check_single(role: str, path: Path) -> None:
    """Refuses a folder with two checkpoints, such as model.safetensors and model.fp16.safetensors."""
    candidates = folder_candidates(path) if path.is_dir() else []
    if len(candidates) > 1:
        raise AmbiguousFileError(_choices(role, path, [files[0] for files in candidates]))


def _choices(role: str, folder: Path, paths: Sequence[Path]) -> str:
    names = " and ".join(path.name for path in paths)
    options = " or ".join(f"--{role} {shlex.quote(str(path))}" for path in paths[:4])
    return f"{str(folder)!r} holds {names} for the {role}: choose one with {options}"


def _missing(source: Path | None, held: Mapping[str, Path], roles: Sequence[str]) -> str:
    """One sentence on the roles that nothing serves, and what would."""
    accepted = {role: " or ".join(PLACES[role]) for role in roles}
    if source is None:
        return "; ".join(
            f"no file for the {role}: give --{role} FILE, or --path FOLDER that holds {accepted[role]}"
            for role in roles
        )
    folder = source.parent if held else source
    spare = _spare(folder)
    wants = [f"no {role}: expected {accepted[role]} there, or give --{role} FILE" for role in roles]
    for at, role in enumerate(roles):
        if role in spare:
            wants[at] += f" ({spare[role].name} there is {TITLES[MAPS[role]]})"
    start = f"{source.name} holds the {' and '.join(held)} only, and " if held else ""
    return f"{start}{str(folder)!r} holds {'; '.join(wants)}"


def _spare(folder: Path) -> dict[str, Path]:
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
            if part.map is not None and part.component in ROLES:
                found.setdefault(ROLES[part.component], path)
    return found


def _first_tokenizer(role: str, name: str, homes: Iterable[Path]) -> Path:
    for home in homes:
        if os.path.isdir(home / name):  # unlike Path.is_dir, it fails for no folder
            return home / name
    kinds = (
        "vocab.json + merges.txt or tokenizer.json" if role == "clip" else "spiece.model or tokenizer.json"
    )
    raise MissingFileError(
        f"no tokenizer for the {role} encoder: expected a folder {name}/ with {kinds}, as in the released "
        f"repository, beside the model or its encoder; or give --{role}-tokenizer FOLDER"
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
    fitting = [part for part in parts if part.map is not None and part.component == MAPS[role]]
    if fitting:
        return _misfit(role, info, checkpoint.label, fitting[0], complete)
    known = [part for part in parts if part.component != OTHER]
    title = TITLES[MAPS[role]]
    if not known:
        found = f"its {len(checkpoint)} tensors have names of no known layout"
        return f"{role}: {checkpoint.label} is not {title}: {found}"
    if len(known) > 1:
        return f"{role}: {checkpoint.label} holds {_listed(known)}, and not {title}"
    other = ROLES.get(known[0].component) if known[0].map is not None else None
    advice = f"give it as --{other}" if other else f"{title} was expected"
    return f"{role}: {checkpoint.label} is {known[0]}; {advice}"


def _misfit(role: str, info: VersionInfo, label: str, part: Found, complete: bool) -> str | None:
    """What to say of a part that is the network of another model, None if nothing is plain."""
    wrong = _differences(part, getattr(info.flux, role), complete)
    if not wrong:
        return None
    others = [version.info for version in SDVersion if version.info.flux is not None]
    fits = [other.key for other in others if not _differences(part, getattr(other.flux, role), complete)]
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


def _differences(part: Found, config: Any, complete: bool) -> dict[str, tuple[int, int]]:
    """size -> (the file's, the model's) where they differ; sizes are fields of the network's config."""
    wrong = {}
    for size, value in part.sizes.items():
        wanted = getattr(config, size)
        wanted = len(wanted) if isinstance(wanted, tuple | list) else int(wanted)
        if value != wanted and (complete or value):
            wrong[size] = (value, wanted)
    return wrong


def _listed(parts: Sequence[Found]) -> str:
    return " and ".join(str(part) for part in parts)
