"""The embedded Stable Diffusion: what it is made of, and that it paints what was asked, every way it can.

Needs no font: what is painted has to be nearest to its own thumbnail among the 64 that are stored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tiny_flux_pictures import SIDE, listed, thumbnails

import flux_sd
from flux_sd.checkpoint import open_checkpoint
from flux_sd.image import difference, open_picture, pixel_hash, to_unit
from flux_sd.model_loader import embedded_folder, parts_of
from flux_sd.request import Event, GenerationRequest, Preview
from flux_sd.schedulers import SAMPLERS
from flux_sd.schedulers.sampler import METHODS
from flux_sd.text import ClipTokenizer
from flux_sd.versions import SDVersion

INFO = SDVersion.TINY_SD.info
FOLDER = embedded_folder(INFO)
REFERENCES = Path(__file__).parent.parent / "reference_outputs" / "candle"
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vae/diffusion_pytorch_model.safetensors",
    "clip": "text_encoder/model.safetensors",
}
PIZZA = GenerationRequest(prompt="a slice of pizza on a blue background", seed=1)
# LCM is not among them: it takes a network that was distilled for it, and is held to its oracle.
PAIRS = [(name, schedule) for name in SAMPLERS if name != "lcm" for schedule in METHODS[name].schedules]
# One pair for each sampler by default, no schedule twice; the others are slow.
DEFAULT = {
    "ddim": "leading", "ddpm": "trailing", "euler": "karras", "euler_ancestral": "sgm_uniform",
    "dpm++_2m": "simple", "uni_pc": "linspace",
}  # fmt: skip
CAPTIONS = [str(row["caption"]) for row in listed() if row["held_out"]]


@functools.cache
def sheet() -> np.ndarray:
    return thumbnails()


def shown(picture: Image.Image) -> str:
    """The caption of the thumbnail that is nearest."""
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return str(listed()[int(((sheet() - small) ** 2).mean((1, 2, 3)).argmin())]["caption"])


def right(model: flux_sd.LoadedModel, captions: Sequence[str], **asked: object) -> int:
    """How many of the captions are painted as they should be."""
    request = GenerationRequest(prompt="", seed=0, **asked)  # type: ignore[arg-type]
    return sum(shown(model.generate(replace(request, prompt=c))[0].image) == c for c in captions)


# what it is made of -----------------------------------------------------------------------------------------


def test_the_folder_is_an_ordinary_small_diffusers_checkpoint() -> None:
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 10_000_000
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {name for name, kind in index.items() if isinstance(kind, list) and kind[0]} == {
        path.name for path in FOLDER.iterdir() if path.is_dir()
    }
    for component, _, module in parts_of(SDVersion.TINY_SD):
        with open_checkpoint(FOLDER / FILES[component]) as checkpoint:
            ours = sum(parameter.numel() for parameter in module.parameters())
            theirs = sum(torch.Size(info.shape).numel() for info in checkpoint.infos.values())
            assert theirs == ours == INFO.parameters["vae" if component == "autoencoder" else component]
            assert {info.dtype for info in checkpoint.infos.values()} == {"F16"}
            assert "emoji" in " ".join(checkpoint.metadata.values()).lower()


def test_sizes_are_such_as_candle_and_group_norms_take() -> None:
    configs = INFO.sd
    assert configs is not None
    unet, vae = configs.unet, configs.vae
    assert unet.groups == 32 and all(width % 32 == 0 for width in unet.widths)
    assert all(width % heads == 0 for width, heads in zip(unet.widths, unet.heads, strict=True))
    assert all(vae.ch * mult % 32 == 0 for mult in vae.ch_mult) and vae.z_channels == 4
    assert configs.prediction == "epsilon" and configs.clip.activation == "quick_gelu"


def test_the_configs_beside_the_weights_state_what_the_table_says() -> None:
    configs = INFO.sd
    assert configs is not None
    unet, vae, clip = (
        json.loads((FOLDER / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")
    )
    assert tuple(unet["attention_head_dim"]) == configs.unet.heads
    assert tuple(unet["block_out_channels"]) == configs.unet.widths
    assert vae["scaling_factor"] == configs.vae.scale_factor
    assert clip["num_hidden_layers"] == configs.clip.num_hidden_layers
    tokenizer = ClipTokenizer.load(FOLDER / "tokenizer")
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == configs.clip.vocab_size - 1


# what it paints ---------------------------------------------------------------------------------------------


def test_held_out_captions_are_painted(tiny_sd: flux_sd.LoadedModel) -> None:
    """The measure of tools/eval_tiny.py on a few of its pairs; 90% of all are asked for."""
    assert len(CAPTIONS) == 16
    assert right(tiny_sd, CAPTIONS) >= 15


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [pytest.param(*pair, marks=() if DEFAULT[pair[0]] == pair[1] else pytest.mark.slow) for pair in PAIRS],
)
def test_every_sampler_with_every_schedule_paints_the_right_picture(
    tiny_sd: flux_sd.LoadedModel, sampler: str, schedule: str, request: pytest.FixtureRequest
) -> None:
    several = CAPTIONS[:8] if request.node.get_closest_marker("slow") else CAPTIONS[:3]
    found = right(tiny_sd, several, sampler=sampler, schedule=schedule, steps=20)
    assert found >= len(several) - 1, f"{found} of {len(several)}"


def test_solvers_of_high_order_agree_with_many_steps_of_the_lowest(tiny_sd: flux_sd.LoadedModel) -> None:
    """Deterministic samplers follow the same curve from the same noise: the picture of 100 Euler steps."""
    asked = replace(PIZZA, guidance=1.0)
    far = to_unit(tiny_sd.generate(replace(asked, sampler="euler", schedule="karras", steps=100))[0].image)
    distance = {}
    for sampler in ("euler", "dpm++_2m", "uni_pc"):
        request = replace(asked, sampler=sampler, schedule="karras", steps=16)
        distance[sampler] = float((to_unit(tiny_sd.generate(request)[0].image) - far).square().mean())
    assert distance["dpm++_2m"] < 0.5 * distance["euler"] and distance["uni_pc"] < 0.5 * distance["euler"]


def test_the_same_seed_gives_the_same_bytes_alone_and_in_a_batch(tiny_sd: flux_sd.LoadedModel) -> None:
    asked = replace(PIZZA, sampler="euler_ancestral", schedule="trailing", steps=4)
    alone = tiny_sd.generate(asked)[0].image
    batch = tiny_sd.generate(replace(asked, seed=0, batch=3))
    assert pixel_hash(alone) == pixel_hash(batch[1].image) != pixel_hash(batch[0].image)


def test_a_negative_prompt_pulls_away(tiny_sd: flux_sd.LoadedModel) -> None:
    """Away from black, grey gets brighter than away from white."""
    asked = GenerationRequest(prompt="a slice of pizza on a grey background", seed=1, guidance=4.0)
    border = torch.ones(128, 128, dtype=torch.bool)
    border[12:-12, 12:-12] = False
    black, white = (
        to_unit(tiny_sd.generate(replace(asked, negative_prompt=f"pizza on a {colour} background"))[0].image)
        for colour in ("black", "white")
    )
    assert float(black[:, border].mean()) > float(white[:, border].mean()) + 0.1


def test_previews_look_like_the_picture(tiny_sd: flux_sd.LoadedModel) -> None:
    scores = []
    for prompt in CAPTIONS[:3]:
        events: list[Event] = []
        request = GenerationRequest(prompt=prompt, seed=2, preview_every=20)
        (result,) = tiny_sd.generate(request, on_event=events.append)
        (preview,) = [event.picture for event in events if isinstance(event, Preview)]
        size = (16, 16)  # what a preview resolves: one latent position
        pair = [to_unit(p.resize(size, Image.Resampling.BOX)).flatten() for p in (preview, result.image)]
        scores.append(torch.corrcoef(torch.stack(pair))[0, 1].item())
    assert min(scores) >= 0.8, scores


def test_other_sizes_and_half_precision_work() -> None:
    with flux_sd.load_model("tiny-sd", device="cpu", dtype="bfloat16") as model:
        (result,) = model.generate(replace(PIZZA, width=168, height=96, steps=4))
    assert result.image.size == (168, 96) and result.metadata["dtype"] == "bfloat16"


def test_candle_painted_the_same_picture() -> None:
    """Against the pixels that Candle 0.11.1 computed from the same noise (tools/compare_with_candle.py)."""
    stored = open_picture(REFERENCES / "tiny_sd.png")
    manifest = json.loads((REFERENCES / "tiny_sd.json").read_text())
    request = GenerationRequest(prompt=manifest["prompt"], seed=manifest["seed"])
    with flux_sd.load_model("tiny-sd", device="cpu", dtype="float32", numerics="candle") as model:
        picture = model.generate(replace(request, steps=INFO.steps, guidance=INFO.guidance))[0]
    _, largest = difference(picture.image, stored)
    assert largest <= manifest["tolerance"] == 1


# pictures to begin from -------------------------------------------------------------------------------------


def mask(left: bool) -> Image.Image:
    """White on one half."""
    made = Image.new("L", (128, 128))
    made.paste(255, (0, 0, 64, 128) if left else (64, 0, 128, 128))
    return made


def test_a_picture_turns_into_another_as_strength_grows(tiny_sd: flux_sd.LoadedModel) -> None:
    """Strength 0 is the way through the autoencoder alone; little changes little, and much all."""
    (first,) = tiny_sd.generate(GenerationRequest(prompt=CAPTIONS[0], seed=1))
    begun = to_unit(first.image)
    gaps = []
    for strength in (0.0, 0.3, 0.6, 0.95):
        asked = GenerationRequest(prompt=CAPTIONS[1], seed=1, init_image=first.image, strength=strength)
        (result,) = tiny_sd.generate(asked)
        gaps.append(float((to_unit(result.image) - begun).square().mean()))
    assert gaps == sorted(gaps) and gaps[0] < 0.01
    assert shown(result.image) == CAPTIONS[1]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_the_masked_half_changes_and_the_rest_does_not(tiny_sd: flux_sd.LoadedModel, left: bool) -> None:
    """White is repainted; outside, every byte is the picture's own, and without compositing nearly so."""
    (first,) = tiny_sd.generate(GenerationRequest(prompt=CAPTIONS[0], seed=1))
    asked = GenerationRequest(prompt=CAPTIONS[2], seed=3, init_image=first.image, mask=mask(left))
    composed = np.asarray(tiny_sd.generate(asked)[0].image).astype(np.int32)
    given = np.asarray(first.image).astype(np.int32)
    halves = (slice(None), slice(0, 64)), (slice(None), slice(64, 128))
    inside, outside = halves if left else halves[::-1]
    assert np.array_equal(composed[outside], given[outside])
    assert np.abs(composed[inside] - given[inside]).mean() > 10
    plain = np.asarray(tiny_sd.generate(replace(asked, composite=False))[0].image).astype(np.int32)
    assert not np.array_equal(plain[outside], given[outside])
    assert np.abs(plain[outside] - given[outside]).mean() < np.abs(plain[inside] - given[inside]).mean() / 3
