"""Our networks and schedules against diffusers and transformers, with the same tiny procedural weights.

The references are written by tools/make_oracle_references.py, in an environment of its own. Each comparison
prints its relative difference (`pytest -s`). About 2 seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from procedural import fill, tokens, values
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.sampling import get_schedule
from flux_sd.t5 import T5Config, T5Encoder
from flux_sd.unet import SIZE_WIDTH, UNet, UNetConfig

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "oracle"
TOLERANCE = json.loads((STORED / "manifest.json").read_text(encoding="utf-8"))["tolerance"]
Outputs = dict[str, Tensor]


def flux(config: FluxConfig, change: Callable[[Flux], None] | None = None) -> Outputs:
    model = Flux(config)
    fill(model)
    if change is not None:
        change(model)
    rows, columns = 6, 10
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    velocity = model(
        values("oracle.img", (2, rows * columns, 64)),
        ids.expand(2, -1, -1),
        values("oracle.txt", (2, 12, 64)),
        torch.zeros(2, 12, 3),
        torch.tensor([0.75, 0.3125]),
        values("oracle.vec", (2, 64)),
        torch.tensor([3.5, 2.0]) if config.guidance_embed else None,
    )
    return {"velocity": velocity}


def t5(config: T5Config) -> Outputs:
    ids = [i + 2 for i in tokens("oracle.t5_ids", 180, 510)] + [1] + [0] * 19
    return {"last_hidden_state": fill(T5Encoder(config))(torch.tensor([ids]))}


def clip(config: ClipTextConfig) -> Outputs:
    ids = [510, *tokens("oracle.clip_ids", 29, 510), *[511] * 47]
    out = fill(ClipTextEncoder(config))(torch.tensor([ids]))
    outputs = {"last_hidden_state": out.last_hidden_state, "penultimate": out.penultimate}
    return outputs | ({"pooled": out.pooled} if out.projected is None else {"projected": out.projected})


def autoencoder(
    config: AutoEncoderConfig,
    eps: float | None = None,
    change: Callable[[AutoEncoder], None] | None = None,
) -> Outputs:
    model = AutoEncoder(config)
    fill(model)
    if change is not None:
        change(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and eps is not None:
            module.eps = eps
    image = values("oracle.image", (1, 3, 48, 80))
    latents = ("oracle.latents", (1, 16, 6, 10)) if config.z_channels == 16 else SD_LATENTS
    return {
        "moments": model.moments(image),
        "encoded": model.encode(image),
        "decoded": model.decode(values(*latents)),
    }


SD_LATENTS = ("oracle.sd_latents", (1, 4, 12, 20))
SD_AUTOENCODER = AutoEncoderConfig(48, 3, 32, 3, (1, 2, 2), 1, 4, 0.18215, 0.0, use_quant_conv=True)
UNET = UNetConfig(4, (32, 64, 64), (1, 1, 0), 1, (4, 4, 4), 48, False)
UNET_21 = replace(UNET, heads=(1, 2, 4), linear_projection=True, float32_attention=True)
UNET_XL = UNetConfig(4, (32, 64, 64), (0, 2, 3), 3, (1, 2, 4), 48, True, 24 + 6 * SIZE_WIDTH)
SIZES = torch.tensor([[512.0, 768.0, 0.0, 16.0, 640.0, 1024.0], [48.0, 32.0, 8.0, 0.0, 48.0, 40.0]])


# What is added to a feature map, so small that the epsilons of the norms behind it show.
SMALL = {"conv_in", "conv2", "conv_shortcut", "proj_out", "downsamplers", "upsamplers"}


def unet(
    config: UNetConfig, size: tuple[int, int] = (8, 12), sizes: Tensor = SIZES, small: bool = False
) -> Outputs:
    """Two images at different times in one batch."""
    noise_pred = fill(UNet(config), lambda name: 0.03 if small and SMALL & set(name.split(".")) else 1.0)(
        values("oracle.unet_latent", (2, config.in_channels, *size)),
        torch.tensor([601.0, 17.0]),
        values("oracle.unet_context", (2, 9, 48)),
        *((values("oracle.pooled", (2, 24)), sizes) if config.added_dim else ()),
    )
    return {"noise_pred": noise_pred}


CASES: dict[str, Callable[[], Outputs]] = {
    "flux_schnell": lambda: flux(FluxConfig.tiny()),
    "flux_dev": lambda: flux(FluxConfig.tiny(guidance_embed=True)),
    "t5": lambda: t5(T5Config.tiny()),
    "clip": lambda: clip(ClipTextConfig.tiny()),
    "clip_projected": lambda: clip(ClipTextConfig.tiny("gelu", projection_dim=48)),
    "autoencoder": lambda: autoencoder(AutoEncoderConfig.tiny()),
    "autoencoder_sd": lambda: autoencoder(SD_AUTOENCODER),
    "unet_sd15": lambda: unet(UNET, (9, 14)),
    "unet_sd21": lambda: unet(UNET_21),
    "unet_sdxl": lambda: unet(UNET_XL),
    "unet_inpaint": lambda: unet(UNET.inpainting()),
    "unet_small": lambda: unet(UNET, small=True),
}


def tolerance(case: str) -> float:
    return float(TOLERANCE.get(case, TOLERANCE["networks"]))


def differences(case: str, outputs: Outputs) -> dict[str, float]:
    """||ours - reference|| / ||reference|| in float64, by output."""
    stored = load_file(STORED / f"{case}.safetensors")
    assert outputs.keys() == stored.keys()
    found = {}
    for name, reference in stored.items():
        assert outputs[name].shape == reference.shape and outputs[name].dtype == torch.float32
        ours, theirs = outputs[name].double(), reference.double()
        found[name] = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{case}.{name}: {found[name]:.1e} (at most {tolerance(case):.0e})")
    return found


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_networks_agree(case: str) -> None:
    found = differences(case, CASES[case]())
    assert max(found.values()) <= tolerance(case), found


# ---------------------------------------------------------------- what the comparison would catch


def forget_the_swap(model: Flux) -> None:
    """As if diffusers' final modulation (scale, shift) had been copied as it stands."""
    layer = model.final_layer.adaLN_modulation[1]
    for parameter in (layer.weight, layer.bias):
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def exchange_q_and_k(model: Flux) -> None:
    weight = model.double_blocks[1].img_attn.qkv.weight
    q, k, v = weight.data.chunk(3)
    weight.data = torch.cat([k, q, v])


def turn_positions(model: Flux) -> None:
    model.config = replace(model.config, theta=1000)


def skip_the_quant_convolutions(model: AutoEncoder) -> None:
    model.quant_conv = model.post_quant_conv = None


ERRORS: dict[str, tuple[str, Callable[[], Outputs]]] = {
    "final halves not swapped": ("flux_schnell", lambda: flux(FluxConfig.tiny(), forget_the_swap)),
    "q and k exchanged": ("flux_schnell", lambda: flux(FluxConfig.tiny(), exchange_q_and_k)),
    "rotary theta": ("flux_dev", lambda: flux(FluxConfig.tiny(guidance_embed=True), turn_positions)),
    "rotary axes": (
        "flux_dev",
        lambda: flux(replace(FluxConfig.tiny(guidance_embed=True), axes_dim=(24, 16, 24))),
    ),
    "far buckets": ("t5", lambda: t5(replace(T5Config.tiny(), relative_attention_max_distance=256))),
    "activation": ("clip", lambda: clip(ClipTextConfig.tiny("gelu"))),
    "tanh in place of erf": (
        "clip_projected",
        lambda: clip(ClipTextConfig.tiny("gelu_tanh", projection_dim=48)),
    ),
    "shift": ("autoencoder", lambda: autoencoder(replace(AutoEncoderConfig.tiny(), shift_factor=0.0))),
    "quant convolutions": (
        "autoencoder_sd",
        lambda: autoencoder(SD_AUTOENCODER, change=skip_the_quant_convolutions),
    ),
    "scale": ("autoencoder_sd", lambda: autoencoder(replace(SD_AUTOENCODER, scale_factor=0.13025))),
    "gate by tanh": ("unet_sd15", lambda: unet(replace(UNET, geglu="tanh"), (9, 14))),
    "gate by tanh, XL": ("unet_sdxl", lambda: unet(replace(UNET_XL, geglu="tanh"))),
    "heads per level": ("unet_sd21", lambda: unet(replace(UNET_21, heads=(4, 4, 4)))),
    "no sizes": ("unet_sdxl", lambda: unet(UNET_XL, sizes=torch.zeros_like(SIZES))),
    "width before height": ("unet_sdxl", lambda: unet(UNET_XL, sizes=SIZES[:, [1, 0, 3, 2, 5, 4]])),
    "nothing added": ("unet_sdxl", lambda: unet(replace(UNET_XL, added_dim=None))),
    "norm epsilon": ("autoencoder", lambda: autoencoder(AutoEncoderConfig.tiny(), eps=1e-4)),
}


@pytest.mark.parametrize("error", ERRORS)
@torch.inference_mode()
def test_planted_errors_are_found(error: str) -> None:
    case, run = ERRORS[error]
    assert max(differences(case, run()).values()) > 2 * tolerance(case)


# ---------------------------------------------------------------- schedules


def test_schedules_agree() -> None:
    stored = load_file(STORED / "schedules.safetensors")
    assert len(stored) == 8 + 9
    for name, reference in stored.items():
        steps = int(name.split("_")[1])
        image_tokens = None
        if name.startswith("dev"):
            width, height = map(int, name.split("_")[2].split("x"))
            image_tokens = (width // 16) * (height // 16)
        ours = torch.tensor(get_schedule(steps, image_tokens), dtype=torch.float64)
        difference = (ours - reference).abs().max().item()
        print(f"{name}: {difference:.1e} (at most {TOLERANCE['schedules']:.0e})")
        assert difference <= TOLERANCE["schedules"], name
        assert ours[0] == 1.0 and ours[-1] == 0.0
    # A shift for another number of tokens, or none, is far outside.
    other = torch.tensor(get_schedule(20, 4080), dtype=torch.float64)
    assert (other - stored["dev_20_1024x1024"]).abs().max() > 1e-4
