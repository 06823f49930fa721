"""Measures what each known difference between Candle and the authors' code amounts to.

    python tools/measure_numerics.py --oracle PYTHON   # writes flux_sd/numerics_effects.json; 2 minutes, 4 GB
    python tools/measure_numerics.py --cheap           # prints what takes seconds; writes nothing

One field of Numerics at a time is given Candle's value, the rest keep the authors'. What is called cheap runs
on tiny-flux, on procedural weights at small widths, or on Candle's stored activations; the rest runs at the
widths of the released models. PYTHON has diffusers, which measures Candle's UniPC (tools/measure_unipc.py);
without it the stored figure stays.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from procedural import fill, tokens, values
from safetensors.torch import load_file
from torch import Tensor, nn

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.flux_generation import plan_flux
from flux_sd.flux_mmdit import Flux, FluxConfig, rotary_table
from flux_sd.numerics import Numerics, candle, reference
from flux_sd.sampling import State
from flux_sd.schedulers import NoiseSchedule, Prediction, make_sampler
from flux_sd.sd_generation import guide, text_states
from flux_sd.sd_loader import padding, unet_config, vae_config
from flux_sd.sd_plan import plan_sd
from flux_sd.t5 import T5Config, T5Encoder
from flux_sd.text import CLIP_END
from flux_sd.unet import SIZE_WIDTH, UNet, UNetConfig
from flux_sd.versions import SDVersion, VersionInfo

ROOT = Path(__file__).resolve().parent.parent
EFFECTS = Path(flux_sd.__file__).parent / "numerics_effects.json"
STORED = ROOT / "reference_outputs" / "candle"
PROMPT = "a slice of pizza on a blue background"
LONG_PROMPT = ", ".join(["a red apple, a slice of pizza and a cat on a blue background"] * 4)


@dataclass(frozen=True)
class Effect:
    """One figure. `of` is a field of Numerics or the name of a NotMirrored."""

    of: str
    where: str
    what: str
    value: float
    unit: (
        str  # "relative" (norm of the change over the norm), "radians", "of all bytes", "levels of 255", ...
    )
    cheap: bool


def relative(changed: Tensor, before: Tensor) -> float:
    """||changed - before|| / ||before|| over the whole tensor, in float64."""
    return ((changed.double() - before.double()).norm() / before.double().norm()).item()


def alone(field: str) -> Numerics:
    """The authors' numerics but for one field."""
    return replace(reference(), name=f"{field} alone", **{field: getattr(candle(), field)})


# --------------------------------------------------------------------------------------- tiny-flux


@cache
def painted(numerics: Numerics, dtype: str, prompt: str = PROMPT) -> dict[str, Tensor]:
    """What tiny-flux records for seed 0 at its defaults, and the pixels [H,W,3] uint8."""
    seen: dict[str, Tensor] = {}
    with flux_sd.load_model("tiny-flux", dtype=dtype, numerics=numerics) as model:
        request = GenerationRequest(prompt=prompt, seed=0)
        (result,) = model.generate(request, tap=lambda name, tensor: seen.update({name: tensor.clone()}))
    return {**seen, "pixels": torch.from_numpy(np.array(result.image))}


def on_tiny_flux(field: str, dtype: str, stages: dict[str, str], prompt: str = PROMPT) -> Iterator[Effect]:
    """Relative changes of `stages` (recorded name to words), and of the picture's bytes where many do."""
    before, after = painted(reference(), dtype, prompt), painted(alone(field), dtype, prompt)
    where = f"tiny-flux, {dtype}, 128x128, 4 steps"
    for name, words in stages.items():
        yield Effect(field, where, words, relative(after[name], before[name]), "relative", True)
    yield from of_bytes(field, where, before["pixels"], after["pixels"])


def of_bytes(of: str, where: str, before: Tensor, after: Tensor) -> Iterator[Effect]:
    """How many bytes of a picture change and by how much; nothing where they are too few to count on."""
    levels = (after.int() - before.int()).abs()
    share = (levels > 0).double().mean().item()
    if share > 1e-3:
        yield Effect(of, where, "bytes that change", share, "of all bytes", True)
        yield Effect(of, where, "largest change of a byte", levels.max().item(), "levels of 255", True)


def rope_dtype() -> Iterator[Effect]:
    stages = {"step.0.velocity": "first velocity", "latents": "final latents"}
    yield from on_tiny_flux("rope_dtype", "float32", stages)
    yield from on_tiny_flux("rope_dtype", "bfloat16", stages)
    for pixels in (1024, 2048):
        where = f"head of the released models, bfloat16, {pixels}x{pixels}"
        yield Effect("rope_dtype", where, "largest error of an angle", turned(pixels), "radians", True)


def turned(pixels: int) -> float:
    """The largest difference of a rotary angle between the two settings in bfloat16, radians."""
    side = torch.arange(pixels // 16, dtype=torch.float32)
    ids = torch.stack([torch.zeros_like(side), side, side], dim=-1)[None]  # [1,N,3]
    angles = []
    for setting, dtype in (("float32", torch.float32), ("model", torch.bfloat16)):
        pe = rotary_table(ids, replace(FluxConfig.dev(), rope_dtype=setting), dtype).double()
        angles.append(torch.atan2(pe[..., 1], pe[..., 0]))
    apart = angles[0] - angles[1]
    return torch.atan2(apart.sin(), apart.cos()).abs().max().item()


def latents_dtype() -> Iterator[Effect]:
    yield from on_tiny_flux("latents_dtype", "bfloat16", {"latents": "final latents", "image": "picture"})


def t5_keep_end_token() -> Iterator[Effect]:
    stages = {"t5.hidden": "T5's states, prompt cut at 32 tokens", "step.0.velocity": "first velocity"}
    yield from on_tiny_flux("t5_keep_end_token", "float32", stages, LONG_PROMPT)


def to_bytes() -> Iterator[Effect]:
    yield from on_tiny_flux("to_bytes", "float32", {})


def size() -> Iterator[Effect]:
    request = GenerationRequest(prompt=PROMPT, width=1000, height=1000)
    plan = plan_flux(SDVersion.FLUX_SCHNELL.info, request, alone("size"))
    yield Effect("size", "1000x1000 asked", "width and height painted", plan.width, "pixels", True)


# -------------------------------------------------------------------------------- procedural weights


def clip_gelu() -> Iterator[Effect]:
    yield gelu_effect(ClipTextConfig.tiny("gelu"), "3 layers of width 64, procedural weights", True)


def clip_gelu_full() -> Iterator[Effect]:
    yield gelu_effect(ClipTextConfig.open_clip_h(), "SD 2.1's encoder, procedural weights", False)


@torch.inference_mode()
def gelu_effect(config: ClipTextConfig, where: str, cheap: bool) -> Effect:
    """The change of the last hidden states of 77 ids."""
    ids = torch.tensor([tokens("input.clip_ids", 77, config.vocab_size - 2)])
    states = []
    for numerics in (reference(), candle()):
        encoder = fill(ClipTextEncoder(config.with_gelu(numerics.clip_gelu)))
        states.append(encoder(ids).last_hidden_state)
    return Effect("clip_gelu", where, "last hidden states", relative(states[1], states[0]), "relative", cheap)


@torch.inference_mode()
def t5_states(encoder: nn.Module, vocabulary: int) -> tuple[Tensor, Tensor]:
    """States of one short prompt padded to FLUX dev's lengths: as published, and as Candle has it."""
    info = SDVersion.FLUX_DEV.info
    ids = prompt_ids(vocabulary)
    request = GenerationRequest(prompt=PROMPT)
    lengths = [plan_flux(info, request, n).t5_length for n in (reference(), alone("t5_length"))]
    published, shorter = (encoder(torch.tensor([padded(ids, length)])) for length in lengths)
    return published, shorter


def prompt_ids(vocabulary: int) -> list[int]:
    """14 ids and the end token, as in Candle's T5 cases."""
    return [2 + token for token in tokens("input.t5_ids", 14, vocabulary - 2)] + [1]


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


def t5_length() -> Iterator[Effect]:
    config = T5Config.tiny(3)
    published, shorter = t5_states(fill(T5Encoder(config)), config.vocab_size)
    where = "3 layers of width 64 and FLUX dev's 2+2 blocks of width 128, procedural weights"
    words = "T5's states of a prompt of 15 tokens"
    yield Effect("t5_length", where, words, relative(shorter[:, :15], published[:, :15]), "relative", True)
    model = dev_blocks()
    apart = relative(velocity(model, shorter, 3.5), velocity(model, published, 3.5))
    yield Effect("t5_length", where, "velocity", apart, "relative", True)


def t5_length_full() -> Iterator[Effect]:
    config = replace(T5Config.v1_1_xxl(), num_layers=2)
    published, shorter = t5_states(fill(T5Encoder(config)), config.vocab_size)
    words = "T5's states of a prompt of 15 tokens"
    apart = relative(shorter[:, :15], published[:, :15])
    yield Effect(
        "t5_length", "2 layers of T5-XXL's width, procedural weights", words, apart, "relative", False
    )


def guidance() -> Iterator[Effect]:
    request, model = GenerationRequest(prompt=PROMPT), dev_blocks()
    scales = [
        plan_flux(SDVersion.FLUX_DEV.info, request, n).guidance for n in (reference(), alone("guidance"))
    ]
    text = values("input.t5", (1, 12, 64))
    before, after = (velocity(model, text, scale or 0.0) for scale in scales)
    where = "FLUX dev's 2+2 blocks of width 128, procedural weights"
    yield Effect("guidance", where, "velocity", relative(after, before), "relative", True)


@cache
def dev_blocks() -> nn.Module:
    """FLUX dev with 2+2 blocks of width 128."""
    return fill(Flux(FluxConfig.tiny(guidance_embed=True)))


@torch.inference_mode()
def velocity(
    model: nn.Module, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, time: float = 0.75
) -> Tensor:
    """Of 64x96 pixels, as in the case flux_tiny_dev_2_2; text [1,L,64] -> [1,24,64] float32."""
    latents, pooled = values("input.latent", (1, 16, 8, 12)), values("input.clip", (1, 64))
    s = State.new(text.to(dtype), pooled.to(dtype), latents.to(dtype))
    times, scales = torch.tensor([time]), torch.tensor([scale])
    out: Tensor = model(s.img, s.img_ids, s.txt, s.txt_ids, times, s.vec, scales)
    return out.float()


# ------------------------------------------------------------------------------------ Stable Diffusion

SMALL = "widths 32 and 64, procedural weights"
SMALL_CLIPS = (ClipTextConfig.tiny(), ClipTextConfig.tiny("gelu", 64))


def small(version: SDVersion) -> VersionInfo:
    """The row of a version with narrow networks of its kind, 96x64 pixels."""
    row = version.info
    assert row.sd is not None
    narrow = UNetConfig(4, (32, 64), (1, 1), 1, (2, 2), 64, False, resnets=1)
    if row.is_xl:
        added = 64 + 6 * SIZE_WIDTH
        narrow = replace(
            narrow, depths=(0, 2), mid_depth=2, context_dim=128, linear_projection=True, added_dim=added
        )
    narrow = narrow.inpainting() if row.is_inpainting else narrow
    vae = AutoEncoderConfig(64, 3, 32, 3, (1, 2, 2, 2), 1, 4, row.sd.vae.scale_factor, 0.0, True)
    return replace(row, width=96, height=64, sd=replace(row.sd, unet=narrow, vae=vae))


@torch.inference_mode()
def noise_pred(model: nn.Module, x: Tensor | None = None, time: float = 601.0, text: str = "text") -> Tensor:
    """What a UNet predicts of x [1,4,8,12], for procedural text."""
    config = model.config
    latents = values("input.unet_latent", (1, config.in_channels, 8, 12))
    if x is not None:
        latents = torch.cat([x, latents[:, 4:]], dim=1)
    context = values(f"input.unet_{text}", (1, 77, config.context_dim))
    sizes = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
    added = (values(f"input.unet_pooled_{text}", (1, 64)), sizes) if config.added_dim else ()
    out: Tensor = model(latents, torch.tensor([time]), context, *added)
    return out


def unet_effect(field: str, version: SDVersion, where: str) -> Effect:
    """The change of one prediction."""
    info = small(version)
    before, after = (noise_pred(fill(UNet(unet_config(info, n)))) for n in (reference(), alone(field)))
    return Effect(field, where, "noise predicted at step 601", relative(after, before), "relative", True)


def geglu() -> Iterator[Effect]:
    yield unet_effect("geglu", SDVersion.SD15, f"a UNet like 1.5's, {SMALL}")
    yield unet_effect("geglu", SDVersion.SDXL, f"a UNet like XL's, {SMALL}")


def geglu_full() -> Iterator[Effect]:
    made = [
        noise_pred(fill(UNet(unet_config(SDVersion.SD15.info, n)))) for n in (reference(), alone("geglu"))
    ]
    where = "Stable Diffusion 1.5's UNet, procedural weights"
    words = "noise predicted at step 601"
    yield Effect("geglu", where, words, relative(made[1], made[0]), "relative", False)


def sdxl_added() -> Iterator[Effect]:
    yield unet_effect("sdxl_added", SDVersion.SDXL, f"a UNet like XL's, {SMALL}")


def sd_ids(config: ClipTextConfig, pad: str) -> Tensor:
    """A prompt of 14 procedural ids between its marks, filled up to 77 by its end token or by "!"."""
    start, end = config.vocab_size - 2, config.vocab_size - 1
    filler = end if pad == CLIP_END else 0
    return torch.tensor([[start, *tokens("input.clip_ids", 14, start), end, *[filler] * 61]])


@torch.inference_mode()
def xl_states(configs: tuple[ClipTextConfig, ...], numerics: Numerics) -> Tensor:
    """What an XL UNet reads of these encoders, [1,77,D]."""
    info, outputs = SDVersion.SDXL.info, []
    for role, config in zip(("clip", "clip_2"), configs, strict=False):
        ids = sd_ids(config, padding(role, info, numerics))
        outputs.append(fill(ClipTextEncoder(config))(ids))
    return text_states(outputs, numerics.sdxl_hidden)


def text_effect(
    field: str, configs: tuple[ClipTextConfig, ...], where: str, words: str, cheap: bool
) -> Effect:
    before, after = (xl_states(configs, numerics) for numerics in (reference(), alone(field)))
    return Effect(field, where, words, relative(after, before), "relative", cheap)


def sdxl_hidden() -> Iterator[Effect]:
    where = "two encoders of 3 layers of width 64, procedural weights"
    yield text_effect("sdxl_hidden", SMALL_CLIPS, where, "text states of 77 places", True)


def sdxl_pad() -> Iterator[Effect]:
    where = "two encoders of 3 layers of width 64, procedural weights"
    yield text_effect("sdxl_pad", SMALL_CLIPS, where, "text states of a prompt of 14 tokens", True)


def sdxl_text_full() -> Iterator[Effect]:
    configs = (ClipTextConfig.clip_l(), ClipTextConfig.open_clip_bigg())
    where = "SDXL's two encoders, procedural weights"
    yield text_effect("sdxl_hidden", configs, where, "text states of 77 places", False)
    yield text_effect("sdxl_pad", configs, where, "text states of a prompt of 14 tokens", False)


@torch.inference_mode()
def sdxl_scale() -> Iterator[Effect]:
    info, latents = small(SDVersion.SDXL), values("input.vae_latent", (1, 4, 8, 12))
    configs = [vae_config(info, numerics) for numerics in (reference(), alone("sdxl_scale"))]
    before, after = (fill(AutoEncoder(config)).decode(latents) for config in configs)
    where = "an autoencoder of widths 32 and 64, procedural weights"
    yield Effect("sdxl_scale", where, "decoded picture", relative(after, before), "relative", True)


@torch.inference_mode()
def denoised(
    info: VersionInfo, numerics: Numerics, asked: GenerationRequest, prediction: Prediction = "epsilon"
) -> tuple[Tensor, int]:
    """Final latents of a request on a UNet of procedural weights, and how many steps were run."""
    plan, model = plan_sd(info, asked, numerics), fill(UNet(unet_config(info, numerics)))
    sampler = make_sampler(
        plan.sampler,
        NoiseSchedule.scaled_linear(),
        plan.schedule,
        plan.steps,
        prediction,
        ratio=numerics.stride,
    )
    x = values("input.latent", (1, 4, 8, 12)) * sampler.init_scale
    for index, time in enumerate(sampler.timesteps):
        seen = sampler.scale_input(x, index)
        output = noise_pred(model, seen, float(time))
        if plan.guided:
            output = guide(noise_pred(model, seen, float(time), "other"), output, plan.guidance or 1.0)
        x = sampler.step(output, index, x, values(f"input.step_{index}", (1, 4, 8, 12))).latents
    return x, len(sampler.timesteps)


def run_effect(
    field: str, version: SDVersion, asked: GenerationRequest, predictions: tuple[Prediction, Prediction]
) -> Iterator[Effect]:
    """The change of the final latents of a run, and of the number of its steps where that changes."""
    info = small(version)
    (before, steps), (after, more) = (
        denoised(info, numerics, asked, prediction)
        for numerics, prediction in zip((reference(), alone(field)), predictions, strict=True)
    )
    where = f"a UNet like that of {info.key}, {SMALL}, {steps} steps"
    yield Effect(field, where, "final latents", relative(after, before), "relative", True)
    if more != steps:
        yield Effect(field, where, "steps that are run instead", more, "steps", True)


NOISE: tuple[Prediction, Prediction] = ("epsilon", "epsilon")
PLAIN = GenerationRequest(prompt=PROMPT, guidance=1.0, steps=10)


def sd2_inpaint() -> Iterator[Effect]:
    drawn = image_of(values("input.picture", (64, 96, 3)))
    asked = replace(PLAIN, init_image=drawn, mask=drawn.convert("L").point(lambda _: 255))
    taken = alone("sd2_inpaint").sd2_inpaint
    assert taken is not None
    yield from run_effect("sd2_inpaint", SDVersion.SD2_INPAINT, asked, ("epsilon", taken))


def image_of(pixels: Tensor) -> Image.Image:
    """[H,W,3] about -1..1 -> a picture."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).numpy())


def stride() -> Iterator[Effect]:
    asked = GenerationRequest(prompt=PROMPT, steps=7)
    yield from run_effect("stride", SDVersion.SDXL_TURBO, asked, NOISE)


def sdxl_sampler() -> Iterator[Effect]:
    yield from run_effect("sdxl_sampler", SDVersion.SDXL, PLAIN, NOISE)


def sd_steps() -> Iterator[Effect]:
    yield from run_effect("sd_steps", SDVersion.SD15, replace(PLAIN, steps=None), NOISE)


def sd_guidance() -> Iterator[Effect]:
    asked = GenerationRequest(prompt=PROMPT, steps=10)
    yield from run_effect("sd_guidance", SDVersion.SDXL, asked, NOISE)


# ------------------------------------------------------------------------------------- not mirrored


def quantized_products() -> Iterator[Effect]:
    products = load_file(STORED / "gguf_products.safetensors")
    types = [name.removesuffix(".rounded") for name in products if name.endswith(".rounded")]
    apart = [relative(products[f"{t}.rounded"], products[f"{t}.decoded"]) for t in types]
    where = f"Candle's stored products of a 48 x 512 weight, {sum(v > 1e-4 for v in apart)} block types"
    yield Effect("quantized_products", where, "largest of the products", max(apart), "relative", True)
    found = []
    for path in sorted(STORED.glob("flux_gguf_*.safetensors")):
        stored = load_file(path)
        found.append(relative(stored["velocity_rounded"], stored["velocity_decoded"]))
    where = f"Candle's stored velocities of 1+1 blocks of width 256, {len(found)} types"
    yield Effect("quantized_products", where, "largest of the velocities", max(found), "relative", True)


def bfloat16_order() -> Iterator[Effect]:
    config = replace(FluxConfig.tiny(guidance_embed=True), rope_dtype=candle().rope_dtype)
    model = fill(Flux(config)).to(torch.bfloat16)
    ours = velocity(model, values("input.t5", (1, 12, 64)), 3.5, torch.bfloat16)
    theirs = load_file(STORED / "flux_tiny_dev_2_2_bf16.safetensors")["velocity"]
    where = "FLUX dev's 2+2 blocks of width 128, procedural weights, bfloat16, preset candle"
    yield Effect("bfloat16_order", where, "velocity, from Candle's", relative(ours, theirs), "relative", True)


def candle_softmax(scores: Tensor) -> Tensor:
    """As Candle's CPU backend has it: every step in the dtype of `scores`, the sum one term after another."""
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    total = torch.zeros_like(terms[..., :1])
    for column in terms.split(1, dim=-1):
        total = total + column
    return terms / total


def candle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """ops.attention with that softmax; for T5, which is not causal."""
    assert not causal and scale is not None
    scores = q @ k.transpose(-1, -2) * scale
    return candle_softmax(scores if mask is None else scores + mask.to(scores.dtype)) @ v


def bfloat16_softmax() -> Iterator[Effect]:
    tokens_at_1024 = 256 + 64 * 64  # text and image
    total = candle_softmax(torch.zeros(tokens_at_1024, dtype=torch.bfloat16)).double().sum().item()
    where = "4352 equal scores, as many as 256 text tokens and 1024x1024 pixels have"
    yield Effect("bfloat16_softmax", where, "sum of the weights", total, "for 1", True)
    config = T5Config.tiny(3)
    yield softmax_effect(
        config, "3 layers of T5 of width 64, procedural weights, 15 tokens and 241 pads", True
    )


def bfloat16_softmax_full() -> Iterator[Effect]:
    config = replace(T5Config.v1_1_xxl(), num_layers=2)
    where = "2 layers of T5-XXL's width, procedural weights, 15 tokens and 241 pads"
    yield softmax_effect(config, where, False)


@torch.inference_mode()
def softmax_effect(config: T5Config, where: str, cheap: bool) -> Effect:
    """What Candle's sums do to T5's states in bfloat16."""
    encoder = fill(T5Encoder(config)).to(torch.bfloat16)
    ids = torch.tensor([padded(prompt_ids(config.vocab_size), 256)])
    before = encoder(ids)
    with patch("flux_sd.t5.attention", candle_attention):
        after = encoder(ids)
    return Effect("bfloat16_softmax", where, "T5's states", relative(after, before), "relative", cheap)


def bfloat16_bytes() -> Iterator[Effect]:
    picture = painted(reference(), "bfloat16")["image"]  # [1,3,H,W] of bfloat16 values
    exact = ((picture.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    rounded = ((picture.bfloat16().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    yield from of_bytes("bfloat16_bytes", "tiny-flux, bfloat16, 128x128, 4 steps", exact, rounded)


@torch.inference_mode()
def bfloat16_convolutions() -> Iterator[Effect]:
    before = painted(reference(), "bfloat16")
    with flux_sd.load_model("tiny-flux", dtype="float32") as model:
        exact = model.components.network("vae").decode(before["latents"])
    where, of = "tiny-flux, bfloat16, 128x128, 4 steps", "bfloat16_convolutions"
    words = "picture, from that of the same latents in float32"
    yield Effect(of, where, words, relative(before["image"], exact), "relative", True)


@torch.inference_mode()
def time_dtype() -> Iterator[Effect]:
    model, text = dev_blocks(), values("input.t5", (1, 12, 64))
    time, scale = ((torch.tensor(v).bfloat16() * 1000).item() / 1000 for v in (0.75, 3.5))  # 0.752, 3.504
    before = velocity(model, text, 3.5)
    for words, after in (
        ("velocity at 0.75, time rounded", velocity(model, text, 3.5, time=time)),
        ("velocity at 0.75, time and guidance rounded", velocity(model, text, scale, time=time)),
    ):
        where = "FLUX dev's 2+2 blocks of width 128, procedural weights"
        yield Effect("time_dtype", where, words, relative(after, before), "relative", True)


def unipc(python: Path) -> Iterator[Effect]:
    """By diffusers, in an environment that has it."""
    command = [python, Path(__file__).with_name("measure_unipc.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    for name, figures in found.items():
        schedule, steps = name.split("_")[1:]
        where = f"Candle's stored trajectory, {schedule} levels, {steps} steps"
        yield Effect(
            "unipc", where, "largest on the way, from diffusers'", figures["largest"], "relative", False
        )


CHEAP = (
    rope_dtype, latents_dtype, clip_gelu, geglu, sdxl_added, sdxl_hidden, sdxl_pad, sdxl_scale, sd2_inpaint,
    stride, sdxl_sampler, sd_steps, sd_guidance, t5_length, t5_keep_end_token, guidance, size, to_bytes,
    quantized_products, bfloat16_order, bfloat16_softmax, bfloat16_bytes, bfloat16_convolutions, time_dtype,
)  # fmt: skip
FULL = (clip_gelu_full, geglu_full, sdxl_text_full, t5_length_full, bfloat16_softmax_full)


def measure_cheap() -> list[Effect]:
    """What takes seconds."""
    return [effect for measure in CHEAP for effect in measure()]


def stored() -> list[Effect]:
    """What the package ships."""
    return [Effect(**entry) for entry in json.loads(EFFECTS.read_text(encoding="utf-8"))["effects"]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cheap", action="store_true", help="print what takes seconds, and write nothing")
    parser.add_argument("--oracle", type=Path, metavar="PYTHON", help="an interpreter that has diffusers")
    arguments = parser.parse_args()
    effects = measure_cheap()
    if not arguments.cheap:
        effects += [effect for measure in FULL for effect in measure()]
        if arguments.oracle is not None:
            effects += unipc(arguments.oracle)
        elif EFFECTS.exists():
            effects += [effect for effect in stored() if effect.of == "unipc"]
    for effect in effects:
        print(f"{effect.of:20} {effect.value:<10.3g} {effect.unit}: {effect.what}; {effect.where}")
    if not arguments.cheap:
        document = {
            "command": "python tools/measure_numerics.py --oracle PYTHON",
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "made_by": f"flux_sd {flux_sd.__version__}, torch {torch.__version__.partition('+')[0]}",
            "effects": [asdict(effect) for effect in effects],
        }
        EFFECTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
