"""The weight maps against layouts that an independent implementation was seen to have.

`*.layout.json` says of each of diffusers' tensors which rows of which of our tensors it has. It was written
by tools/make_oracle_references.py, which does not know our maps, while filling the models of diffusers that
tests/test_oracle.py compares ours with. About a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from procedural import weight
from safetensors.numpy import save_file
from torch import nn

from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.checkpoint import open_checkpoint
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.load_plan import fill, plan_load

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "oracle"
# what diffusers called the projections of an autoencoder's attention before release 0.16
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def layout(name: str) -> dict[str, dict[str, object]]:
    return json.loads((STORED / f"{name}.layout.json").read_text(encoding="utf-8"))


def theirs(row: dict[str, object]) -> np.ndarray:
    """One of their tensors, made of ours."""
    ours = weight(str(row["ours"]), tuple(row["of"]))  # type: ignore[arg-type]
    ranges = row["rows"]
    assert isinstance(ranges, list)
    parts = [ours[first:last] for first, last in ranges] or [ours]
    return np.concatenate(parts).reshape(row["shape"])  # type: ignore[call-overload]


def legacy(name: str) -> str:
    for new, old in LEGACY.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


@pytest.mark.parametrize(
    ("component", "dialect", "stored", "build", "config"),
    [
        ("flux_mmdit", "diffusers", "flux_dev", Flux, FluxConfig.tiny(guidance_embed=True)),
        ("autoencoder", "diffusers", "autoencoder", AutoEncoder, AutoEncoderConfig.tiny()),
        ("autoencoder", "diffusers_legacy", "autoencoder", AutoEncoder, AutoEncoderConfig.tiny()),
    ],
)
def test_each_parameter_takes_the_rows_that_are_its_own(
    component: str, dialect: str, stored: str, build: type[nn.Module], config: object, tmp_path: Path
) -> None:
    tensors = {name: theirs(row) for name, row in layout(stored).items()}
    if dialect == "diffusers_legacy":
        tensors = {legacy(name): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model: nn.Module = build(config)
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        plan = plan_load(component, model, config, checkpoint)
        assert plan.map.name == f"{component}.{dialect}"
        fill(model, plan)
    for name, parameter in model.named_parameters():
        expected = torch.from_numpy(weight(name, tuple(parameter.shape)))
        assert torch.equal(parameter, expected), f"{name} has other values: {plan.sources_of(name).row}"
