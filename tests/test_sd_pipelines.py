"""Whole runs against diffusers' pipelines, with the same tiny procedural weights and the same noise.

The references are written by tools/make_pipeline_references.py, in an environment of its own: what the UNet
is given at every step, and the last latents. Where ours parts from diffusers on purpose, the references were
made our way: a picture is encoded to the mean of its distribution, where diffusers draws a sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from helpers_sd import networks, open_model, small_info, write_folder
from pipeline_cases import CASES, HEIGHT, PROMPT, WIDTH, Case, mask, noise, picture
from procedural import fill
from safetensors.torch import load_file
from torch import Tensor

from flux_sd import sd_generation, sd_plan
from flux_sd.model_loader import Model
from flux_sd.request import GenerationRequest
from flux_sd.sd_generation import Conditioning, Original, SdRun
from flux_sd.versions import SDVersion

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "pipelines"
TOLERANCE = json.loads((STORED / "manifest.json").read_text(encoding="utf-8"))["tolerance"]
Outputs = dict[str, Tensor]


@cache
def stored() -> Outputs:
    return load_file(STORED / "pipelines.safetensors")


def reference(name: str) -> Outputs:
    """The tensors of one case."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in stored().items() if key.startswith(prefix)}


class Procedural:
    """Stands for NoiseSource: the procedural tensors that the pipelines were given, in the same order."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        assert len(seeds) == 1 and shape == (4, HEIGHT // 8, WIDTH // 8)
        self.drawn = 0

    def draw(self) -> Tensor:
        self.drawn += 1
        return noise(self.drawn - 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    """One small model of procedural weights for each version, kept loaded."""
    opened: dict[str, Model] = {}

    def model(key: str) -> Model:
        if key not in opened:
            info = small_info(SDVersion.parse(key))
            made = {role: fill(network) for role, network in networks(info).items()}
            folder = write_folder(tmp_path_factory.mktemp(key), info, made=made)
            opened[key] = open_model(folder, info, keep_loaded=True)
        return opened[key]

    yield model
    for each in opened.values():
        each.close()


def request(case: Case) -> GenerationRequest:
    """The case in our words."""
    return GenerationRequest(
        PROMPT,
        WIDTH,
        HEIGHT,
        case.steps,
        case.guidance,
        seed=0,
        negative_prompt=case.negative,
        guidance_rescale=case.rescale,
        sampler=case.sampler,
        schedule=case.schedule,
        init_image=None if case.strength is None else picture(),
        mask=mask() if case.masked else None,
        strength=case.strength,
    )


@contextmanager
def watched(model: Model, seen: Outputs) -> Iterator[None]:
    """While open, `seen` is filled with what the UNet is given, under the references' names."""

    def look(_module: Any, given: tuple[Any, ...]) -> None:
        number = sum(name.endswith(".x") for name in seen)
        rows, time, context, pooled, sizes = given
        seen[f"step.{number}.x"] = rows.clone()
        assert (time == time[0]).all()
        seen[f"step.{number}.t"] = time[0].clone()
        if number == 0:
            seen["context"] = context.clone()
            seen.update({} if pooled is None else {"text_embeds": pooled.clone(), "time_ids": sizes.clone()})

    hook = model.components.network("unet").register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def run(model: Model, case: Case, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """What our UNet is given at each step, and the last latents."""
    seen: Outputs = {}
    monkeypatch.setattr(sd_generation, "NoiseSource", Procedural)
    with watched(model, seen):
        (*_, last) = model.steps(request(case))
    return {**seen, "latents": last.latents}


def worst(ours: Outputs, name: str) -> float:
    """The largest relative difference over all tensors of a case, which must be the same ones."""
    theirs = reference(name)
    assert ours.keys() == theirs.keys()
    apart = {}
    for key, expected in theirs.items():
        assert ours[key].shape == expected.shape, key
        apart[key] = golden.difference(ours[key], expected).relative
    print(f"{name}: {max(apart.values()):.1e} at {max(apart, key=lambda key: apart[key])}")
    return max(apart.values())


def tolerance(name: str) -> float:
    return float(TOLERANCE["sdxl" if name.startswith("sdxl") else "sd"])


@pytest.mark.parametrize("name", CASES)
def test_the_unet_is_given_at_every_step_what_diffusers_gives_it(
    name: str, models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = run(models(CASES[name].model), CASES[name], monkeypatch)
    assert worst(ours, name) <= tolerance(name)


def test_every_small_model_and_every_task_is_among_the_cases() -> None:
    tasks = {(case.model, case.strength is not None, case.masked) for case in CASES.values()}
    assert {model for model, _, _ in tasks} == {
        "sd15", "sd15-inpaint", "sd21", "sd2-inpaint", "sdxl", "sdxl-turbo", "sdxl-inpaint",
    }  # fmt: skip
    assert {(picture, masked) for model, picture, masked in tasks if model in ("sd15", "sdxl")} >= {
        (False, False), (True, False), (True, True),
    }  # fmt: skip


# What a wrong edit would do: each must be noticed in its case, or the comparison above would be worthless.


def _original(change: Callable[[Original], Original]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        look = SdRun.look

        def changed(self: SdRun) -> Original | None:
            found = look(self)
            assert found is not None
            return change(found)

        monkeypatch.setattr(SdRun, "look", changed)

    return mutate


def _inverted(found: Original) -> Original:
    assert found.mask is not None
    return found._replace(mask=1 - found.mask)


def _swapped(found: Original) -> Original:
    """The mask behind the masked latents."""
    assert found.mask is not None and found.masked is not None
    return found._replace(mask=found.masked[:, :1], masked=torch.cat([found.masked[:, 1:], found.mask], 1))


def _conditioning(change: Callable[[Conditioning], Conditioning]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        made = SdRun._conditioning
        monkeypatch.setattr(SdRun, "_conditioning", lambda *rest: change(made(*rest)))

    return mutate


def _width_first(given: Conditioning) -> Conditioning:
    assert given.sizes is not None
    return given._replace(sizes=given.sizes[:, [1, 0, 2, 3, 5, 4]])


def _patched(name: str, value: Any, of: Any = sd_generation) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(of, name, value)


def _without_rescale(uncond: Tensor, cond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    return uncond + guidance * (cond - uncond)


def _last_states(outputs: Sequence[Any], hidden: str) -> Tensor:
    return torch.cat([output.last_hidden_state for output in outputs], dim=-1)


def _one_step_early(steps: int, strength: float | None) -> int:
    return max(sd_plan.first_step(steps, strength) - 1, 0)


MUTANTS = {
    "mask inverted, 9 channels": ("sd15_inpaint", _original(_inverted)),
    "mask inverted, blended": ("sd15_blended", _original(_inverted)),
    "mask behind the masked picture": ("sd15_inpaint", _original(_swapped)),
    "the picture not masked": (
        "sd2_inpaint",
        _original(lambda found: found._replace(masked=found.latents)),
    ),
    "width before height": ("sdxl", _conditioning(_width_first)),
    "negative prompt last": (
        "sd15",
        _conditioning(lambda given: given._replace(context=given.context.flip(0))),
    ),
    "XL's states after the last layer": ("sdxl", _patched("text_states", _last_states)),
    "guidance not rescaled": ("sd15", _patched("guide", _without_rescale)),
    "one step more of a picture": ("sd15_img2img", _patched("first_step", _one_step_early)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_edit_is_noticed(
    mutant: str, models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate = MUTANTS[mutant]
    mutate(monkeypatch)
    model = models(CASES[name].model)
    model.components.texts.clear()
    ours = run(model, CASES[name], monkeypatch)
    model.components.texts.clear()
    same = ours.keys() == reference(name).keys()
    assert not same or worst(ours, name) > 100 * tolerance(name)
