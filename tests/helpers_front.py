"""A LoadedModel without networks, for the tests of the engine and of the command line.

Its picture is a pure function of the seed and the size. A prompt may hold commands: "slow" makes each step
take a twentieth of a second, "fail" raises in the second step, "nan" reports what
overflow would, "long" leaves a note.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux_sd.errors import NonFiniteError
from flux_sd.request import (
    CancelToken,
    Complete,
    Event,
    GenerationRequest,
    Preview,
    Progress,
    Result,
    Step,
)
from flux_sd.versions import SDVersion


class FakeModel:
    """Keeps count of what was done to it: `requests`, `closed`."""

    version = SDVersion.TINY_FLUX

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.closed = 0

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed += 1

    def steps(
        self,
        request: GenerationRequest,
        *,
        cancel: CancelToken | None = None,
        on_event: Callable[[Event], None] | None = None,
        tap: object = None,
    ) -> Iterator[Step]:
        total = request.steps or 4
        token = cancel or CancelToken()
        for image in range(request.batch):
            latents = _noise(request, image)
            for index in range(total):
                token.check()
                time.sleep(0.05 if "slow" in request.prompt else 0.0)
                if index == 1 and "fail" in request.prompt:
                    raise RuntimeError("the fake was told to fail")
                if index == 1 and "nan" in request.prompt:
                    raise NonFiniteError("transformer", "float16", index)
                yield Step(index, total, 1 - (index + 1) / total, latents, latents, image, request.batch)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_event: Callable[[Event], None] | None = None,
        cancel: CancelToken | None = None,
    ) -> list[Result]:
        self.requests.append(request)
        emit = on_event or (lambda event: None)
        results = []
        for step in self.steps(request, cancel=cancel):
            emit(Progress("denoise", step.index + 1, step.total, 0.01, step.image, step.images))
            if request.preview_every and (step.index + 1) % request.preview_every == 0:
                emit(Preview(step.index, step.total, _picture(step.x0, 16, 16), step.image))
            if step.index + 1 == step.total:
                results.append(self._result(request, step))
        emit(Complete(results))
        return results

    def _result(self, request: GenerationRequest, step: Step) -> Result:
        width, height = request.width or 128, request.height or 128
        seed = (request.seed or 0) + step.image
        record: dict[str, Any] = {
            "prompt": request.prompt,
            "model": "tiny-flux",
            "seed": seed,
            "width": width,
            "height": height,
            "steps": step.total,
            "numerics": "reference",
        }
        notes = ["the prompt was cut"] if "long" in request.prompt else []
        return Result(
            _picture(step.latents, width, height),
            record,
            step.latents[0],
            _noise(request, step.image)[0],
            notes,
            {"denoise": 0.01, "decode": 0.02},
        )


def _noise(request: GenerationRequest, image: int) -> torch.Tensor:
    if request.latents is not None:
        return request.latents[image : image + 1]
    height, width = (request.height or 128) // 8, (request.width or 128) // 8
    generator = torch.Generator().manual_seed((request.seed or 0) + image)
    return torch.randn(1, 16, height, width, generator=generator)


def _picture(latents: torch.Tensor, width: int, height: int) -> Image.Image:
    small = ((latents[0, :3].clamp(-2, 2) + 2) * 63).to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.NEAREST)


def order(prompt: str = "a pizza", **changes: Any) -> GenerationRequest:
    return replace(GenerationRequest(prompt=prompt, seed=7), **changes)


def patch_model(monkeypatch: pytest.MonkeyPatch, model: FakeModel | None = None) -> list[dict[str, Any]]:
    """Puts the fake in the place of every model that the command line loads; returns the calls."""
    calls: list[dict[str, Any]] = []

    def load_model(version: SDVersion, path: Path | None = None, **options: Any) -> FakeModel:
        calls.append({"version": version, "path": path, **options})
        return model or FakeModel()

    monkeypatch.setattr("flux_sd.model_loader.load_model", load_model)
    return calls
