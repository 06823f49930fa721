"""The header of a file that torch.save wrote (`.ckpt .pt .pth .bin`), without running anything in it.

Floor 1. A pickle is a program. torch's weights-only unpickler carries out only what builds tensors and plain
containers, and is the only way here to look inside one; what it refuses is refused. Still, a safetensors
file of the same weights is the better choice: it is data, and torch had errors in this place before.

Nothing is read but the pickle itself: tensors are built on the meta device, where torch says how they lie in
the file. Those that do not lie there as they are (views with strides, files older than torch 1.6, a torch
that does not say where) become `Header.held`, tensors of torch on the file or in memory.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .tensor_info import DTYPES, MAX_NAME, Header, TensorInfo, is_countable, is_name

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
ZIP = b"PK\x03\x04"  # torch 1.6 and later write a zip, earlier ones pickles behind one another
OLD = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the first of them: a magic number
WRAPPERS = ("state_dict", "model", "module", "params", "params_ema")  # what programs put the tensors under
WORDS: Mapping[torch.dtype, str] = {dtype: word for word, dtype in DTYPES.items()}
INSTEAD = "give the model as .safetensors, which is data and cannot run"
# Stable Diffusion 1's first files keep the settings of their training under this class. Only its name is met,
# as a key: an empty class of the same name does, and nothing of PyTorch Lightning is imported.
ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def is_pickle(path: Path) -> bool:
    """Whether a file's first bytes are those of torch.save, of either kind. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(OLD)).startswith((ZIP, OLD))
    except OSError:
        return False


def read_pickle_header(path: Path) -> Header:
    """Names, shapes, types and places of a pickle's tensors; `global_step`, if it has one, as metadata.

    Raises CheckpointError: damaged, with code in it, without tensors, or with tensors of no plain kind.
    """
    is_zip = _is_zip(path)
    content = _load(path, "meta" if is_zip else "cpu", mapped=False)
    tensors = _unwrap(content, path)
    for name, tensor in tensors.items():
        _check_kind(name, tensor, path)
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    size = path.stat().st_size
    infos = tuple(_describe(name, tensor, places[name], path, size) for name, tensor in tensors.items())
    apart = [name for name, place in places.items() if place is None]
    if apart and is_zip:  # again, now mapped: torch reads what is looked at
        tensors = _unwrap(_load(path, "cpu", mapped=True), path)
    step = content.get("global_step") if isinstance(content, dict) else None
    metadata = {"global_step": str(step)} if isinstance(step, int) else {}
    return Header(infos, metadata, {name: tensors[name].detach() for name in apart})


def _place(tensor: Tensor) -> int | None:
    """The byte of the file at which a tensor begins, None for one that does not lie there as it is."""
    start: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        return None
    return start + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _is_zip(path: Path) -> bool:
    """Whether it is a zip, whose records then must lie in it as they are."""
    with path.open("rb") as file:
        if not file.read(4).startswith(ZIP):
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        text = f"{path} is a pickle that is truncated or damaged ({error})"
        raise CheckpointError(f"{text}: download it again") from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path} is a compressed zip and no file of torch.save: {INSTEAD}")
    return True


def _load(path: Path, device: str, mapped: bool) -> Any:
    """What torch's weights-only unpickler makes of a file."""
    try:
        with torch.serialization.safe_globals([ModelCheckpoint]):
            return torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    except Exception as error:  # of a damaged pickle nearly every kind is possible
        raise CheckpointError(_refusal(path, error)) from error


def _refusal(path: Path, error: Exception) -> str:
    """One sentence on why torch's reader did not take a file. Its own text is cut where it turns to advice,
    which is to read the file without a guard."""
    text = " ".join("".join(char if char.isprintable() else " " for char in str(error)).split())
    refused = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+\.\w+)", text)
    if refused is not None:
        found = f"{path} is a pickle that asks for {(refused[1] or refused[2])[:MAX_NAME]}"
        return f"{found}, which is refused: it could run code; {INSTEAD}"
    if isinstance(error, EOFError | IndexError | struct.error) or "unexpected EOF" in text:
        return f"{path} is a pickle that is truncated: download it again"
    reason = re.split(" Please | Check ", text.rpartition("WeightsUnpickler error: ")[2])[0][:120]
    reason = type(error).__name__ if reason.startswith("Weights only load failed") else reason
    found = f"{path} is a pickle that torch's weights-only reader does not take ({reason})"
    return f"{found}: it is damaged, or holds more than weights; {INSTEAD}"


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, or of the table in it that holds them."""
    inner = [content.get(key) for key in WRAPPERS] if isinstance(content, dict) else []
    for table in (*inner, content):
        found = _tensors(table)
        if found:
            return found
    raise CheckpointError(f"{path} holds no table of tensors: weights of a model were expected")


def _tensors(table: Any) -> dict[str, Tensor]:
    """The tensors in a table, by name; empty for anything else."""
    if not isinstance(table, dict):
        return {}
    return {
        name: value for name, value in table.items() if isinstance(value, Tensor) and isinstance(name, str)
    }


def _check_kind(name: str, tensor: Tensor, path: Path) -> None:
    """Raises CheckpointError for a tensor that is no table of plain numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in WORDS:
        kind = f"{tensor.layout} of {tensor.dtype}"
        found = f"{path}: {name[:MAX_NAME]!r} is a tensor of the kind {kind}"
        raise CheckpointError(f"{found}: plain numbers were expected")


def _describe(name: str, tensor: Tensor, place: int | None, path: Path, size: int) -> TensorInfo:
    """One tensor of a file of `size` bytes, at `place`."""
    called, shape = f"{path}: {name[:MAX_NAME]!r}", tuple(tensor.shape)
    if not is_name(name):
        raise CheckpointError(f"{called} is no name: up to {MAX_NAME} printable characters were expected")
    if not is_countable(shape):
        raise CheckpointError(f"{called} of shape {list(shape)} has more elements than can be counted")
    nbytes = tensor.numel() * tensor.dtype.itemsize
    if place is not None and not 0 <= place <= size - nbytes:
        raise CheckpointError(
            f"{path} is truncated: {name!r} ends at byte {place + nbytes}, the file has {size}; "
            "download it again"
        )
    return TensorInfo(name, shape, WORDS[tensor.dtype], nbytes, path, place or 0)
