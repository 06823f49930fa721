"""Weights with adapters merged, against peft and diffusers; see tools/make_lora_references.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_lora import save
from procedural import fill
from safetensors.torch import load_file
from torch import nn

from flux_sd.clip import ClipTextConfig, ClipTextEncoder
from flux_sd.components import Network
from flux_sd.flux_mmdit import Flux, FluxConfig
from flux_sd.lora.adapters import Adapters, Lora, table_of
from flux_sd.unet import UNet, UNetConfig

STORED = Path(__file__).resolve().parent.parent / "reference_outputs" / "lora"
MANIFEST = json.loads((STORED / "manifest.json").read_text(encoding="utf-8"))
FLUX = FluxConfig.tiny(1, 1)
SD = UNetConfig(4, (8, 16, 16, 16), (1, 1, 1, 0), 1, (1, 2, 2, 2), 12, False, groups=8)
XL = UNetConfig(4, (8, 16, 16), (0, 1, 1), 1, (1, 2, 2), 12, True, 20, groups=8)
CLIP = ClipTextConfig(64, 32, 64, 2, 2, "quick_gelu")
NETWORKS = {
    "transformer": ("transformer", Network("flux_mmdit", FLUX, lambda: Flux(FLUX), lambda pixels, length: 0)),
    "unet_sd": ("unet", Network("unet", SD, lambda: UNet(SD), lambda pixels, length: 0)),
    "unet_xl": ("unet", Network("unet", XL, lambda: UNet(XL), lambda pixels, length: 0)),
    "clip": ("clip", Network("clip", CLIP, lambda: ClipTextEncoder(CLIP), lambda pixels, length: 0)),
}


def adapter_of(case: str) -> Path:
    """The file, or the folder that peft saves."""
    folder = STORED / case / "adapter"
    if (folder / "adapter_config.json").is_file():
        return folder
    return next(folder.glob("*.safetensors"))


def merged(case: str, file: Path) -> tuple[nn.Module, nn.Module]:
    """A network with procedural weights, without the adapter and with it."""
    role, network = NETWORKS[MANIFEST["networks"][case]]
    plain, changed = fill(network.build()), fill(network.build())
    adapters = Adapters.open([Lora(file)], table_of({role: network}), case)
    adapters.apply(role, changed, lambda done, total: None)
    adapters.close()
    return plain, changed


def worst(case: str, changed: nn.Module) -> float:
    """The largest difference from the stored weights, relative to the largest number among them."""
    found = 0.0
    state = changed.state_dict()
    for name, wanted in load_file(STORED / case / "expected.safetensors").items():
        got = state[name][::3] if wanted.ndim < 2 else state[name][::3, ::5]
        assert got.shape == wanted.shape, name
        found = max(found, float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max()))))
    return found


@pytest.mark.parametrize("case", MANIFEST["networks"])
def test_merged_weights_are_those_of_peft_and_diffusers(case: str) -> None:
    plain, changed = merged(case, adapter_of(case))
    difference = worst(case, changed)
    print(f"{case}: {difference:.1e}")
    assert difference <= MANIFEST["tolerance"]
    expected = load_file(STORED / case / "expected.safetensors")
    before, after = plain.state_dict(), changed.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected.keys()
    assert worst(case, plain) > 0.01, "the adapter changes too little to prove anything"


@pytest.mark.parametrize("case", ["flux_diffusers", "clip_peft", "clip_peft_loha", "clip_peft_lokr"])
def test_alpha_read_wrongly_would_be_noticed(case: str, tmp_path: Path) -> None:
    """The same tensors without what the header or the configuration says."""
    source = adapter_of(case)
    file = source if source.is_file() else source / "adapter_model.safetensors"

    _, changed = merged(case, save(load_file(file), tmp_path / "bare.safetensors"))
    assert worst(case, changed) > 0.01
