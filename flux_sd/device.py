"""Which device and dtype a model runs on, and what fits there: by queried properties, never by name.

Floor 4.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import DeviceError, NotEnoughMemoryError
from .quantized import SCRATCH

DTYPES = {
    "float32": torch.float32, "f32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "f16": torch.float16, "fp16": torch.float16, "half": torch.float16,
}  # fmt: skip
GB = 1e9
# Python, torch and the allocator's slack, beside weights and activations.
OVERHEAD = 600_000_000


@dataclass(frozen=True)
class Placement:
    """Where products run, in which dtype, and which components keep their stored dtype to fit."""

    device: torch.device
    dtype: torch.dtype
    stored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageNeed:
    """What one component asks of the memory while its stage runs."""

    role: str
    parameters: int
    stored_bytes: int  # as on disk
    activations: int  # bytes in float32
    widens: bool = True  # whether its weights can stay as stored: those of convolutions cannot
    packed: int = 0  # of the parameters, how many stay packed
    packed_bytes: int = 0  # and what these take
    unpacks: bool = False  # packed weights are decoded at load because that was asked for
    wide: bool = False  # computes in float32 whatever the model's dtype

    def weight_bytes(self, dtype: torch.dtype, stored: bool = False) -> int:
        """What its weights take in memory: `stored` as the file has them, else what is not packed in
        `dtype`."""
        if stored:
            return self.stored_bytes
        return (self.parameters - self.packed) * self._itemsize(dtype) + self.packed_bytes

    def activation_bytes(self, dtype: torch.dtype) -> int:
        """What its activations take."""
        return self.activations * self._itemsize(dtype) // 4

    def _itemsize(self, dtype: torch.dtype) -> int:
        return 4 if self.wide else dtype.itemsize


def choose_device(name: str) -> torch.device:
    """ "auto": CUDA, else Apple's MPS, else the CPU. Raises DeviceError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device {name!r} is unknown: choose auto, cpu, cuda or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise DeviceError(f"device {name!r} is not usable here ({reason}): try --device cpu") from error
    return device


def choose_dtype(name: str, device: torch.device, preferred: str | None = None) -> torch.dtype:
    """The compute dtype. "auto": `preferred` if the version has one, else bfloat16 where the device
    multiplies it in hardware, else float32; never float16 by itself. Raises DeviceError for unknown names."""
    if name == "auto":
        if preferred is not None:
            return DTYPES[preferred]
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name.lower() not in DTYPES:
        raise DeviceError(f"dtype {name!r} is unknown: choose auto, float32, bfloat16 or float16")
    return DTYPES[name.lower()]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: on a CPU that means AVX512-BF16, AMX or ARM's BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if abilities:
            return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(probe())
    return False


def place(
    needs: list[StageNeed], device: torch.device, dtype: torch.dtype, automatic: bool, together: bool
) -> Placement:
    """Checks that every stage fits the device's memory, before anything is read.

    Where the dtype was chosen automatically and a stage does not fit in it, components keep their stored
    dtype, the largest first, and are widened as they are used. `together`: all components stay loaded at
    once. Raises NotEnoughMemoryError naming stage and sizes.
    """
    available = available_memory(device)
    weights = {need.role: need.weight_bytes(dtype) for need in needs}
    stored: list[StageNeed] = []
    for stage in [needs] if together else [[need] for need in needs]:
        activations = max(need.activation_bytes(dtype) for need in stage) + OVERHEAD
        activations += SCRATCH if any(need.packed for need in stage) else 0
        while (wanted := sum(weights[need.role] for need in stage) + activations) > available:
            smaller = [need for need in stage if need.widens and need.stored_bytes < weights[need.role]]
            largest = max(smaller or stage, key=lambda need: weights[need.role])
            if not (automatic and smaller):
                rest = wanted - weights[largest.role]
                raise NotEnoughMemoryError(_too_large(largest, wanted, rest, available, bool(smaller)))
            weights[largest.role] = largest.stored_bytes
            stored.append(largest)
    notes = tuple(_kept_note(need, need.weight_bytes(dtype)) for need in stored)
    return Placement(device, dtype, frozenset(need.role for need in stored), notes)


def _kept_note(need: StageNeed, full: int) -> str:
    return (
        f"{need.role}: {full / GB:.1f} GB do not fit, so its weights stay as stored "
        f"({need.stored_bytes / GB:.1f} GB) and are widened as they are used"
    )


def size_text(nbytes: int) -> str:
    """ "6.8 GB", or "10.3 MB" for what is small."""
    return f"{nbytes / GB:.1f} GB" if nbytes >= 0.1 * GB else f"{nbytes / 1e6:.1f} MB"


# Bytes a weight of the usual quantised files, largest first.
GGUF_TYPES = {"Q8_0": 34 / 32, "Q5_K": 176 / 256, "Q4_K": 144 / 256, "Q3_K": 110 / 256, "Q2_K": 84 / 256}


def _too_large(need: StageNeed, wanted: int, rest: int, available: int, stored_is_smaller: bool) -> str:
    """Names what would fit: an automatic dtype, a smaller picture, or a file of a smaller type. `rest` is
    what the stage needs beside the weights of `need`."""
    sizes = {name: int(need.parameters * size) for name, size in GGUF_TYPES.items()}
    fitting = [name for name, size in sizes.items() if size + rest <= available]
    advice = ["free some, ask for a smaller picture or use another machine"]
    if need.unpacks:
        advice.append("leave packed weights packed (--decode on-use)")
    elif stored_is_smaller:
        advice.append("leave the dtype to be chosen, so that weights can stay as stored")
    if fitting and need.widens:
        advice.append(f"a {fitting[0]} GGUF ({sizes[fitting[0]] / GB:.1f} GB) would fit")
    return (
        f"the {need.role} stage needs {wanted / GB:.1f} GB of memory, {available / GB:.1f} GB are available: "
        + "; ".join(advice)
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`; for the CPU the least of what the kernel and the cgroup
    say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_kernel_available(), _cgroup_available()]
    return min(limit for limit in limits if limit is not None)


def _kernel_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_available() -> int | None:
    """What cgroup v2 leaves to this container, or None outside one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when needed
        return int(limit) - used + cache
    except (OSError, ValueError):
        return None
