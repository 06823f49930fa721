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
        "will compute UniPC as published",
        "candle-transformers models/stable_diffusion/uni_pc.rs",
        built=False,
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
