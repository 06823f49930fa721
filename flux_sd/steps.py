"""What every kind of generation shares: seeds and noise, finite checks, cancel, previews, timings.

Floor 4.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NonFiniteError, RequestError
from .request import CancelToken, Event, GenerationRequest
from .versions import VersionInfo

OnEvent = Callable[[Event], None]
# torch's generators take 64 bits; the sign is left out so that a seed reads the same everywhere.
MAX_SEED = 2**63 - 1
MAX_BATCH = 256
MAX_SIDE = 16_384  # pixels


def choose_seed(seed: int | None, batch: int) -> int:
    """`seed`, or one drawn from the system, short enough to type. Raises RequestError outside 0..2^63-1."""
    if seed is None:
        return secrets.randbelow(2**32)
    if not 0 <= seed <= MAX_SEED - batch:
        raise RequestError(f"seed {seed} is outside 0..{MAX_SEED - batch}")
    return seed


def refuse_fields(info: VersionInfo, request: GenerationRequest, names: Sequence[str]) -> None:
    """Raises RequestError for a field that is given and that the version has no use for."""
    for name in names:
        if getattr(request, name) is not None:
            raise RequestError(f"{name} is not used by {info.key}: leave it out")


def check_ranges(plan: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises RequestError for a field of a plan that is outside its range, and for previews that are never
    due; None is in every range."""
    for name, (low, high) in ranges.items():
        value = getattr(plan, name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} {value} is outside {low:g}..{high:g}")
    every = plan.preview_every
    if every is not None and every < 1:
        raise RequestError(f"preview_every {every} is not a number of steps: give 1 or more")


def check_size(info: VersionInfo, width: int, height: int, rule: str) -> tuple[int, int]:
    """(width, height) if the version can paint it. rule "up" rounds up as Candle does; "refuse" raises
    RequestError naming the nearest sizes."""
    multiple = info.multiple
    if width < multiple or height < multiple:
        raise RequestError(f"{width}x{height} pixels: the least is {multiple}x{multiple}")
    fits = width % multiple == 0 and height % multiple == 0
    up = (-(-width // multiple) * multiple, -(-height // multiple) * multiple)
    if fits or rule == "up":
        return up
    down = (max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple))
    raise RequestError(
        f"{width}x{height} pixels: {info.key} needs multiples of {multiple}; "
        f"the nearest are {down[0]}x{down[1]} and {up[0]}x{up[1]}"
    )


class NoiseSource:
    """Unit noise for images that run together, each from a generator of its own on the CPU: the same on every
    device, in every dtype, in every batch."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape = shape

    def draw(self) -> Tensor:
        """The next noise of each image, float32 [B,*shape]."""
        drawn = [torch.randn((1, *self._shape), generator=generator) for generator in self._generators]
        return torch.cat(drawn)


def check_latents(latents: Tensor, batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Ready-made noise as float32 [batch, C, H/8, W/8] on the CPU. Raises RequestError for another shape or
    NaN."""
    expected = (batch, *shape)
    if tuple(latents.shape) != expected or not latents.is_floating_point():
        found = f"{latents.dtype} of shape {list(latents.shape)}".removeprefix("torch.")
        raise RequestError(f"latents are {found}; this request needs floats of shape {list(expected)}")
    latents = latents.detach().to("cpu", torch.float32)
    if not torch.isfinite(latents).all():
        raise RequestError("latents hold NaN or infinity")
    return latents


def check_finite(tensor: Tensor, stage: str, dtype: torch.dtype, step: int | None = None) -> None:
    """Raises NonFiniteError if `tensor`, the output of `stage`, holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(stage, dtype_name(dtype), step)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def cancellable(module: nn.Module, cancel: CancelToken | None) -> Iterator[None]:
    """While open, `cancel` stops `module` before the next of its blocks (any submodule that has parts
    itself)."""
    if cancel is None:
        yield
        return
    cancel.check()

    def look(*_: object) -> None:
        cancel.check()

    hooks = [
        part.register_forward_pre_hook(look)
        for part in module.modules()
        if any(True for _ in part.children())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def preview_image(info: VersionInfo, x0: Tensor) -> Tensor:
    """Latents [C, h, w] -> [3, h, w] in about -1..1, by the version's linear map: no decoder runs."""
    if not info.preview:
        raise RequestError(f"{info.key} has no preview map")
    colours = torch.tensor(info.preview, dtype=torch.float32)  # [C,3]
    bias = torch.tensor(info.preview_bias, dtype=torch.float32)[:, None, None]
    return torch.einsum("chw,cr->rhw", x0.detach().to("cpu", torch.float32), colours) + bias


class Timings:
    """Seconds spent by stage; the stages of one run add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
