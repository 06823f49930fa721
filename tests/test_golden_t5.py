"""The T5 encoder against Candle's stored activations. The case of the released width is slow."""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from procedural import tokens

from flux_sd.t5 import T5Config, T5Encoder

CONFIGS = {
    "t5_tiny_1": T5Config.tiny(1),
    "t5_tiny_3": T5Config.tiny(3),
    "t5_xxl_width_2": replace(T5Config.v1_1_xxl(), num_layers=2),
}


def prompt(vocabulary: int) -> torch.Tensor:
    """14 procedural ids, the end token, pads: [1, 256]."""
    return torch.tensor([[*(i + 2 for i in tokens("input.t5_ids", 14, vocabulary - 2)), 1, *[0] * 241]])


@pytest.mark.parametrize("case", golden.cases("tests/test_golden_t5.py::test_t5"))
@torch.inference_mode()
def test_t5(case: str) -> None:
    model = golden.build(lambda: T5Encoder(CONFIGS[case]))
    assert golden.keys_of(model) == golden.stored_keys(case)
    ids = prompt(CONFIGS[case].vocab_size)
    golden.check_case(case, "input_ids", ids.to(torch.uint32))
    hidden = golden.stored(case)["last_hidden_state"]  # the prompt and the first pads: [1, 32, C]
    golden.check_case(case, "last_hidden_state", model(ids)[:, : hidden.shape[1]])
