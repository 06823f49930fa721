"""The places where Candle's arithmetic parts from the published models', one named field each. Floor 0.

`reference()` is what the models' authors published, and the default; `candle()` is what Candle 0.11.1
computes. A field is copied into the config of whatever it concerns; no network asks which preset is on.
`differences()` is the table that `flux-sd numerics` prints; `NOT_MIRRORED` is what no preset imitates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from .errors import RequestError

FLUX_RS = "candle-transformers models/flux/model.rs"
SAMPLING_RS = "candle-transformers models/flux/sampling.rs"
FLUX_EXAMPLE = "candle-examples flux/main.rs"
SD_RS = "candle-transformers models/stable_diffusion/mod.rs"
SD_EXAMPLE = "candle-examples stable-diffusion/main.rs"
BFL_SAMPLING = "black-forest-labs/flux src/flux/sampling.py"


def _about(what: str, source: str, acts: str) -> Mapping[str, str]:
    """What either value does, the file of Candle's that shows it, and the function of ours that reads it."""
    return {"what": what, "source": source, "acts": acts}


@dataclass(frozen=True)
class Numerics:
    """One field per known difference."""

    name: str
    rope_dtype: Literal["float32", "model"] = field(
        metadata=_about(
            "rotary positions, frequencies, cosines, sines and rotation in float32, or in the weights' dtype",
            FLUX_RS,
            "flux_mmdit.rotary_table",
        )
    )
    latents_dtype: Literal["float32", "model"] = field(
        metadata=_about(
            "latents between two steps and the size of a step in float32, or in the weights' dtype",
            SAMPLING_RS,
            "sampling.denoise",
        )
    )
    clip_gelu: Literal["erf", "tanh"] = field(
        metadata=_about(
            "GELU of the OpenCLIP encoders (SD 2.1, SDXL's second; FLUX's has none): exact, or tanh's",
            "candle-transformers models/stable_diffusion/clip.rs",
            "clip.activate",
        )
    )
    geglu: Literal["erf", "tanh"] = field(
        metadata=_about(
            "GELU of the UNets' gated feed-forward: exact, or tanh's",
            "candle-transformers models/stable_diffusion/attention.rs",
            "sd_loader.unet_config",
        )
    )
    sdxl_added: bool = field(
        metadata=_about(
            "whether SDXL's UNet is given the pooled text and the six sizes that it was trained with",
            "candle-transformers models/stable_diffusion/unet_2d.rs",
            "sd_loader.unet_config",
        )
    )
    sdxl_hidden: Literal["penultimate", "last"] = field(
        metadata=_about(
            "text states that SDXL reads: before each encoder's last layer, or after it and the final norm",
            SD_EXAMPLE,
            "sd_generation.text_states",
        )
    )
    sdxl_pad: Literal["own", "second"] = field(
        metadata=_about(
            "what fills SDXL's first prompt up to 77: its own end token, or the second encoder's '!'",
            "candle-transformers models/stable_diffusion/clip.rs",
            "sd_loader.padding",
        )
    )
    sdxl_scale: float | None = field(
        metadata=_about(
            "scale of SDXL's latents (not Turbo's): its autoencoder's own 0.13025 (None), or 0.18215",
            SD_EXAMPLE,
            "sd_loader.vae_config",
        )
    )
    sd2_inpaint: Literal["v_prediction"] | None = field(
        metadata=_about(
            "what Stable Diffusion 2's inpainting model predicts: noise, as its files say (None), or v",
            SD_EXAMPLE,
            "sd_loader.diffusion",
        )
    )
    stride: Literal["exact", "integer"] = field(
        metadata=_about(
            "distance of the trailing schedule's steps: 1000 / N, or that rounded down, which can add a step",
            "candle-transformers models/stable_diffusion/euler_ancestral_discrete.rs",
            "schedulers.spacing.trailing",
        )
    )
    sdxl_sampler: str | None = field(
        metadata=_about(
            "sampler of SDXL and its inpainting model where none is asked for: Euler (None), or DDIM",
            SD_RS,
            "sd_plan.plan_sd",
        )
    )
    sd_steps: int | None = field(
        metadata=_about(
            "steps of Stable Diffusion (not Turbo) where none are asked for: the version's own (None), or 30",
            SD_EXAMPLE,
            "sd_plan.plan_sd",
        )
    )
    sd_guidance: float | None = field(
        metadata=_about(
            "guidance of Stable Diffusion (not Turbo) where none is asked for: the version's own, or 7.5",
            SD_EXAMPLE,
            "sd_plan.plan_sd",
        )
    )
    t5_length: int | None = field(
        metadata=_about(
            "T5 tokens of FLUX dev: the version's own 512 (None), or at most 256 for every version",
            FLUX_EXAMPLE,
            "flux_generation.plan_flux",
        )
    )
    t5_keep_end_token: bool = field(
        metadata=_about(
            "whether a T5 prompt that is cut keeps its end token in the last place",
            FLUX_EXAMPLE,
            "text.T5Tokenizer.encode",
        )
    )
    guidance: float | None = field(
        metadata=_about(
            "guidance of FLUX dev where the request states none: the version's own 3.5 (None), or 4",
            FLUX_EXAMPLE,
            "flux_generation.plan_flux",
        )
    )
    size: Literal["refuse", "up"] = field(
        metadata=_about(
            "a size that is no multiple of 16: refused with its neighbours named, or rounded up",
            SAMPLING_RS,
            "steps.check_size",
        )
    )
    to_bytes: Literal["round", "truncate"] = field(
        metadata=_about(
            "float pixels to 8 bits: the nearest level, or the one below",
            FLUX_EXAMPLE,
            "image.to_picture",
        )
    )


def reference() -> Numerics:
    """What the authors published, in float32 or better outside the network: their program truncates to bytes,
    and rounds times and latents to bfloat16 (see NOT_MIRRORED)."""
    return Numerics(
        name="reference",
        rope_dtype="float32",
        latents_dtype="float32",
        clip_gelu="erf",
        geglu="erf",
        sdxl_added=True,
        sdxl_hidden="penultimate",
        sdxl_pad="own",
        sdxl_scale=None,
        sd2_inpaint=None,
        stride="exact",
        sdxl_sampler=None,
        sd_steps=None,
        sd_guidance=None,
        t5_length=None,
        t5_keep_end_token=True,
        guidance=None,
        size="refuse",
        to_bytes="round",
    )


def candle() -> Numerics:
    """What Candle 0.11.1 computes (candle-transformers, and its FLUX example)."""
    return Numerics(
        name="candle",
        rope_dtype="model",
        latents_dtype="model",
        clip_gelu="tanh",
        geglu="tanh",
        sdxl_added=False,
        sdxl_hidden="last",
        sdxl_pad="second",
        sdxl_scale=0.18215,
        sd2_inpaint="v_prediction",
        stride="integer",
        sdxl_sampler="ddim",
        sd_steps=30,
        sd_guidance=7.5,
        t5_length=256,
        t5_keep_end_token=False,
        guidance=4.0,
        size="up",
        to_bytes="truncate",
    )


PRESETS = {"reference": reference, "candle": candle}


def parse(name: str) -> Numerics:
    """The preset called `name`. Raises RequestError for another word."""
    if name not in PRESETS:
        raise RequestError(f"numerics {name!r} is unknown: choose {' or '.join(PRESETS)}")
    return PRESETS[name]()


@dataclass(frozen=True)
class Difference:
    """One row of the table: a field of Numerics with the value of either preset."""

    name: str
    reference: object
    candle: object
    what: str
    source: str
    acts: str


def differences() -> list[Difference]:
    """Every field of Numerics but its name."""
    ours, theirs = reference(), candle()
    return [
        Difference(f.name, getattr(ours, f.name), getattr(theirs, f.name), **f.metadata)
        for f in fields(Numerics)
        if f.metadata
    ]


@dataclass(frozen=True)
class NotMirrored:
    """Something that another program does and that neither preset imitates."""

    name: str
    whose: Literal["Candle", "authors"]
    they: str
    we: str
    source: str
    built: bool = True  # whether what it concerns is part of this package yet


NOT_MIRRORED = (
    NotMirrored(
        "quantized_products",
        "Candle",
        "rounds activations to 8 bits as well, in blocks that depend on the processor",
        "decode the weights and multiply in the compute dtype",
        "candle-core quantized/k_quants.rs",
    ),
    NotMirrored(
        "bfloat16_order",
        "Candle",
        "rounds attention scores and weights to bfloat16, and sums products in an order of its own",
        "leave attention to scaled_dot_product_attention, which keeps them in float32",
        FLUX_RS,
    ),
    NotMirrored(
        "bfloat16_softmax",
        "Candle",
        "on a CPU adds up a softmax one term after another in bfloat16, and the sum stops growing: many like "
        "tokens weigh more than 1 together",
        "have weights that add up to 1",
        "candle-core cpu/kernels.rs (vec_reduce_sum)",
    ),
    NotMirrored(
        "bfloat16_bytes",
        "Candle",
        "computes (pixel + 1) * 127.5 in the decoder's dtype before it truncates",
        "compute it in float32",
        FLUX_EXAMPLE,
    ),
    NotMirrored(
        "bfloat16_convolutions",
        "Candle",
        "has no convolution in bfloat16 on a CPU: its autoencoder runs in float32 there or not at all",
        "decode in the compute dtype",
        "candle-core cpu_backend/conv2d.rs",
    ),
    NotMirrored(
        "clip_beyond_77",
        "Candle",
        "fails on a prompt of more than 77 CLIP tokens",
        "cut it, keep the end token, and say what was cut",
        "candle-transformers models/clip/text_model.rs",
    ),
    NotMirrored(
        "seeds",
        "Candle",
        "has no seed for noise on a CPU, and draws on the device elsewhere",
        "draw on the CPU, image i from seed + i; noise can be given and written out",
        "candle-core cpu_backend/mod.rs",
    ),
    NotMirrored(
        "time_dtype",
        "authors",
        "round times and guidance to bfloat16 before the sinusoid: step 750 becomes 752",
        "keep them float32, as Candle does",
        BFL_SAMPLING,
    ),
    NotMirrored(
        "unipc",
        "Candle",
        "takes UniPC's log-SNR one step early, transposes the corrector's matrix and ignores the betas",
        "compute UniPC as published",
        "candle-transformers models/stable_diffusion/uni_pc.rs",
    ),
    NotMirrored(
        "sd3_last_context_block",
        "Candle",
        "never applies the q and k norms of Stable Diffusion 3's last context block",
        "have no Stable Diffusion 3",
        "candle-transformers models/mmdit/blocks.rs",
        built=False,
    ),
)
