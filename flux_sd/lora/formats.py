"""How files of adapters call their tensors: endings, prefixes, and what gives a kind away that is not read.

Data, and the few functions that look it up. Sources: the savers of kohya-ss/sd-scripts, LyCORIS, PEFT,
diffusers, XLabs-AI/x-flux, OneTrainer, black-forest-labs/flux and the loader of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..tensor_info import TensorInfo


@dataclass(frozen=True)
class Ending:
    """The end of a tensor's name, behind the module that it changes."""

    text: str
    kind: str  # what the tensor is, in the words of deltas.py
    family: str  # whose convention it is; "" for one that several share


ENDINGS: tuple[Ending, ...] = (
    Ending(".lora_down.weight", "down", "kohya"),
    Ending(".lora_up.weight", "up", "kohya"),
    Ending(".lora_mid.weight", "mid", "kohya"),
    Ending(".alpha", "alpha", ""),
    Ending(".dora_scale", "dora_scale", ""),
    Ending(".lora_A.weight", "down", "PEFT"),
    Ending(".lora_A.default.weight", "down", "PEFT"),
    Ending(".lora_B.weight", "up", "PEFT"),
    Ending(".lora_B.default.weight", "up", "PEFT"),
    Ending(".lora_B.bias", "bias", "PEFT"),
    Ending(".lora_B.default.bias", "bias", "PEFT"),
    Ending(".lora_magnitude_vector", "magnitude", "PEFT"),
    Ending(".lora_magnitude_vector.weight", "magnitude", "PEFT"),
    Ending(".lora_magnitude_vector.default.weight", "magnitude", "PEFT"),
    Ending(".lora.down.weight", "down", "diffusers 2023"),
    Ending(".lora.up.weight", "up", "diffusers 2023"),
    Ending(".lora_linear_layer.down.weight", "down", "diffusers 2023"),
    Ending(".lora_linear_layer.up.weight", "up", "diffusers 2023"),
    # Of attention processors (diffusers 2023, XLabs): what stands before names the processor's part.
    Ending(".down.weight", "down", "attention processors"),
    Ending(".up.weight", "up", "attention processors"),
    *(Ending(f".hada_w{i}_{side}", f"w{i}_{side}", "LyCORIS LoHa") for i in (1, 2) for side in "ab"),
    *(Ending(f".hada_t{i}", f"t{i}", "LyCORIS LoHa") for i in (1, 2)),
    *(Ending(f".lokr_w{i}_{side}", f"w{i}_{side}", "LyCORIS LoKr") for i in (1, 2) for side in "ab"),
    *(Ending(f".lokr_{part}", part, "LyCORIS LoKr") for part in ("w1", "w2", "t2")),
    Ending(".diff", "diff", "full differences"),
    Ending(".diff_b", "diff_b", "full differences"),
    Ending(".w_norm", "diff", "full differences"),
    Ending(".b_norm", "diff_b", "full differences"),
    Ending(".set_weight", "set", "full differences"),
    Ending(".reshape_weight", "reshape", ""),  # ComfyUI: the shape that `down` and `up` have anyway
)
_BY_LENGTH = sorted(ENDINGS, key=lambda ending: -len(ending.text))

# Algorithms that are recognised and not built, by an ending of which one is in the file.
NOT_BUILT: tuple[tuple[str, str], ...] = (
    (".boft_R", "BOFT"),
    (".boft_s", "BOFT"),
    (".oft_blocks", "OFT or BOFT"),
    (".oft_diag", "OFT"),
    (".oft_R.weight", "OFT"),
    (".oft_R.default.weight", "OFT"),
    (".on_input", "IA3"),
    (".ia3_l", "IA3"),
    (".ia3_l.default", "IA3"),
    (".a1.weight", "GLoRA"),
    (".b1.weight", "GLoRA"),
    (".a1", "GLoRA"),
    (".vera_lambda_b", "VeRA"),
    (".lora_embedding_A", "LoRA of a token embedding"),
    (".lora_embedding_A.default", "LoRA of a token embedding"),
)
TOKEN_WIDTHS = (768, 1024, 1280)  # of the text encoders that textual inversions are made for


@dataclass(frozen=True)
class Prefix:
    """What stands before a module's path, and whose module that is."""

    text: str
    roles: tuple[str, ...]  # where it may be, of the networks that a model has
    flat: bool = False  # the path has underscores for dots


MAIN = ("transformer", "unet")
SECOND = ("clip_2", "t5")  # SDXL's second encoder, FLUX's
PREFIXES: tuple[Prefix, ...] = (
    Prefix("lora_unet_", MAIN, flat=True),
    Prefix("lora_transformer_", MAIN, flat=True),  # OneTrainer
    Prefix("lycoris_", MAIN, flat=True),  # SimpleTuner
    Prefix("lora_te_", ("clip",), flat=True),
    Prefix("lora_te1_", ("clip",), flat=True),
    Prefix("lora_te2_", SECOND, flat=True),
    Prefix("lora_te3_", ("t5",), flat=True),
    Prefix("model.diffusion_model.", MAIN),
    Prefix("diffusion_model.", MAIN),  # ComfyUI, newer ai-toolkit
    Prefix("transformer.", MAIN),
    Prefix("unet.", MAIN),
    Prefix("text_encoder.", ("clip",)),
    Prefix("text_encoder_2.", SECOND),
    Prefix("text_encoders.clip_l.transformer.", ("clip",)),
    Prefix("text_encoders.clip_h.transformer.", ("clip",)),
    Prefix("text_encoders.clip_g.transformer.", ("clip_2",)),
    Prefix("text_encoders.t5xxl.transformer.", ("t5",)),
    Prefix("base_model.model.", (*MAIN, "clip", "clip_2", "t5")),  # PEFT's own saver
    Prefix("transformer.base_model.model.", MAIN),
    Prefix("unet.base_model.model.", MAIN),
    Prefix("", MAIN),
)
_LONGEST_FIRST = sorted(PREFIXES, key=lambda prefix: -len(prefix.text))

# Parts of attention processors, and the layers that they change; see names.py.
PROCESSORS: tuple[tuple[str, str], ...] = (
    ("processor.to_q_lora", "to_q"),
    ("processor.to_k_lora", "to_k"),
    ("processor.to_v_lora", "to_v"),
    ("processor.to_out_lora", "to_out.0"),
    ("processor.qkv_lora1", "img_attn.qkv"),  # XLabs: 1 is the image's stream
    ("processor.proj_lora1", "img_attn.proj"),
    ("processor.qkv_lora2", "txt_attn.qkv"),
    ("processor.proj_lora2", "txt_attn.proj"),
    ("processor.proj_lora", "linear2"),
    ("to_q_lora", "q_proj"),  # diffusers 2023, text encoders
    ("to_k_lora", "k_proj"),
    ("to_v_lora", "v_proj"),
    ("to_out_lora", "out_proj"),
)
# XLabs: of a single block's first product, queries, keys and values. The layers are those of diffusers.
XLABS_QKV = "single_blocks.{j}.processor.qkv_lora"
SPLIT_QKV = tuple("single_transformer_blocks.{j}.attn." + layer for layer in ("to_q", "to_k", "to_v"))
# Black Forest Labs' control LoRA, and the same under diffusers' names, bring values of norms under their bare
# names, and as many columns again for the first layer: those of the control picture.
NORMS = (".query_norm.scale", ".key_norm.scale", ".norm_q.weight", ".norm_k.weight",
         ".norm_added_q.weight", ".norm_added_k.weight")  # fmt: skip
WIDENED = "img_in.weight"  # as we call it
FIRST_LAYERS = ("img_in", "x_embedder")  # the same in adapters, with dots or underscores
FIRST_COLUMNS = 64  # that it has in a model that a control LoRA is for: a patch of 2x2 latents, 16 channels
CONTROL_STRENGTH = 0.85  # what its authors use

# In names that PEFT's own saver writes, which leaves alpha to adapter_config.json.
PEFT_SAVED = ("base_model.model.", ".lora_A.default.")


def split_ending(name: str) -> tuple[str, Ending] | None:
    """(module, ending) of a tensor's name; None for one that no convention has."""
    for ending in _BY_LENGTH:
        if name.endswith(ending.text) and len(name) > len(ending.text):
            return name[: -len(ending.text)], ending
    return None


def prefixes_of(module: str) -> list[tuple[Prefix, str]]:
    """Every reading of a module's name as (prefix, path), that of the longest prefix first."""
    return [
        (prefix, module[len(prefix.text) :]) for prefix in _LONGEST_FIRST if module.startswith(prefix.text)
    ]


def prefix_roles() -> set[str]:
    """Every network that an adapter can be for."""
    return {role for prefix in PREFIXES for role in prefix.roles}


def not_built(infos: Mapping[str, TensorInfo]) -> str | None:
    """The algorithm of a file that is recognised and not built, or None."""
    for ending, algorithm in NOT_BUILT:
        if any(name.endswith(ending) for name in infos):
            return f"an adapter of the kind {algorithm}"
    return "a textual inversion (an embedding of new words)" if _is_textual_inversion(infos) else None


def _is_textual_inversion(infos: Mapping[str, TensorInfo]) -> bool:
    names: Collection[str] = infos.keys()
    if names and all(name in ("clip_l", "clip_g", "emb_params") for name in names):
        return True
    shapes = [info.shape for info in infos.values()]
    return len(shapes) == 1 and 1 <= len(shapes[0]) <= 2 and shapes[0][-1] in TOKEN_WIDTHS
