"""FLUX with pictures against diffusers' pipelines: the same tiny procedural weights, noise and text states.

The references are written by tools/make_flux_editing_references.py, in an environment of its own: what the
transformer is given at every step, and the last latents. Strength means something else there (it counts
steps), so ours is asked to start at the time that theirs started at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from flux_editing_cases import CASES, HEIGHT, TEXT, WIDTH, Case, mask, noise, picture, reference, text
from helpers_flux import editing_info, networks, open_model, write_folder
from procedural import fill
from safetensors.torch import load_file
from torch import Tensor

from flux_sd import flux_editing, flux_generation
from flux_sd.canvas import fit_canvas
from flux_sd.flux_editing import Edit, to_encode
from flux_sd.flux_loader import EncodedText
from flux_sd.model_loader import Model
from flux_sd.request import GenerationRequest
from flux_sd.sampling import State, begin_at, pack

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "pipelines"
TOLERANCE = json.loads((STORED / "flux_editing.json").read_text(encoding="utf-8"))["tolerance"]["relative"]
PROMPT = "any: its states are given"
Outputs = dict[str, Tensor]


@cache
def stored() -> Outputs:
    return load_file(STORED / "flux_editing.safetensors")


def expected(name: str) -> Outputs:
    """The tensors of one case."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in stored().items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Model]]:
    """One small model of procedural weights for each version, kept loaded, that knows the text states."""
    opened: dict[str, Model] = {}

    def model(key: str) -> Model:
        if key not in opened:
            info = replace(editing_info(key), reference_sizes=())
            made = {role: fill(network) for role, network in networks(info).items()}
            folder = write_folder(tmp_path_factory.mktemp(key), info, made=made)
            opened[key] = open_model(folder, info, keep_loaded=True)
            opened[key].components.texts[PROMPT, TEXT] = EncodedText(*text())
        return opened[key]

    yield model
    for each in opened.values():
        each.close()


def request(case: Case, start: float) -> GenerationRequest:
    """The case in our words."""
    return GenerationRequest(
        PROMPT,
        WIDTH,
        HEIGHT,
        case.steps,
        case.guidance,
        seed=0,
        latents=noise(),
        init_image=None if case.strength is None else picture(),
        mask=mask() if case.masked else None,
        strength=None if case.strength is None else start,
        control_image=picture("control") if case.control else None,
        reference=reference() if case.reference else None,
    )


@contextmanager
def watched(model: Model, seen: Outputs) -> Iterator[None]:
    """While open, `seen` is filled with what the transformer is given, under the references' names."""

    def look(_module: Any, given: tuple[Any, ...]) -> None:
        number = sum(name.endswith(".img") for name in seen)
        img, img_ids, _txt, _txt_ids, time, _vec, guidance = given
        seen[f"step.{number}.img"], seen[f"step.{number}.t"] = img.clone(), time[0].clone()
        if number == 0:
            seen["img_ids"] = img_ids[0].clone()
            seen.update({} if guidance is None else {"guidance": guidance[0].clone()})

    hook = model.components.network("transformer").register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def run(model: Model, name: str) -> Outputs:
    """What our transformer is given at each step, and the last latents."""
    start, seen = expected(name)["start"], Outputs()
    with watched(model, seen):
        (*_, last) = model.steps(request(CASES[name], start.item()))
    return {**seen, "start": start, "latents": pack(last.latents)}


def worst(ours: Outputs, name: str) -> float:
    """The largest relative difference over all tensors of a case, which must be the same ones."""
    theirs, apart = expected(name), {}
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        assert ours[key].shape == wanted.shape, key
        apart[key] = golden.difference(ours[key], wanted).relative
    print(f"{name}: {max(apart.values()):.1e} at {max(apart, key=lambda key: apart[key])}")
    return max(apart.values())


@pytest.mark.parametrize("name", CASES)
def test_the_transformer_is_given_at_every_step_what_diffusers_gives_it(
    name: str, models: Callable[[str], Model]
) -> None:
    assert worst(run(models(CASES[name].model), name), name) <= TOLERANCE


def test_every_kind_of_input_is_among_the_cases() -> None:
    assert {case.model for case in CASES.values()} == {
        "flux-dev", "flux-schnell", "flux-fill", "flux-canny", "flux-depth", "flux-kontext",
    }  # fmt: skip
    assert expected("fill")["step.0.img"].shape == (1, 12, 384)
    assert expected("control")["step.0.img"].shape == (1, 12, 128)
    assert expected("kontext")["step.0.img"].shape == (1, 12 + 10, 64)
    assert expected("kontext")["img_ids"][12:, 0].eq(1).all()


def test_nothing_is_encoded_that_nobody_reads() -> None:
    """A picture of which nothing is left, and that which Fill reads only with a hole."""
    for key, strength, names in (
        ("flux-dev", 1.0, []), ("flux-dev", 0.99, ["init.latents"]), ("flux-fill", 1.0, ["masked.latents"]),
        ("flux-fill", 0.99, ["init.latents", "masked.latents"]),
    ):  # fmt: skip
        info = editing_info(key)
        white = mask() if info.is_inpainting else None
        canvas = fit_canvas(info, GenerationRequest("", init_image=picture(), mask=white), cell=8)
        assert list(to_encode(info, canvas, strength)) == names


# What a wrong edit would do: each must be noticed in its case, or the comparison above would be worthless.
Mutate = Callable[[pytest.MonkeyPatch], None]


def _edit(change: Callable[[Edit], Edit]) -> Mutate:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        made = flux_generation.arrange
        monkeypatch.setattr(flux_generation, "arrange", lambda *rest: change(made(*rest)))

    return mutate


def _inverted(name: str) -> Mutate:
    """The mask of the canvas inverted for one of the two functions that read it."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        made = getattr(flux_generation, name)

        def changed(info: Any, canvas: Any, *rest: Any) -> Any:
            return made(info, canvas._replace(mask=1 - canvas.mask), *rest)

        monkeypatch.setattr(flux_generation, name, changed)

    return mutate


def _mask_first(edit: Edit) -> Edit:
    assert edit.channels is not None
    masked, mask = edit.channels.split([64, 256], dim=2)
    return edit._replace(channels=torch.cat([mask, masked], dim=2))


def _patched(of: Any, name: str, value: Any) -> Mutate:
    return lambda monkeypatch: monkeypatch.setattr(of, name, value)


def _channels_first(self: State, img: Tensor) -> Tensor:
    return img if self.channels is None else torch.cat([self.channels, img], dim=2)


def _columns_first(mask: Tensor, cell: int) -> Tensor:
    return torch.nn.functional.pixel_unshuffle(mask[None].mT, cell).mT


def _kept_clean(self: Edit, latents: Tensor, time: float, noise: Tensor) -> Tensor:
    assert self.mask is not None and self.start is not None
    return (1 - self.mask) * self.start + self.mask * latents


def _noise_for_picture(self: Edit, noise: Tensor, time: float) -> Tensor:
    return time * self.start + (1 - time) * noise


MUTANTS: dict[str, tuple[str, Mutate]] = {
    "Fill: mask inverted": ("fill", _inverted("arrange")),
    "Fill: the wrong part is hidden": ("fill", _inverted("to_encode")),
    "Fill: mask before the masked picture": ("fill", _edit(_mask_first)),
    "Fill: pixels of a cell column by column": (
        "fill",
        _patched(flux_editing, "mask_channels", _columns_first),
    ),
    "Fill: channels before the latents": ("fill", _patched(State, "seen", _channels_first)),
    "control: channels before the latents": ("control", _patched(State, "seen", _channels_first)),
    "blended: mask inverted": ("blended", _inverted("arrange")),
    "blended: what is kept is not noised": ("blended", _patched(Edit, "keep", _kept_clean)),
    "Kontext: reference numbered as the picture": (
        "kontext",
        _patched(flux_editing, "REFERENCE_INDEX", 0),
    ),
    "Kontext: no reference": ("kontext", _edit(lambda edit: edit._replace(more=None, more_ids=None))),
    "img2img: shares exchanged": ("img2img", _patched(Edit, "begin", _noise_for_picture)),
    "img2img: one step more": (
        "img2img",
        _patched(flux_generation, "begin_at", lambda times, start: [times[1], *begin_at(times, start)]),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_edit_is_noticed(
    mutant: str, models: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate = MUTANTS[mutant]
    mutate(monkeypatch)
    ours = run(models(CASES[name].model), name)
    same = ours.keys() == expected(name).keys() and ours["img_ids"].shape == expected(name)["img_ids"].shape
    assert not same or worst(ours, name) > 100 * TOLERANCE
