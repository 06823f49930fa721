"""Which device and dtype a model runs on, and what fits there: by queried properties, never by name. Floor
4."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import DeviceError, NotEnoughMemoryError

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


def choose_device(name: str) -> torch.device:
    """ "auto": CUDA, else Apple's MPS, else the CPU. Raises DeviceError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {name!r} is not usable here ({reason}): try --device cpu") from error
    return device


def choose_dtype(name: str, device: torch.device, preferred: str | None = None) -> torch.dtype:
    """The compute dtype. "auto": `preferred` if the version has one, else bfloat16 where the device
    multiplies it
    in hardware, else float32; never float16 by itself. Raises DeviceError for an unknown name."""
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

    Where float32 was chosen automatically and does not fit, a component keeps its stored dtype and is widened
    as it is used. `together`: all components stay loaded. Raises NotEnoughMemoryError naming stage and sizes.
    """
    available = available_memory(device)
    size = dtype.itemsize
    stored: set[str] = set()
    notes = []
    for need in sorted(needs, key=lambda need: -need.parameters):
        activations = need.activations * size // 4 + OVERHEAD
        full = need.parameters * size
        kept = (
            sum(n.parameters * size for n in needs if n is not need and n.role not in stored)
            if together
            else 0
        )
        if full + activations + kept <= available:
            continue
        if automatic and need.stored_bytes < full and need.stored_bytes + activations + kept <= available:
            stored.add(need.role)
            name = str(dtype).removeprefix("torch.")
            notes.append(
                f"{need.role}: {full / GB:.1f} GB in {name} does not fit, so its weights stay as stored "
                f"({need.stored_bytes / GB:.1f} GB) and are widened as they are used"
            )
            continue
        raise NotEnoughMemoryError(
            _too_large(need, min(full, need.stored_bytes) + activations + kept, available)
        )
    return Placement(device, dtype, frozenset(stored), tuple(notes))


def _too_large(need: StageNeed, wanted: int, available: int) -> str:
    """Names the quantised file that would fit: bytes a weight of the usual GGUF types."""
    types = (
        ("Q8_0", 34 / 32),
        ("Q5_K", 176 / 256),
        ("Q4_K", 144 / 256),
        ("Q3_K", 110 / 256),
        ("Q2_K", 84 / 256),
    )
    fitting = [
        (name, need.parameters * size)
        for name, size in types
        if need.parameters * size * 1.1 + 2e9 < available
    ]
    hint = (
        f"a {fitting[0][0]} GGUF ({fitting[0][1] / GB:.1f} GB) would fit, once GGUF files can be read"
        if fitting
        else ""
    )
    return (
        f"the {need.role} stage needs {wanted / GB:.1f} GB of memory, {available / GB:.1f} GB are available: "
        f"free some or use another machine{'; ' + hint if hint else ''}"
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
