"""What a checkpoint can be converted to, and what stays in 16 bits when it is quantised. Floor 0.

Data alone, without torch, so that the command line can list it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import RequestError


@dataclass(frozen=True)
class Target:
    """What to write: `type` is the container's word for matrices; other tensors may get another."""

    name: str
    container: str  # "gguf" or "safetensors"
    type: str
    scaled: bool = False  # fp8 with a scale for every matrix, in ComfyUI's layout

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings that a file of this kind may have, the usual one first."""
        return (".gguf",) if self.container == "gguf" else (".safetensors", ".sft")

    @property
    def quantises(self) -> bool:
        """Whether the type is below 16 bits, so that some tensors are better kept out of it."""
        return self.type not in ("F32", "F16", "BF16")


# What may follow "gguf:", and the number by which `enum ggml_ftype` of ggml.h knows such a file.
GGUF_FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {"Q8_0": 7, "Q6_K": 18, "Q5_1": 9, "Q5_0": 8, "Q4_K": 14, "Q4_1": 3, "Q4_0": 2,
     "BF16": 32, "F16": 1, "F32": 0}
)  # fmt: skip
SAFETENSORS_TYPES: Mapping[str, str] = MappingProxyType(
    {"f32": "F32", "f16": "F16", "bf16": "BF16", "f8_e4m3": "F8_E4M3", "f8_e5m2": "F8_E5M2"}
)
_ALL = (
    *(Target(f"gguf:{kind}", "gguf", kind) for kind in GGUF_FILE_TYPES),
    *(Target(f"safetensors:{word}", "safetensors", kind) for word, kind in SAFETENSORS_TYPES.items()),
    Target("safetensors:f8_e4m3_scaled", "safetensors", "F8_E4M3", scaled=True),
)
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _ALL})

# Matrices of which rows are looked up, by component and by how our names begin.
EMBEDDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "t5": ("shared.", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
        "clip": ("text_model.embeddings.",),
    }
)
# What stays in 16 bits when a file is quantised, by component and by how our names begin. FLUX: as the
# quantise step of city96/ComfyUI-GGUF. T5: llama.cpp never quantises attn_rel_b. CLIP: stable-diffusion.cpp
# keeps every embedding.
KEPT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flux_mmdit": ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
        "t5": EMBEDDINGS["t5"][1:],
        "clip": EMBEDDINGS["clip"],
    }
)
# One scale, or none, has to do for a whole fp8 matrix: an embedding's rare rows would lose most.
KEPT_FROM_FP8: Mapping[str, tuple[str, ...]] = MappingProxyType({"t5": ("shared.",)})
# Elements: a GGUF file keeps tensors up to this size in float32, as ComfyUI-GGUF's convert step does.
SMALL = 1024


def parse_target(text: str) -> Target:
    """The target called `text`, in any case. Raises RequestError that lists them."""
    for name, target in TARGETS.items():
        if name.casefold() == text.casefold():
            return target
    raise RequestError(f"nothing can be converted to {text!r}: choose {', '.join(TARGETS)}")
