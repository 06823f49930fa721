"""The names of Stable Diffusion's tensors in single-file (LDM) checkpoints, by formula from diffusers' names.

Shares nothing with `weights_maps/`, which lists the blocks one by one: so each can be held against the other.
Formulas: LDM's UNetModel (CompVis/stable-diffusion `openaimodel.py`) numbers residual blocks and changes of
size through in one list for each direction, two residual blocks a level on the way down and three on the way
up; OpenCLIP (mlfoundations/open_clip `transformer.py`).
"""

from __future__ import annotations

from collections.abc import Collection

TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
THIRDS = ("q_proj", "k_proj", "v_proj")


def unet_ldm(name: str, names: Collection[str]) -> str:
    """LDM's name for a tensor of diffusers' UNet, of which `names` are all."""
    layer, _, kind = name.rpartition(".")
    if layer in TOP:
        return f"{TOP[layer]}.{kind}"
    side, *rest = name.split(".")
    if side == "mid_block":
        part, index, *leaf = rest
        block = "middle_block.1" if part == "attentions" else f"middle_block.{2 * int(index)}"
        return f"{block}.{_leaf(part, leaf)}"
    level, part, index, *leaf = rest
    if part == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{kind}"
    if part == "upsamplers":
        before = f"up_blocks.{level}.attentions.0."
        slot = 2 if any(other.startswith(before) for other in names) else 1
        return f"output_blocks.{3 * int(level) + 2}.{slot}.conv.{kind}"
    number = 3 * int(level) + int(index)
    block = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
    return f"{block}.{0 if part == 'resnets' else 1}.{_leaf(part, leaf)}"


def _leaf(part: str, leaf: list[str]) -> str:
    """What stands behind the block: transformers have the same names on both sides."""
    return ".".join(leaf) if part == "attentions" else f"{RESNET[leaf[0]]}.{leaf[1]}"


def open_clip(name: str) -> tuple[str, int | None, bool]:
    """(OpenCLIP's name for a tensor of Hugging Face's text encoder, which third of its rows that is or None,
    whether it is stored transposed)."""
    match name.split("."):
        case ["text_projection", "weight"]:
            return "text_projection", None, True
        case ["text_model", "embeddings", "token_embedding", kind]:
            return f"token_embedding.{kind}", None, False
        case ["text_model", "embeddings", "position_embedding", "weight"]:
            return "positional_embedding", None, False
        case ["text_model", "final_layer_norm", kind]:
            return f"ln_final.{kind}", None, False
        case ["text_model", "encoder", "layers", index, "self_attn", which, kind] if which in THIRDS:
            return f"transformer.resblocks.{index}.attn.in_proj_{kind}", THIRDS.index(which), False
        case ["text_model", "encoder", "layers", index, *leaf, kind]:
            return f"transformer.resblocks.{index}.{CLIP_LAYER['.'.join(leaf)]}.{kind}", None, False
    raise ValueError(f"{name} is no tensor of a CLIP text encoder")


def fold(names: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Names and shapes with alternatives in braces, `a.{0,1}.{weight,bias}`: the same set, in few lines."""
    groups = [(tuple((part,) for part in name.split(".")), shape) for name, shape in names.items()]
    for at in reversed(range(max(len(parts) for parts, _ in groups))):
        merged: dict[tuple[object, ...], list[str]] = {}
        for parts, shape in groups:
            if at < len(parts):
                key = (parts[:at], parts[at + 1 :], shape)
                merged.setdefault(key, []).extend(parts[at])
            else:
                merged[parts, shape] = []
        groups = [
            ((*key[0], tuple(values), *key[1]), key[2]) if values else key  # type: ignore[misc]
            for key, values in merged.items()
        ]
    folded = {}
    for parts, shape in groups:
        words = [part[0] if len(part) == 1 else "{" + ",".join(part) + "}" for part in parts]
        folded[".".join(words)] = list(shape)
    return folded


def unfold(folded: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """What `fold` was given, in another order."""
    names: dict[str, tuple[int, ...]] = {}
    for template, shape in folded.items():
        spelled = [""]
        for part in template.split("."):
            words = part[1:-1].split(",") if part.startswith("{") else [part]
            spelled = [f"{head}.{word}" if head else word for head in spelled for word in words]
        names |= dict.fromkeys(spelled, tuple(shape))
    return names
