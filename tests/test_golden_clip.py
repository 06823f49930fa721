"""CLIP against Candle's stored activations. The four full-size cases are slow."""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from procedural import tokens

from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.numerics import candle

# Candle's encoders end at the final norm: no projection.
BIG_G = replace(ClipTextConfig.open_clip_bigg(), projection_dim=None)
CONFIGS = {
    "clip_flux_tiny": ClipTextConfig.tiny(),
    "clip_flux_tiny_unpadded": ClipTextConfig.tiny(),
    "clip_flux_large": ClipTextConfig.clip_l(),
    "clip_sd15": ClipTextConfig.clip_l(),
    "clip_sd21": ClipTextConfig.open_clip_h(),
    "clip_sdxl_2": BIG_G,
}


def prompt(case: str) -> torch.Tensor:
    """[1, L]: start token, procedural ids, end tokens from 15 (FLUX) or 20 (Stable Diffusion) on."""
    vocabulary = CONFIGS[case].vocab_size
    length, end = (16, 15) if case.endswith("unpadded") else (77, 15 if "flux" in case else 20)
    ids = tokens("input.clip_ids", length, vocabulary - 2)
    return torch.tensor([[vocabulary - 2, *ids[1:end], *[vocabulary - 1] * (length - end)]])


@pytest.mark.parametrize("case", golden.cases("tests/test_golden_clip.py::test_clip"))
@torch.inference_mode()
def test_clip(case: str) -> None:
    config = CONFIGS[case].with_gelu(candle().clip_gelu)
    model = golden.build(lambda: ClipTextEncoder(config))
    assert golden.keys_of(model) == golden.stored_keys(case)
    ids = prompt(case)
    golden.check_case(case, "input_ids", ids.to(torch.uint32))
    output = model(ids)
    for tensor in golden.stored(case).keys() - {"input_ids"}:
        golden.check_case(case, tensor, getattr(output, tensor))


def test_gelu_has_two_forms_and_quick_gelu_one() -> None:
    assert ClipTextConfig.open_clip_h().activation == "gelu"
    assert ClipTextConfig.open_clip_h().with_gelu("tanh").activation == "gelu_tanh"
    assert ClipTextConfig.open_clip_h().with_gelu("tanh").with_gelu("erf").activation == "gelu"
    assert ClipTextConfig.clip_l().with_gelu("tanh").activation == "quick_gelu"
