"""Writes tests/data/sd_layouts.json: the names and shapes that the classes of diffusers and transformers have
for every released Stable Diffusion model, and what diffusers' own converters make of single-file names.

Run where diffusers and transformers are installed; HUB holds the released repositories' configs:

    make_sd_layouts.py HUB

Each entry: `of` (repository and folder), `class`, `names` (see `fold` in sd_names.py; with `as` only those
that differ from another entry), `parameters`; for UNets and autoencoders `ldm`: the digest of the lines "LDM
name, tab, diffusers name", sorted, as diffusers' converter pairs them; for `open_clip`, of a small encoder:
which rows of which of OpenCLIP's tensors each parameter has.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as converters
from sd_names import fold, open_clip, unet_ldm

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "sd_layouts.json"
UNETS = {
    "unet_sd15": "runwayml/stable-diffusion-v1-5",
    "unet_sd15_inpaint": "runwayml/stable-diffusion-inpainting",
    "unet_sd21": "stabilityai/stable-diffusion-2-1",
    "unet_sd2_inpaint": "stabilityai/stable-diffusion-2-inpainting",
    "unet_sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "unet_sdxl_inpaint": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
}
ENCODERS = {
    "clip_l": ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder", "CLIPTextModel"),
    "clip_h": ("stabilityai/stable-diffusion-2-1", "text_encoder", "CLIPTextModel"),
    "clip_bigg": (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "text_encoder_2",
        "CLIPTextModelWithProjection",
    ),
}


class Tag(str):
    """Stands for a tensor while a converter moves it: remembers where it came from."""

    shape = (1, 1)

    def __getitem__(self, key: Any) -> Tag:
        return self


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def digest(pairs: dict[str, str]) -> str:
    """Of theirs -> ours."""
    lines = sorted(f"{theirs}\t{ours}" for theirs, ours in pairs.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def entry(of: str, module: torch.nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    count = sum(tensor.numel() for tensor in module.parameters())
    return {"of": of, "class": type(module).__name__, "parameters": count, "names": fold(shapes)}


def unet(hub: Path, repository: str) -> dict[str, Any]:
    config = json.loads((hub / repository / "unet/config.json").read_text())
    with torch.device("meta"):
        module = diffusers.UNet2DConditionModel.from_config(config)
    shapes = shapes_of(module)
    stored = {f"model.diffusion_model.{unet_ldm(name, shapes)}": None for name in shapes}
    converted = converters.convert_ldm_unet_checkpoint({name: Tag(name) for name in stored}, config)
    assert converted.keys() == shapes.keys(), converted.keys() ^ shapes.keys()
    pairs = {str(tag).removeprefix("model.diffusion_model."): name for name, tag in converted.items()}
    return entry(f"{repository}/unet", module, shapes) | {"ldm": digest(pairs)}


def autoencoder(hub: Path, repository: str) -> dict[str, Any]:
    """Our names are LDM's, so those are what the converter is given."""
    from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig

    config = json.loads((hub / repository / "vae/config.json").read_text())
    with torch.device("meta"):
        module = diffusers.AutoencoderKL.from_config(config)
        ours = AutoEncoder(AutoEncoderConfig.sd()).state_dict()
    converted = converters.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{n}": Tag(n) for n in ours}, config
    )
    shapes = shapes_of(module)
    assert converted.keys() == shapes.keys(), converted.keys() ^ shapes.keys()
    pairs = {str(tag): name for name, tag in converted.items()}
    return entry(f"{repository}/vae", module, shapes) | {"ldm": digest(pairs)}


def encoder(hub: Path, repository: str, folder: str, kind: str) -> dict[str, Any]:
    """Under the names of the released files: transformers 5 drops `text_model.` in one of the classes."""
    config = transformers.CLIPTextConfig.from_json_file(hub / repository / folder / "config.json")
    with torch.device("meta"):
        module = getattr(transformers, kind)(config)
    shapes = {}
    for name, shape in shapes_of(module).items():
        is_bare = not name.startswith(("text_model.", "text_projection."))
        shapes[f"text_model.{name}" if is_bare else name] = shape
    shapes.pop("text_model.embeddings.position_ids", None)
    return entry(f"{repository}/{folder}", module, shapes)


def open_clip_rows() -> dict[str, Any]:
    """Every parameter of a small encoder: [OpenCLIP's tensor, first row, end, transposed]; from values."""
    sizes = {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=11, max_position_embeddings=5, projection_dim=6, **sizes)
    module = transformers.CLIPTextModelWithProjection(config)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        theirs, third, _ = open_clip(name)
        shape = (3 * tensor.shape[0], *tensor.shape[1:]) if third is not None else tuple(tensor.shape)
        if theirs not in stored:
            first = sum(other.numel() for other in stored.values())
            stored[theirs] = torch.arange(first, first + torch.Size(shape).numel()).reshape(shape)
    prefix = "conditioner.embedders.1.model."
    given = {prefix + name: tensor for name, tensor in stored.items()}
    rows = {}
    for name, tensor in converters.convert_open_clip_checkpoint(module, given, prefix).items():
        source, whole = next((n, t) for n, t in stored.items() if bool((t == tensor.flatten()[0]).any()))
        turned = tensor.ndim == 2 and tensor.shape[1] > 1 and bool(tensor[0, 1] - tensor[0, 0] != 1)
        first = int((tensor.flatten()[0] - whole.flatten()[0]) // max(whole[0].numel(), 1))
        end = whole.shape[0] if turned else first + tensor.shape[0]
        expected = whole.T if turned else whole[first:end]
        assert torch.equal(tensor, expected), name
        rows[name] = [source, first, end, turned]
    return {"sizes": sizes | {"vocab_size": 11, "max_position_embeddings": 5}, "rows": rows}


def main(hub: Path) -> None:
    found: dict[str, Any] = {
        "made_by": f"tools/make_sd_layouts.py, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}"
    }
    for name, repository in UNETS.items():
        found[name] = unet(hub, repository)
        base = found.get(name.removesuffix("_inpaint"), {})
        if base.get("ldm") == found[name]["ldm"] and name.endswith("_inpaint"):
            found[name]["as"] = name.removesuffix("_inpaint")  # `names` holds what differs
            same = base["names"].items()
            found[name]["names"] = {n: s for n, s in found[name]["names"].items() if (n, s) not in same}
    found["vae_sd"] = autoencoder(hub, "stabilityai/stable-diffusion-2-1")
    for name, (repository, folder, kind) in ENCODERS.items():
        found[name] = encoder(hub, repository, folder, kind)
    found["open_clip"] = open_clip_rows()
    lines = [f"{json.dumps(key)}: {_text(value)}" for key, value in found.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _text(value: Any) -> str:
    """One line a name, so that a change shows where it is."""
    if not isinstance(value, dict):
        return json.dumps(value)
    lines = []
    for key, inner in value.items():
        if key in ("names", "rows"):
            listed = ",\n  ".join(f"{json.dumps(n)}: {json.dumps(s)}" for n, s in inner.items())
            lines.append(f"{json.dumps(key)}: {{\n  {listed}\n }}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(inner)}")
    return "{\n " + ",\n ".join(lines) + "\n}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
