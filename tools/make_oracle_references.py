"""Writes what diffusers and transformers make of tiny procedural models: `reference_outputs/oracle/`.

    python3 -m venv oracle
    oracle/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 mpmath protobuf sentencepiece
    oracle/bin/python tools/make_oracle_references.py

(protobuf and sentencepiece are for tools/make_tokenizer_references.py, which runs in the same environment.)

Weights and inputs are procedural (tools/procedural.py), so the files hold outputs only. The names that seed
the weights are our parameter paths, which this tool gives to diffusers' parameters by itself: it reads no
file of weights_maps/ and imports nothing of flux_sd, so an error there cannot hide here. Takes seconds. The
versions found go into the manifest; tests/test_oracle.py compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mpmath
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from procedural import tokens, values, weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reference_outputs" / "oracle"


@dataclass(frozen=True)
class Take:
    """Which rows of one of our tensors one of theirs has: ranges, one after another; none for all."""

    ranges: tuple[tuple[int, int], ...] = ()

    def __call__(self, value: np.ndarray) -> np.ndarray:
        return np.concatenate([value[first:last] for first, last in self.ranges]) if self.ranges else value


Source = tuple[str, tuple[int, ...], Take]
whole = Take()


def part(first: int, last: int) -> Take:
    """These rows of one of our fused tensors."""
    return Take(((first, last),))


def swapped(half: int) -> Take:
    """Scale, shift from shift, scale."""
    return Take(((half, 2 * half), (0, half)))


def give(
    model: nn.Module,
    sources: dict[str, Source],
    layout: str | None = None,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Fills every parameter of `model` from our name and shape of it and the part taken, times its scale.

    `layout`: also writes which part of which of our tensors each of theirs is, and its shape there; weight
    maps are tested by it.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != sources.keys():
        raise SystemExit(
            f"{type(model).__name__}: names differ: {sorted(parameters.keys() ^ sources.keys())}"
        )
    with torch.no_grad():
        for name, (ours, shape, take) in sources.items():
            value = torch.from_numpy(take(weight(ours, shape, scale(ours))).copy())
            parameters[name].copy_(value.view_as(parameters[name]))
    model.eval()
    if layout is not None:
        rows = {
            name: {"shape": list(parameters[name].shape), "ours": ours, "of": shape, "rows": take.ranges}
            for name, (ours, shape, take) in sources.items()
        }
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        (OUT / f"{layout}.layout.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


# ---------------------------------------------------------------- FLUX transformer

HIDDEN, HEADS, MLP = 128, 2, 512  # flux_mmdit.FluxConfig.tiny()
ROWS, COLUMNS, TEXT = 6, 10, 12  # tokens: image rows and columns, text


def flux_sources(depth: int, single: int, guidance: bool) -> dict[str, Source]:
    """diffusers' name -> ours."""
    sources: dict[str, Source] = {}

    def linear(theirs: str, ours: str, rows: int, columns: int, take: Take = whole) -> None:
        sources[f"{theirs}.weight"] = (f"{ours}.weight", (rows, columns), take)
        sources[f"{theirs}.bias"] = (f"{ours}.bias", (rows,), take)

    def embedder(theirs: str, ours: str, width: int) -> None:
        linear(f"time_text_embed.{theirs}.linear_1", f"{ours}.in_layer", HIDDEN, width)
        linear(f"time_text_embed.{theirs}.linear_2", f"{ours}.out_layer", HIDDEN, HIDDEN)

    def scales(theirs: str, ours: str, names: tuple[str, str]) -> None:
        for name, kind in zip(names, ("query_norm", "key_norm"), strict=True):
            sources[f"{theirs}.{name}.weight"] = (f"{ours}.{kind}.scale", (HIDDEN // HEADS,), whole)

    linear("x_embedder", "img_in", HIDDEN, 64)
    linear("context_embedder", "txt_in", HIDDEN, 64)
    embedder("timestep_embedder", "time_in", 256)
    embedder("text_embedder", "vector_in", 64)
    if guidance:
        embedder("guidance_embedder", "guidance_in", 256)
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        streams = (
            ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k")),
            (
                "txt",
                "norm1_context",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                "ff_context",
                ("norm_added_q", "norm_added_k"),
            ),
        )
        for stream, norm, projections, out, mlp, norms in streams:
            linear(f"{theirs}.{norm}.linear", f"{ours}.{stream}_mod.lin", 6 * HIDDEN, HIDDEN)
            for n, name in enumerate(projections):
                take = part(n * HIDDEN, (n + 1) * HIDDEN)
                linear(f"{theirs}.attn.{name}", f"{ours}.{stream}_attn.qkv", 3 * HIDDEN, HIDDEN, take)
            linear(f"{theirs}.attn.{out}", f"{ours}.{stream}_attn.proj", HIDDEN, HIDDEN)
            scales(f"{theirs}.attn", f"{ours}.{stream}_attn.norm", norms)
            linear(f"{theirs}.{mlp}.net.0.proj", f"{ours}.{stream}_mlp.0", MLP, HIDDEN)
            linear(f"{theirs}.{mlp}.net.2", f"{ours}.{stream}_mlp.2", HIDDEN, MLP)
    for i in range(single):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        linear(f"{theirs}.norm.linear", f"{ours}.modulation.lin", 3 * HIDDEN, HIDDEN)
        fused = 3 * HIDDEN + MLP
        for n, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            linear(f"{theirs}.{name}", f"{ours}.linear1", fused, HIDDEN, part(n * HIDDEN, (n + 1) * HIDDEN))
        linear(f"{theirs}.proj_mlp", f"{ours}.linear1", fused, HIDDEN, part(3 * HIDDEN, fused))
        linear(f"{theirs}.proj_out", f"{ours}.linear2", HIDDEN, HIDDEN + MLP)
        scales(f"{theirs}.attn", f"{ours}.norm", ("norm_q", "norm_k"))
    linear("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN, swapped(HIDDEN))
    linear("proj_out", "final_layer.linear", 64, HIDDEN)
    return sources


def flux(guidance: bool) -> dict[str, Tensor]:
    """Two images at different times (and guidance) in one batch."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 24, 24),
    )
    give(model, flux_sources(2, 2, guidance), "flux_dev" if guidance else None)
    ids = torch.zeros(ROWS, COLUMNS, 3)
    ids[..., 1] += torch.arange(ROWS)[:, None]
    ids[..., 2] += torch.arange(COLUMNS)[None, :]
    velocity = model(
        hidden_states=values("oracle.img", (2, ROWS * COLUMNS, 64)),
        encoder_hidden_states=values("oracle.txt", (2, TEXT, 64)),
        pooled_projections=values("oracle.vec", (2, 64)),
        timestep=torch.tensor([0.75, 0.3125]),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(TEXT, 3),
        guidance=torch.tensor([3.5, 2.0]) if guidance else None,
    ).sample
    return {"velocity": velocity}


# ---------------------------------------------------------------- text encoders


def t5() -> dict[str, Tensor]:
    """200 positions, so that distances of 128 and more share the last bucket."""
    config = T5Config(
        vocab_size=512,
        d_model=64,
        d_kv=64,
        d_ff=128,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config)
    give(model, {name: (name, tuple(p.shape), whole) for name, p in model.named_parameters()})
    ids = torch.tensor([[i + 2 for i in tokens("oracle.t5_ids", 180, 510)] + [1] + [0] * 19])
    return {"last_hidden_state": model(input_ids=ids).last_hidden_state}


def clip(activation: str, projection: bool) -> dict[str, Tensor]:
    """77 positions, the end token at 30 and again as pads."""
    config = CLIPTextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=48,
        bos_token_id=510,
        eos_token_id=511,
        pad_token_id=511,
    )
    ids = torch.tensor([[510, *tokens("oracle.clip_ids", 29, 510), *[511] * 47]])
    if projection:
        projected = CLIPTextModelWithProjection(config)
        give(projected, {name: (name, tuple(p.shape), whole) for name, p in projected.named_parameters()})
        out = projected(input_ids=ids, output_hidden_states=True)
        return {
            "projected": out.text_embeds,
            "last_hidden_state": out.last_hidden_state,
            "penultimate": out.hidden_states[-2],
        }
    model = CLIPTextModel(config)  # its names lack our "text_model."
    give(model, {name: (f"text_model.{name}", tuple(p.shape), whole) for name, p in model.named_parameters()})
    out = model(input_ids=ids, output_hidden_states=True)
    return {
        "pooled": out.pooler_output,
        "last_hidden_state": out.last_hidden_state,
        "penultimate": out.hidden_states[-2],
    }


# ---------------------------------------------------------------- autoencoder

SCALE, SHIFT = 0.3611, 0.1159


def autoencoder_sources(model: nn.Module, levels: int) -> dict[str, Source]:
    """diffusers' name -> ours."""
    inside = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
    }
    sources: dict[str, Source] = {}
    for theirs, parameter in model.named_parameters():
        words = theirs.split(".")
        side, leaf = words[0], words[-1]
        shape = tuple(parameter.shape)
        if words[1] in ("down_blocks", "up_blocks"):
            level = int(words[2]) if words[1] == "down_blocks" else levels - 1 - int(words[2])
            up = "up" if words[1] == "up_blocks" else "down"
            if words[3] == "resnets":
                rest = [f"block.{words[4]}", *(inside.get(word, word) for word in words[5:-1])]
            else:
                rest = ["upsample.conv" if up == "up" else "downsample.conv"]
            ours = [side, up, str(level), *rest]
        elif words[1] == "mid_block" and words[2] == "resnets":
            ours = [side, "mid", f"block_{int(words[3]) + 1}", *words[4:-1]]
        elif words[1] == "mid_block":
            name = "proj_out" if words[4] == "to_out" else inside[words[4]]
            ours = [side, "mid", "attn_1", name]
            if leaf == "weight" and name != "norm":
                shape = (*shape, 1, 1)  # a linear there, a 1x1 convolution here
        elif words[1] == leaf:  # the convolutions around the code
            ours = [side]
        else:
            ours = [side, "norm_out" if words[1] == "conv_norm_out" else words[1]]
        sources[theirs] = (".".join([*ours, leaf]), shape, whole)
    return sources


def autoencoder() -> dict[str, Tensor]:
    """A picture of 48 x 80 pixels, latents of 6 x 10."""
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[64, 128, 256, 256],
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    give(model, autoencoder_sources(model, levels=4), "autoencoder")
    posterior = model.encode(values("oracle.image", (1, 3, 48, 80))).latent_dist
    latents = values("oracle.latents", (1, 16, 6, 10))
    return {
        "moments": posterior.parameters,
        "encoded": (posterior.mean - SHIFT) * SCALE,
        "decoded": model.decode(latents / SCALE + SHIFT).sample,
    }


SD_SCALE = 0.18215


def sd_autoencoder() -> dict[str, Tensor]:
    """Stable Diffusion's: four channels, 1x1 convolutions around the code, no shift."""
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=SD_SCALE,
    )
    give(model, autoencoder_sources(model, levels=3))
    posterior = model.encode(values("oracle.image", (1, 3, 48, 80))).latent_dist
    latents = values("oracle.sd_latents", (1, 4, 12, 20))
    return {
        "moments": posterior.parameters,
        "encoded": posterior.mean * SD_SCALE,
        "decoded": model.decode(latents / SD_SCALE).sample,
    }


# ---------------------------------------------------------------- UNet

UNET_WIDTHS, UNET_CONTEXT, UNET_POOLED = (32, 64, 64), 48, 24
# What is added to a feature map, so small that the epsilons of the norms behind it show.
UNET_SMALL = ("conv_in", "conv2", "conv_shortcut", "proj_out", "downsamplers", "upsamplers")
UNET_SIZES = [[512.0, 768.0, 0.0, 16.0, 640.0, 1024.0], [48.0, 32.0, 8.0, 0.0, 48.0, 40.0]]


def unet(
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    channels: int = 4,
    added: bool = False,
    size: tuple[int, int] = (8, 12),
    small: bool = False,
    **config: object,
) -> dict[str, Tensor]:
    """Two images at different times in one batch. `depths`: transformer blocks by level, 0 for none."""
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    if added:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": UNET_POOLED + 6 * 256,
        }
    model = UNet2DConditionModel(
        in_channels=channels,
        block_out_channels=UNET_WIDTHS,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=heads,  # the number of heads, by its old name
        cross_attention_dim=UNET_CONTEXT,
        **config,
    )
    sources = {name: (name, tuple(p.shape), whole) for name, p in model.named_parameters()}
    give(model, sources, scale=lambda name: 0.03 if small and set(UNET_SMALL) & set(name.split(".")) else 1.0)
    given = {"text_embeds": values("oracle.pooled", (2, UNET_POOLED)), "time_ids": torch.tensor(UNET_SIZES)}
    noise_pred = model(
        values("oracle.unet_latent", (2, channels, *size)),
        torch.tensor([601.0, 17.0]),
        values("oracle.unet_context", (2, 9, UNET_CONTEXT)),
        added_cond_kwargs=given if added else None,
    ).sample
    return {"noise_pred": noise_pred}


# ---------------------------------------------------------------- schedules

SIZES = ((512, 512), (1024, 1024), (1360, 768))  # width, height


def schedule(steps: int, image_tokens: int | None) -> Tensor:
    """The published formula in 50 digits, rounded once to float64."""
    mpmath.mp.dps = 50
    times = [mpmath.mpf(steps - i) / steps for i in range(steps + 1)]
    if image_tokens is not None:
        mu = mpmath.mpf("0.5") + (mpmath.mpf("1.15") - mpmath.mpf("0.5")) * (image_tokens - 256) / (
            4096 - 256
        )
        times = [1 / (1 + mpmath.exp(-mu) * (1 / t - 1)) if t else mpmath.mpf(0) for t in times]
    return torch.tensor([float(t) for t in times], dtype=torch.float64)


def schedules() -> tuple[dict[str, Tensor], float]:
    """Schedules by name, and their largest difference from diffusers' scheduler (it computes in float32)."""
    result: dict[str, Tensor] = {}
    worst = 0.0
    cases: list[tuple[str, int, int | None]] = [(f"schnell_{n}", n, None) for n in range(1, 9)]
    cases += [
        (f"dev_{n}_{width}x{height}", n, (width // 16) * (height // 16))
        for width, height in SIZES
        for n in (20, 28, 50)
    ]
    for name, steps, image_tokens in cases:
        dynamic = image_tokens is not None
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15
        )
        mu = 0.5 + 0.65 * (image_tokens - 256) / 3840 if image_tokens is not None else None
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        result[name] = schedule(steps, image_tokens)
        worst = max(worst, (scheduler.sigmas.double() - result[name]).abs().max().item())
    return result, worst


def main() -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        cases = {
            "flux_schnell": flux(guidance=False),
            "flux_dev": flux(guidance=True),
            "t5": t5(),
            "clip": clip("quick_gelu", projection=False),
            "clip_projected": clip("gelu", projection=True),
            "autoencoder": autoencoder(),
            "autoencoder_sd": sd_autoencoder(),
            # sizes that do not halve evenly: the way up goes back to those of the way down
            "unet_sd15": unet((1, 1, 0), (4, 4, 4), size=(9, 14)),
            "unet_sd21": unet((1, 1, 0), (1, 2, 4), use_linear_projection=True, upcast_attention=True),
            "unet_sdxl": unet((0, 2, 3), (1, 2, 4), added=True, use_linear_projection=True),
            "unet_inpaint": unet((1, 1, 0), (4, 4, 4), channels=9),
            "unet_small": unet((1, 1, 0), (4, 4, 4), small=True),
        }
    times, worst = schedules()
    for name, tensors in {**cases, "schedules": times}.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors")
        for key, value in tensors.items():
            print(
                f"{name}.{key}: {tuple(value.shape)}, standard deviation {value.std(correction=0).item():.3f}"
            )
    print(f"schedules: at most {worst:.1e} from diffusers' scheduler")
    manifest = {
        "what": "outputs of diffusers' and transformers' own classes with procedural weights and inputs",
        "command": "python tools/make_oracle_references.py",
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "mpmath", "numpy")
        },
        "dtype": "float32 on one CPU thread; schedules float64",
        "tolerance": {
            "networks": 2e-5,
            "unet_sdxl": 4e-5,
            "schedules": 1e-12,
            "why": "float32 sums in another order differ by about 1e-6; a missed half swap by over 0.1",
            "flux": "mostly torch's float32 exp in diffusers' sinusoids: an ulp, magnified by 1000 t",
        },
        "schedules": f"the published formula in 50 digits; diffusers' (float32) is within {worst:.1e}",
        "other_files": {
            "schedulers.safetensors": "tools/make_scheduler_references.py; tests/test_schedulers.py, at 1e-5",
        },
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
