"""A FLUX of the released widths, cut to 2 + 4 blocks and 2 T5 layers, in both layouts: it loads and paints.

About 4 GB of synthetic weights a layout and two minutes on two cores, hence `slow`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import make_synthetic_checkpoint as synthetic
import pytest
import torch
from conftest import TINY_FLUX
from helpers_flux import open_model

from flux_sd.request import GenerationRequest
from flux_sd.versions import SDVersion

ARGUMENTS = "--depth 2 4 --t5-layers 2 --dtype bf16 --shard-size 1".split()


@pytest.mark.slow
def test_both_layouts_load_run_one_step_and_agree_bit_for_bit(tmp_path: Path) -> None:
    row = SDVersion.FLUX_SCHNELL.info
    assert row.flux is not None
    configs = replace(
        row.flux,
        transformer=replace(row.flux.transformer, depth=2, depth_single_blocks=4),
        t5=replace(row.flux.t5, num_layers=2),
    )
    info = replace(row, flux=configs)
    request = GenerationRequest(prompt="a lighthouse", width=256, height=256, steps=1, seed=0)
    results = []
    for layout in ("bfl", "diffusers"):
        folder = tmp_path / layout
        arguments = ["flux-schnell", str(folder), "--layout", layout, *ARGUMENTS]
        assert synthetic.main([*arguments, "--tokenizers", str(TINY_FLUX)]) == 0
        results.append(open_model(folder, info, dtype=torch.bfloat16).generate(request)[0])
    assert torch.equal(results[0].latents, results[1].latents)
    assert results[0].image.size == (256, 256)
    assert 0.1 < results[0].latents.std() < 10
    assert len(results[1].metadata["files"]["transformer"]) > 1, "the diffusers layout should be sharded"
