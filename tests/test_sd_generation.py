"""From a request to pictures, on small Stable Diffusion models of random weights of every released kind."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import difference
from helpers_sd import half_mask, open_model, peak, picture, small_info, write_folder
from PIL import Image
from torch import Tensor, nn

from flux_sd import device, image
from flux_sd.components import Components
from flux_sd.errors import (
    Cancelled,
    NonFiniteError,
    NotEnoughMemoryError,
    PromptTooLongError,
    RequestError,
)
from flux_sd.image import pixel_hash
from flux_sd.model_loader import Model
from flux_sd.numerics import reference
from flux_sd.request import CancelToken, Complete, Event, GenerationRequest, Preview, Progress, Result
from flux_sd.sd_generation import guide
from flux_sd.sd_loader import networks_of
from flux_sd.stages import preview_pixels
from flux_sd.unet import UNet, UNetConfig
from flux_sd.versions import SDVersion

VERSIONS = [version for version in SDVersion if version.info.sd is not None and version.info.repo is not None]
KEYS = [version.info.key for version in VERSIONS]
ORDINARY = [version.info.key for version in VERSIONS if not version.info.is_inpainting]
INPAINTING = [version.info.key for version in VERSIONS if version.info.is_inpainting]
# One for each way in which they differ: a single encoder or two, guided or not, 4 channels or 9.
GUIDED = ["sd15", "sd21", "sdxl", "sdxl-inpaint"]
REQUEST = GenerationRequest(prompt="a red kite over the sea", seed=5)
LONG = "one two three four five six seven eight nine ten " * 9
Opener = Callable[..., Model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files of a small model of a released kind, written once."""
    written: dict[str, Path] = {}

    def find(key: str) -> Path:
        if key not in written:
            info = small_info(SDVersion.parse(key))
            written[key] = write_folder(tmp_path_factory.mktemp(key), info)
        return written[key]

    return find


@pytest.fixture(scope="module")
def model_of(folder: Callable[[str], Path]) -> Iterator[Opener]:
    """A small model of a kind, opened once for each set of options and shared, with no prompt remembered."""
    opened: dict[tuple[object, ...], Model] = {}

    def find(key: str, **options: Any) -> Model:
        wanted = (key, *sorted(options.items(), key=str))
        if wanted not in opened:
            opened[wanted] = open_model(folder(key), small_info(SDVersion.parse(key)), **options)
        opened[wanted].components.texts.clear()
        return opened[wanted]

    yield find
    for model in opened.values():
        model.close()


@pytest.fixture(scope="module")
def kept(model_of: Opener) -> Callable[[str], Model]:
    """A model that stays loaded; leave its weights as they are."""
    return partial(model_of, keep_loaded=True)


@pytest.fixture(scope="module")
def staged(model_of: Opener) -> Callable[[str], Model]:
    """A model whose networks are loaded for their stage and freed after it."""
    return partial(model_of, keep_loaded=False)


def request_for(key: str, **changes: Any) -> GenerationRequest:
    """A request that the version can serve: with a picture and a mask for the inpainting ones."""
    whole = {"init_image": picture(), "mask": half_mask()} if key in INPAINTING else {}
    return replace(REQUEST, **{**whole, **changes})


def taps(model: Model, request: GenerationRequest) -> tuple[dict[str, Tensor], list[Result]]:
    """A run's recorded tensors, and what it made."""
    seen: dict[str, Tensor] = {}
    results = model.generate(request, tap=lambda name, tensor: seen.update({name: tensor.clone()}))
    return seen, results


def same(a: Result, b: Result) -> bool:
    """Bit for bit."""
    return torch.equal(a.latents, b.latents) and pixel_hash(a.image) == pixel_hash(b.image)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return difference(ours, theirs).relative


def watched(model: Model, role: str, call: Callable[..., None]) -> Callable[[], None]:
    """`call` before every forward of a kept network; returns what takes it off again."""
    return model.components.network(role).register_forward_pre_hook(call).remove


# ------------------------------------------------------------------------------------------ every kind


@pytest.mark.parametrize("key", KEYS)
def test_a_picture_of_the_asked_size_and_its_record(key: str, kept: Callable[[str], Model]) -> None:
    size = {"init_image": picture(40, 24), "mask": half_mask(40, 24)} if key in INPAINTING else {}
    seen, (result,) = taps(kept(key), request_for(key, width=40, height=24, **size))  # latents of 5 x 3
    info = small_info(SDVersion.parse(key))
    assert result.image.size == (40, 24) and result.image.mode == "RGB" and result.notes == []
    assert result.latents.shape == result.noise.shape == (4, 3, 5)
    record = result.metadata
    assert info.sd is not None
    assert (record["model"], record["seed"], record["width"], record["height"]) == (key, 5, 40, 24)
    assert (record["steps"], record["guidance"]) == (info.steps, info.guidance)
    assert (record["sampler"], record["schedule"]) == (info.sd.sampler, info.sd.schedule)
    assert record["prediction"] == info.sd.prediction or key == "sd21"
    assert {"load", "encode", "denoise", "decode"} <= set(result.timings)
    assert {"clip.ids", "clip.hidden", "noise", "timesteps", "step.0.latents", "step.0.noise_pred"} <= set(
        seen
    )
    assert seen["image"].shape == (1, 3, 24, 40) and torch.equal(seen["latents"][0], result.latents)
    assert set(json.loads(json.dumps(record))["files"]) >= {"unet", "vae", "clip", "clip_tokenizer"}
    assert "/" not in json.dumps(record["files"])


def rebuilt(record: dict[str, Any], **pictures: Any) -> GenerationRequest:
    """A request from nothing but a record, and the pictures that it names by their hashes."""
    names = {field.name for field in fields(GenerationRequest)} - {"latents", "init_image", "mask", "batched"}
    return GenerationRequest(**{name: record[name] for name in names & record.keys()}, **pictures)


@pytest.mark.parametrize("key", KEYS)
def test_a_record_repeats_its_run(key: str, kept: Callable[[str], Model]) -> None:
    first = kept(key).generate(request_for(key, batch=2, steps=2))[1]
    pictures = {"init_image": picture(), "mask": half_mask()} if key in INPAINTING else {}
    assert first.metadata["init_image"] == (pixel_hash(picture()) if pictures else None)
    again = kept(key).generate(rebuilt(json.loads(json.dumps(first.metadata)), **pictures))[0]
    assert same(first, again) and again.metadata == first.metadata


def test_a_record_of_everything_that_can_be_asked_repeats_its_run(kept: Callable[[str], Model]) -> None:
    asked = replace(
        REQUEST, width=48, height=32, steps=5, guidance=3.0, negative_prompt="rain", guidance_rescale=0.5,
        sampler="euler_ancestral", schedule="karras", init_image=picture(90, 32), mask=half_mask(90, 32),
        strength=0.6, fit="crop", composite=False, vae_tiling=True,
    )  # fmt: skip
    first = kept("sd15").generate(asked)[0]
    assert first.metadata["steps_run"] == 3 and first.metadata["mask"] == pixel_hash(half_mask(90, 32))
    again = kept("sd15").generate(
        rebuilt(first.metadata, init_image=picture(90, 32), mask=half_mask(90, 32))
    )[0]
    assert same(first, again) and again.metadata == first.metadata
    plain = kept("sd15").generate(replace(asked, fit="stretch"))[0]
    assert not same(first, plain) and plain.metadata["fit"] == "stretch"


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_candle_s_numerics_paint_too(key: str, model_of: Opener) -> None:
    seen, (result,) = taps(model_of(key, numerics="candle"), replace(REQUEST, steps=2))
    assert result.metadata["numerics"] == "candle" and result.image.size == (48, 32)
    assert ("clip.pooled" in seen) == (key == "sdxl")


# ------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize(
    ("key", "sampler"),
    [("sd15", None), ("sd15", "dpm++_2m"), ("sdxl", "euler_ancestral"), ("sd2-inpaint", None)],
)
def test_an_image_of_a_batch_is_that_image_alone(
    key: str, sampler: str | None, kept: Callable[[str], Model]
) -> None:
    asked = request_for(key, sampler=sampler, steps=2)
    alone = [kept(key).generate(replace(asked, seed=5 + i))[0] for i in range(3)]
    batch = kept(key).generate(replace(asked, batch=3))
    assert all(same(a, b) for a, b in zip(alone, batch, strict=True))
    assert [result.metadata["seed"] for result in batch] == [5, 6, 7]
    assert not same(alone[0], alone[1])
    together = kept(key).generate(replace(asked, batch=3, batched=True))
    assert max(apart(a.latents, b.latents) for a, b in zip(together, alone, strict=True)) < 1e-4
    assert [result.metadata["batched"] for result in (together[0], batch[0])] == [3, 1]
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(together, alone, strict=True))


def test_noise_does_not_depend_on_the_dtype(model_of: Opener) -> None:
    noises = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = model_of("sdxl", dtype=dtype, keep_loaded=True)
        seen: dict[str, Tensor] = {}
        next(model.steps(REQUEST, tap=lambda name, tensor, seen=seen: seen.update({name: tensor})))
        noises.append(seen["noise"])
    assert all(noise.dtype == torch.float32 and torch.equal(noise, noises[0]) for noise in noises)


def test_given_latents_replace_the_first_noise_alone(kept: Callable[[str], Model]) -> None:
    asked = replace(REQUEST, sampler="euler_ancestral", batch=2)
    first = kept("sd15").generate(asked)
    again = kept("sd15").generate(replace(asked, latents=torch.stack([result.noise for result in first])))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert again[0].metadata["latents"] == "given" and first[0].metadata["latents"] == "from the seed"
    other = kept("sd15").generate(replace(asked, seed=99, latents=torch.stack([r.noise for r in first])))
    assert not same(other[0], first[0])  # the steps of another seed draw other noise


# ------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("key", GUIDED)
def test_guidance_is_one_batch_of_two(key: str, kept: Callable[[str], Model]) -> None:
    rows: list[tuple[int, ...]] = []
    stop = watched(kept(key), "unet", lambda _module, given: rows.append((len(given[0]), len(given[2]))))
    kept(key).generate(request_for(key, steps=2))
    kept(key).generate(request_for(key, steps=2, guidance=1.0))
    kept(key).generate(request_for(key, steps=1, batch=3, batched=True))
    stop()
    assert rows == [(2, 2), (2, 2), (1, 1), (1, 1), (6, 6)]


def test_guidance_leads_away_from_the_negative_prompt() -> None:
    uncond, cond = torch.randn(2, 2, 4, 6, 6)
    assert torch.allclose(guide(uncond, cond, 1.0), cond, atol=1e-6)
    assert torch.allclose(guide(uncond, cond, 7.5) - cond, 6.5 * (cond - uncond), atol=1e-5)


def test_rescaled_guidance_has_the_spread_of_the_prompt_s_own_prediction() -> None:
    uncond, cond = torch.randn(2, 3, 4, 6, 6)
    cond = cond * torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1, 1)  # each image by itself
    plain, full, half = (guide(uncond, cond, 7.5, rescale) for rescale in (0.0, 1.0, 0.5))
    spread = torch.tensor([part.std().item() for part in cond])
    assert torch.allclose(torch.tensor([part.std().item() for part in full]), spread, rtol=1e-5)
    assert torch.allclose(half, (plain + full) / 2, atol=1e-5)
    assert not torch.allclose(plain, full, atol=0.1)


@pytest.mark.parametrize("key", GUIDED)
def test_no_negative_prompt_and_an_empty_one(key: str, kept: Callable[[str], Model]) -> None:
    asked = request_for(key, steps=1)
    none, (without,) = taps(kept(key), asked)
    empty, (with_empty,) = taps(kept(key), replace(asked, negative_prompt=""))
    rain, (with_rain,) = taps(kept(key), replace(asked, negative_prompt="rain"))
    xl = SDVersion.parse(key).info.is_xl
    assert same(without, with_empty) != xl and not same(with_rain, with_empty)
    assert bool(none["uncond.clip.hidden"].any()) != xl
    assert empty["uncond.clip.hidden"].abs().min() > 0 and rain["uncond.clip.hidden"].abs().min() > 0
    assert torch.equal(none["clip.hidden"], empty["clip.hidden"])
    if xl:
        assert not none["uncond.clip.pooled"].any() and empty["uncond.clip.pooled"].any()
        assert "uncond.clip.ids" not in none
    assert (without.metadata["negative_prompt"], with_empty.metadata["negative_prompt"]) == (None, "")


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(("key", "pads"), [("sd15", ["</>"]), ("sd21", ["!"]), ("sdxl", ["</>", "!"])])
def test_each_encoder_s_prompt_is_filled_up_its_own_way(
    key: str, pads: list[str], kept: Callable[[str], Model]
) -> None:
    seen, _ = taps(kept(key), replace(REQUEST, steps=1))
    for role, pad in zip(("clip", "clip_2"), pads, strict=False):
        ids = seen[f"{role}.ids"][0].tolist()
        end = kept(key).components.tokenizers[role].eos_id
        assert len(ids) == 77 and set(ids[ids.index(end) + 1 :]) == {end if pad == "</>" else 0}
    assert ("clip_2.ids" in seen) == (len(pads) == 2)


@pytest.mark.parametrize("key", ["sd15", "sd21", "sdxl"])
def test_a_prompt_of_over_77_tokens_is_cut_and_reported(key: str, kept: Callable[[str], Model]) -> None:
    seen, (result,) = taps(kept(key), replace(REQUEST, prompt=LONG, steps=1))
    (note,) = result.notes
    assert note.startswith("CLIP reads the first 77 of ") and "; cut: '" in note
    assert ("CLIP 2 reads the first 77 of " in note) == (key == "sdxl")
    tokenizer = kept(key).components.tokenizers["clip"]
    assert seen["clip.ids"].shape == (1, 77) and seen["clip.ids"][0, -1] == tokenizer.eos_id
    (result,) = kept(key).generate(replace(REQUEST, negative_prompt=LONG, steps=1))
    (note,) = result.notes
    assert note.startswith("of the negative prompt CLIP reads the first 77 of ")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_strict_refuses_a_cut_before_a_weight_is_read(
    key: str, field: str, staged: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Components, "network", lambda *_: pytest.fail("a weight was read"))
    asked = replace(REQUEST, **{field: LONG}, strict_prompt=True, init_image=picture(), strength=0.5)
    with pytest.raises(PromptTooLongError, match="CLIP reads the first 77"):
        staged(key).generate(asked)


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
@pytest.mark.parametrize("negative", [None, "(rain:0.5)"])
def test_weights_in_prompts_are_noted_once(
    key: str, negative: str | None, kept: Callable[[str], Model]
) -> None:
    prompt = "a (red:1.3) kite over a (very blue:1.2) sea"
    (result,) = kept(key).generate(replace(REQUEST, prompt=prompt, negative_prompt=negative, steps=1))
    (note,) = result.notes
    assert note.startswith("weights are not interpreted: '(")


# ------------------------------------------------------------------------------------------ pictures


def roundtrip(model: Model, given: Image.Image) -> Image.Image:
    """What the autoencoder alone makes of a picture."""
    vae = model.components.network("vae")
    with torch.inference_mode():
        return image.to_picture(vae.decode(vae.encode(image.to_unit(given)[None]))[0])


@pytest.mark.parametrize("key", ORDINARY)
def test_strength_0_is_the_autoencoder_alone_and_strength_1_is_without_the_picture(
    key: str, kept: Callable[[str], Model]
) -> None:
    asked = replace(REQUEST, init_image=picture())
    (nothing, other) = kept(key).generate(replace(asked, strength=0.0, batch=2))
    assert pixel_hash(nothing.image) == pixel_hash(roundtrip(kept(key), picture())) == pixel_hash(other.image)
    assert nothing.metadata["steps_run"] == 0 and list(kept(key).steps(replace(asked, strength=0.0))) == []
    seen, (everything,) = taps(kept(key), replace(asked, strength=1.0))
    assert same(everything, kept(key).generate(REQUEST)[0])
    assert "init.latents" not in seen  # nothing is encoded for nothing


@pytest.mark.parametrize("key", ["sd15", "sd21", "sdxl"])
def test_the_start_falls_as_strength_rises(key: str, kept: Callable[[str], Model]) -> None:
    noises, distances = [], []
    for strength in (0.25, 0.5, 0.75, 1.0):
        seen, (result,) = taps(kept(key), replace(REQUEST, init_image=picture(), strength=strength, steps=4))
        run = round(4 * strength)
        assert result.metadata["steps_run"] == run and result.metadata["strength"] == strength
        assert f"step.{run - 1}.latents" in seen and f"step.{run}.latents" not in seen
        clean = seen.get("init.latents", torch.zeros(1, 4, 4, 6))
        begun, noise = seen["step.0.latents"], seen["noise"]
        # How much of noise is in the state, by least squares over picture and noise.
        parts = torch.stack([clean.flatten(), noise.flatten()], 1).double()
        fit = torch.linalg.lstsq(parts, begun.flatten()[:, None].double(), driver="gelsd").solution
        noises.append(abs(fit[1].item()))
        distances.append(apart(parts @ fit, begun.flatten()[:, None]))
    assert noises == sorted(noises) and noises[0] < 0.9 * noises[-1]
    assert max(distances) < 1e-5  # the state is made of the two and nothing else


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_a_resized_picture_is_noted(key: str, kept: Callable[[str], Model]) -> None:
    asked = replace(REQUEST, init_image=picture(96, 64), width=48, height=32, strength=0.5, steps=2)
    (result,) = kept(key).generate(asked)
    assert result.notes == ["init_image is resized from 96x64 to 48x32 pixels"]
    assert result.image.size == (48, 32)


# ------------------------------------------------------------------------------------------ inpainting


def halves(made: Image.Image) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Left, repainted; right, kept."""
    array = np.asarray(made)
    return array[:, :24], array[:, 24:]


@pytest.mark.parametrize("key", KEYS)
def test_what_the_mask_keeps_comes_back_byte_for_byte(key: str, kept: Callable[[str], Model]) -> None:
    asked = replace(REQUEST, init_image=picture(), mask=half_mask(), strength=0.5, steps=2)
    (result,) = kept(key).generate(asked)
    left, right = halves(result.image)
    own_left, own_right = halves(picture())
    assert right.tobytes() == own_right.tobytes() and (left != own_left).mean() > 0.9
    (bare,) = kept(key).generate(replace(asked, composite=False))
    assert (halves(bare.image)[1] != own_right).mean() > 0.5  # no autoencoder keeps every pixel
    assert halves(bare.image)[0].tobytes() == left.tobytes()
    assert [r.metadata["composite"] for r in (result, bare)] == [True, False]


@pytest.mark.parametrize(
    ("sampler", "strength"),
    [("ddim", 1.0), ("ddim", 0.5), ("euler", 0.5), ("euler_ancestral", 1.0), ("dpm++_2m", 0.5)],
)
def test_an_ordinary_model_is_given_back_what_it_shall_keep(
    sampler: str, strength: float, kept: Callable[[str], Model]
) -> None:
    asked = replace(
        REQUEST, init_image=picture(), mask=half_mask(), strength=strength, steps=4, sampler=sampler
    )
    seen, (result,) = taps(kept("sd15"), asked)
    assert torch.equal(seen["mask"], torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(1, 1, 4, 6))
    assert torch.equal(result.latents[..., 3:], seen["init.latents"][0, ..., 3:])
    assert apart(result.latents[..., :3], seen["init.latents"][0, ..., :3]) > 0.3
    # Between two steps it is the picture with the run's own noise, at the level of the next step.
    between, clean, noise = (seen[name][..., 3:] for name in ("step.1.latents", "init.latents", "noise"))
    parts = torch.stack([clean.flatten(), noise.flatten()], 1).double()
    fit = torch.linalg.lstsq(parts, between.flatten()[:, None].double(), driver="gelsd").solution
    assert apart(parts @ fit, between.flatten()[:, None]) < 1e-5 and (fit > 0.02).all()


@pytest.mark.parametrize("key", INPAINTING)
def test_an_inpainting_model_reads_mask_and_masked_picture(key: str, kept: Callable[[str], Model]) -> None:
    rows: list[Tensor] = []
    stop = watched(kept(key), "unet", lambda _module, given: rows.append(given[0].clone()))
    seen, _ = taps(kept(key), request_for(key, steps=2))
    stop()
    vae = kept(key).components.network("vae")
    pixels = image.to_unit(picture())[None]
    pixels[..., :24] = 0.0  # grey under the mask
    with torch.inference_mode():
        grey = vae.encode(pixels)
    assert [part.shape for part in rows] == [(2, 9, 4, 6)] * 2
    for part in rows:
        assert torch.equal(part[0], part[1]) and torch.equal(part[:1, 4:5], seen["mask"])
        assert torch.equal(part[:1, 5:], grey) and torch.equal(seen["masked.latents"], grey)


@pytest.mark.parametrize("key", ["sd15", "sd15-inpaint"])
def test_white_is_repainted_and_black_kept(key: str, kept: Callable[[str], Model]) -> None:
    black = Image.eval(half_mask(), lambda level: 255 - level)
    asked = replace(REQUEST, init_image=picture(), mask=black, steps=3)
    left, right = halves(kept(key).generate(asked)[0].image)
    own_left, own_right = halves(picture())
    assert left.tobytes() == own_left.tobytes() and (right != own_right).mean() > 0.9


# ------------------------------------------------------------------------------------------ steps


def test_steps_yield_latents_and_predictions_and_leave_no_mode_behind(kept: Callable[[str], Model]) -> None:
    seen = []
    for step in kept("sd15").steps(replace(REQUEST, batch=2)):
        assert not torch.is_inference_mode_enabled()
        seen.append(step)
    assert [(s.image, s.index, s.total, s.images) for s in seen] == [
        (i, n, 3, 2) for i in (0, 1) for n in (0, 1, 2)
    ]
    assert seen[0].latents.shape == seen[0].x0.shape == (1, 4, 4, 6)
    assert [s.sigma for s in seen[:3]] == sorted((s.sigma for s in seen[:3]), reverse=True)
    pictures = kept("sd15").decode(torch.cat([seen[2].latents, seen[5].latents]))
    results = kept("sd15").generate(replace(REQUEST, batch=2))
    assert [pixel_hash(p) for p in pictures] == [pixel_hash(r.image) for r in results]


@pytest.mark.parametrize("shape", [(1, 16, 4, 6), (4, 4, 6)])
def test_latents_of_another_shape_are_not_decoded(
    shape: tuple[int, ...], kept: Callable[[str], Model]
) -> None:
    with pytest.raises(RequestError, match=r"sd15 decodes \[batch, 4, H/8, W/8\]"):
        kept("sd15").decode(torch.zeros(shape))


def test_the_last_step_of_euler_is_its_own_prediction(kept: Callable[[str], Model]) -> None:
    *_, last = kept("sd15").steps(replace(REQUEST, sampler="euler"))
    assert last.sigma == 0.0 and torch.allclose(last.x0, last.latents, atol=1e-5)


def test_nothing_stays_loaded_after_leaving_the_loop(staged: Callable[[str], Model]) -> None:
    model = staged("sd15")
    expected = model.generate(REQUEST)[0]
    steps = model.steps(REQUEST)
    next(steps)
    assert model.components.loaded == {"unet"}
    steps.close()  # type: ignore[attr-defined]
    assert model.components.loaded == set()
    assert same(model.generate(REQUEST)[0], expected)


def test_a_bad_request_is_refused_when_the_steps_are_asked_for(kept: Callable[[str], Model]) -> None:
    with pytest.raises(RequestError, match="multiples of 8"):
        kept("sd15").steps(replace(REQUEST, width=50))  # nothing was iterated


def test_events_come_in_order_and_end_with_complete(staged: Callable[[str], Model]) -> None:
    events: list[Event] = []
    asked = replace(REQUEST, batch=2, preview_every=2, init_image=picture(), strength=1.0, mask=half_mask())
    results = staged("sdxl").generate(asked, on_event=events.append)
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert [stage for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage] == [
        "load vae", "load clip", "load clip_2", "load unet", "denoise", "load vae", "decode",
    ]  # fmt: skip
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(preview.index, preview.image) for preview in previews] == [(2, 0), (2, 1)]
    assert all(preview.picture.size == (48, 32) for preview in previews)
    assert isinstance(events[-1], Complete) and events[-1].results == results


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_a_preview_is_a_linear_map_of_the_prediction(key: str) -> None:
    info = SDVersion.parse(key).info
    latents = torch.zeros(4, 2, 2)
    dark = preview_pixels(info, latents)
    latents[1] = 1.0
    light = preview_pixels(info, latents)
    assert light.shape == (3, 16, 16)
    assert torch.allclose((light - dark)[:, 0, 0], torch.tensor(info.preview[1]), atol=1e-6)
    assert torch.allclose(dark[:, 0, 0], torch.tensor(info.preview_bias), atol=1e-6)


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("key", ["sdxl", "sd15-inpaint"])
def test_each_stage_is_gone_before_the_next_is_loaded(
    key: str, staged: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged(key)
    alive: list[weakref.ref[nn.Module]] = []
    load: Callable[..., nn.Module] = Components.network

    def watch(self: Components, role: str, *rest: object) -> nn.Module:
        if role not in self.loaded:
            assert all(ref() is None for ref in alive), f"a network is still in memory as {role} is loaded"
        network = load(self, role, *rest)
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(Components, "network", watch)
    model.generate(request_for(key, init_image=picture(), mask=half_mask(), batch=2))
    assert len(alive) >= 4 and model.components.loaded == set() and all(ref() is None for ref in alive)


def test_keep_loaded_keeps_and_a_prompt_is_encoded_once(kept: Callable[[str], Model]) -> None:
    model, calls = kept("sdxl"), list[int]()
    stop = watched(model, "clip_2", lambda *_: calls.append(1))
    first = model.generate(REQUEST)[0]
    second = model.generate(REQUEST)[0]
    assert len(calls) == 1 and same(first, second)
    model.generate(replace(REQUEST, negative_prompt=""))  # prompt and negative prompt
    model.generate(replace(REQUEST, negative_prompt="", seed=6))
    assert len(calls) == 3
    model.generate(replace(REQUEST, guidance=1.0))
    assert len(calls) == 4 and model.components.loaded == {"clip", "clip_2", "unet", "vae"}
    stop()


def test_a_request_too_large_for_the_memory_is_refused_before_a_weight_is_read(
    staged: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = staged("sd15")
    monkeypatch.setattr(device, "available_memory", lambda _: 2 * 10**9)
    monkeypatch.setattr(Components, "network", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(NotEnoughMemoryError, match="ask for a smaller picture"):
        model.generate(replace(REQUEST, width=16_384, height=16_384))


@pytest.mark.parametrize(
    ("change", "images"),
    [
        ({}, {"unet": 2, "vae": 1}),
        ({"guidance": 1.0}, {"unet": 1, "vae": 1}),
        ({"batch": 3}, {"unet": 2, "vae": 1}),
        ({"batch": 3, "batched": True}, {"unet": 6, "vae": 3}),
    ],
)
def test_memory_is_asked_for_as_many_images_as_go_through_at_once(
    change: dict[str, Any],
    images: dict[str, int],
    kept: Callable[[str], Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(Components, "check_room", lambda *given: asked.append(given[3]))
    kept("sd15").steps(replace(REQUEST, **change))
    assert asked == [images]


@pytest.mark.parametrize(
    "config",
    [
        replace(UNetConfig.sd15(), widths=(64, 128, 256, 256), context_dim=64),
        replace(UNetConfig.sdxl(), widths=(64, 128, 256), depths=(0, 1, 2), heads=(1, 2, 4), added_dim=None),
    ],
)
def test_a_unet_takes_no_more_than_predicted(config: UNetConfig) -> None:
    info = SDVersion.SD15.info
    assert info.sd is not None
    network = networks_of(replace(info, sd=replace(info.sd, unet=config)), reference())["unet"]
    unet = UNet(network.config).eval()
    given = torch.randn(2, 4, 32, 32), torch.full((2,), 500.0), torch.randn(2, 77, config.context_dim)
    taken, predicted = peak(lambda: unet(*given, None, None)) / 2, network.activations(256 * 256, 77)
    assert taken < predicted < 1.6 * taken


# ------------------------------------------------------------------------------------------ cancel


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("unet", "down_blocks.0.attentions.0"),
        ("unet", "up_blocks.1.resnets.1"),
        ("clip", "text_model.encoder.layers.0"),
        ("vae", "decoder.up.1"),
        ("vae", "encoder.down.1"),
    ],
)
def test_cancel_takes_effect_within_one_block_and_leaves_the_model_well(
    role: str, block: str, kept: Callable[[str], Model]
) -> None:
    model = kept("sd15")
    asked = replace(REQUEST, init_image=picture(), strength=0.7)
    expected = model.generate(replace(asked, prompt="before"))[0]
    token, network = CancelToken(), model.components.network(role)
    ran: list[str] = []
    handles = [
        part.register_forward_hook(partial(lambda name, *_: ran.append(name), name))
        for name, part in network.named_modules()
    ]
    inside = network.get_submodule(block)
    handles.append(inside.register_forward_pre_hook(lambda *_: token.cancel()))
    with pytest.raises(Cancelled):
        model.generate(asked, cancel=token)
    blocks = [name for name in ran if len(list(network.get_submodule(name).children()))]
    assert block not in blocks and "" not in blocks, "the network ran on"
    for handle in handles:
        handle.remove()
    again = model.generate(replace(asked, prompt="before"), cancel=CancelToken())[0]
    assert same(again, expected)
    assert not any(part._forward_pre_hooks for part in network.modules()), "a cancel hook stayed behind"


def test_a_cancelled_run_frees_its_memory_and_the_next_is_as_a_fresh_one(
    folder: Callable[[str], Path], staged: Callable[[str], Model]
) -> None:
    model, token = open_model(folder("sd15"), small_info(SDVersion.SD15)), CancelToken()

    def stop_at_two(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.index == 2:
            token.cancel()

    with pytest.raises(Cancelled):
        model.generate(replace(REQUEST, sampler="dpm++_2m"), on_event=stop_at_two, cancel=token)
    assert model.components.loaded == set()
    again = model.generate(replace(REQUEST, sampler="dpm++_2m"))[0]
    model.close()
    assert same(again, staged("sd15").generate(replace(REQUEST, sampler="dpm++_2m"))[0])


# ------------------------------------------------------------------------------------------ NaN, dtypes


@pytest.mark.parametrize(
    ("key", "role", "parameter", "stage"),
    [
        ("sd15", "clip", "text_model.final_layer_norm.bias", "CLIP"),
        ("sdxl", "clip", "text_model.final_layer_norm.bias", "CLIP"),
        ("sdxl", "clip_2", "text_projection.weight", "CLIP 2"),
        ("sd15", "unet", "conv_out.bias", "the UNet, step 1"),
        ("sd15", "vae", "decoder.conv_out.bias", "the autoencoder"),
        ("sd15", "vae", "encoder.conv_out.bias", "the autoencoder's encoder"),
        ("sd15-inpaint", "vae", "encoder.conv_out.bias", "the autoencoder's encoder"),
    ],
)
def test_nan_is_reported_with_its_stage_and_nothing_stays(
    key: str,
    role: str,
    parameter: str,
    stage: str,
    staged: Callable[[str], Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = staged(key)
    load: Callable[..., nn.Module] = model.components.network

    def damaged(asked: str, *rest: object) -> nn.Module:
        network = load(asked, *rest)
        if asked == role:
            network.get_parameter(parameter).data.fill_(float("nan"))
        return network

    monkeypatch.setattr(model.components, "network", damaged)
    with pytest.raises(NonFiniteError, match=f"^{stage} produced NaN or infinity in float32") as caught:
        model.generate(request_for(key, init_image=picture(), mask=half_mask(), strength=0.5, steps=4))
    assert caught.value.exit_code == 1 and model.components.loaded == set()


def test_nan_in_the_loop_is_reported_with_its_step(model_of: Opener) -> None:
    model, calls = model_of("sdxl", keep_loaded=True, dtype=torch.bfloat16), list[int]()

    def poison(_module: object, _inputs: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output * float("inf") if len(calls) == 2 else output

    hook = model.components.network("unet").register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="the UNet, step 2 produced NaN or infinity in bfloat16"):
        model.generate(REQUEST)
    hook.remove()


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("sd15", torch.bfloat16), ("sd21", torch.float16), ("sdxl", torch.bfloat16), ("sdxl", torch.float16)],
)
def test_half_precision_is_close_to_float32(
    key: str, dtype: torch.dtype, model_of: Opener, kept: Callable[[str], Model]
) -> None:
    asked = replace(REQUEST, guidance=3.0, init_image=picture(), strength=0.7)
    exact = kept(key).generate(asked)[0]
    model = model_of(key, dtype=dtype, keep_loaded=True)
    rough = model.generate(asked)[0]
    assert rough.metadata["dtype"] == str(dtype).removeprefix("torch.")
    assert apart(rough.latents, exact.latents) < (0.1 if dtype == torch.bfloat16 else 0.02)
    kinds = {role: {p.dtype for p in model.components.network(role).parameters()} for role in ("unet", "vae")}
    assert kinds == {"unet": {dtype}, "vae": {torch.float32 if dtype == torch.float16 else dtype}}


def test_an_autoencoder_that_outgrows_float16_survives_it(model_of: Opener) -> None:
    """Values beyond 65504 inside of it, as XL's has."""
    made = []
    for dtype in (torch.float32, torch.float16):
        model = model_of("sdxl", dtype=dtype, keep_loaded=True)
        vae, largest = model.components.network("vae"), list[float]()
        hook = vae.decoder.conv_in.register_forward_hook(
            lambda _m, _i, out, largest=largest: largest.append(out.mul_(1e6).abs().max().item())
        )
        made.append(np.asarray(model.decode(torch.ones(1, 4, 4, 6))[0]))
        hook.remove()
        assert largest[0] > 65_504
    assert np.array_equal(*made) and made[0].std() > 0


# ------------------------------------------------------------------------------------------ what is predicted


def test_zero_terminal_snr_is_taken_from_the_scheduler_s_config(tmp_path: Path) -> None:
    info = small_info(SDVersion.SD21)
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    model = open_model(write_folder(tmp_path / "v", info, scheduler=config), info)
    (result,) = model.generate(replace(REQUEST, schedule="trailing"))
    assert (result.metadata["prediction"], result.metadata["zero_terminal_snr"]) == ("v_prediction", True)
    folder = write_folder(tmp_path / "epsilon", info, scheduler={**config, "prediction_type": "epsilon"})
    with pytest.raises(RequestError, match="zero terminal SNR leaves no epsilon to predict"):
        open_model(folder, info).generate(REQUEST)
