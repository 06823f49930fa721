"""For every version at its real size: adapters under every kind of name find their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_headers as header
import pytest

from flux_sd import numerics
from flux_sd.lora.adapter_file import AdapterFile
from flux_sd.lora.adapters import table_of
from flux_sd.lora.names import Names
from flux_sd.model_loader import FAMILIES
from flux_sd.versions import SDVersion

Shape = tuple[int, int]  # rows, columns
RANK = 16
KOHYA, PEFT = (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")
FLUX: dict[tuple[str, str], dict[str, Shape]] = {
    KOHYA: {
        "lora_unet_double_blocks_18_img_attn_qkv": (9216, 3072),
        "lora_unet_single_blocks_37_linear1": (21504, 3072),
        "lora_unet_final_layer_adaLN_modulation_1": (6144, 3072),
        "lora_transformer_single_transformer_blocks_35_attn_to_k": (3072, 3072),
        "lycoris_transformer_blocks_18_ff_context_net_2": (3072, 12288),
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_k": (4096, 4096),
        "lora_te3_encoder_block_23_layer_1_DenseReluDense_wo": (4096, 10240),
    },
    PEFT: {
        "transformer.single_transformer_blocks.36.proj_mlp": (12288, 3072),
        "transformer.time_text_embed.text_embedder.linear_1": (3072, 768),
        "diffusion_model.single_blocks.36.linear2": (3072, 15360),
        "base_model.model.transformer_blocks.17.norm1_context.linear": (18432, 3072),
        "double_blocks.17.txt_mlp.0": (12288, 3072),
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": (768, 768),
        "text_encoder_2.encoder.block.23.layer.0.SelfAttention.o": (4096, 4096),
    },
    (".up.weight", ".down.weight"): {
        "double_blocks.18.processor.qkv_lora2": (9216, 3072),
        "single_blocks.34.processor.qkv_lora": (9216, 3072),
        "single_blocks.37.processor.proj_lora": (3072, 15360),
    },
}


def stable_diffusion(context: int, layers: int, width: int) -> dict[tuple[str, str], dict[str, Shape]]:
    """1 and 2: width of the text states, layers and width of the text encoder."""
    return {
        KOHYA: {
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v": (320, context),
            "lora_unet_output_blocks_11_1_transformer_blocks_0_attn2_to_k": (320, context),
            "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
            "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320),
            f"lora_te_text_model_encoder_layers_{layers - 1}_self_attn_q_proj": (width, width),
        },
        PEFT: {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (1280, 1280),
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, context),
            f"text_encoder.text_model.encoder.layers.{layers - 1}.mlp.fc2": (width, 4 * width),
        },
        (".lora.up.weight", ".lora.down.weight"): {
            "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v": (1280, context),
        },
        (".up.weight", ".down.weight"): {
            "down_blocks.1.attentions.1.transformer_blocks.0.attn2.processor.to_k_lora": (640, context),
        },
    }


SDXL: dict[tuple[str, str], dict[str, Shape]] = {
    KOHYA: {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (640, 2048),
        "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2": (1280, 5120),
        "lora_unet_middle_block_1_proj_in": (1280, 1280),
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_q": (1280, 1280),
        "lora_te1_text_model_encoder_layers_11_self_attn_v_proj": (768, 768),
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": (5120, 1280),
    },
    PEFT: {
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v": (1280, 2048),
        "diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k": (1280, 2048),
        "unet.add_embedding.linear_1": (1280, 2816),
        "text_encoder_2.text_projection": (1280, 1280),
    },
}


def wanted(version: SDVersion) -> dict[tuple[str, str], dict[str, Shape]]:
    """What adapters of its family have, by their endings."""
    if version.is_flux:
        return FLUX
    if version.is_xl:
        return SDXL
    return (
        stable_diffusion(768, 12, 768)
        if version.info.key.startswith("sd15")
        else stable_diffusion(1024, 23, 1024)
    )


@pytest.fixture(scope="module")
def known() -> dict[Any, Names]:
    """Names of networks that several versions have, made once."""
    return {}


@pytest.mark.parametrize("key", [version.info.key for version in SDVersion if version.info.repo is not None])
def test_adapters_under_every_kind_of_name_find_their_places(
    key: str, known: dict[Any, Names], tmp_path: Path
) -> None:
    version = SDVersion.parse(key)
    shapes: dict[str, tuple[int, ...]] = {}
    for (up, down), layers in wanted(version).items():
        for name, (rows, columns) in layers.items():
            shapes |= {name + up: (rows, RANK), name + down: (RANK, columns)}
    count = sum(len(layers) for layers in wanted(version).values())
    networks = FAMILIES[version.info.family].networks(version.info, numerics.reference())
    with AdapterFile.open(header.safetensors(tmp_path / "a.safetensors", shapes)) as file:
        plan = table_of(networks, known).plan(file)
        assert [(misfit.change.name, misfit.why) for misfit in plan.misfits] == []
        assert len(plan.placed) == count
        moved = {move.target for placed in plan.placed for move in placed.moves}
        assert len(moved) > count - 3  # two names may mean parts of one weight
