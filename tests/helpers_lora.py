"""One change of weights written as an adapter in the layouts that people have, by code that shares nothing
with the package: names are spelled out here, or come from tools/sd_names.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers_checkpoints as write
import sd_names
import torch
from helpers_checkpoints import State
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_sd.clip import ClipTextConfig
from flux_sd.flux_mmdit import FluxConfig
from flux_sd.lora.adapters import Adapters, Lora
from flux_sd.lora.names import Target, names_of
from flux_sd.lora.plan import Table
from flux_sd.t5 import T5Config
from flux_sd.unet import UNetConfig

RANK, SCALE = 4, 0.5  # the scale that files with alpha are written for
HIDDEN = 128
FLUX = FluxConfig.tiny(1, 2)
UNET = UNetConfig(4, (32, 32, 32, 32), (1, 0, 0, 0), 1, (1, 2, 2, 2), 32, False, groups=8)
CLIP = ClipTextConfig(96, 32, 64, 2, 2, "quick_gelu")
CLIP_2 = ClipTextConfig(96, 64, 96, 2, 2, "gelu", projection_dim=48)
T5 = T5Config.tiny(1)
Pair = tuple[Tensor, Tensor]  # up [rows, r], down [r, columns]
Pairs = dict[str, Pair]  # our path of a linear -> its change
Named = Callable[[str], str]


@dataclass(frozen=True)
class Part:
    """One network that adapters change."""

    role: str
    component: str
    config: Any

    @property
    def state(self) -> State:
        """Weights small enough that activations stay small; not to be changed."""
        return _state(self.component, self.config)


@functools.cache
def _state(component: str, config: Any) -> State:
    return {name: tensor * 0.1 for name, tensor in write.random_state(component, config).items()}


PARTS = {
    "transformer": Part("transformer", "flux_mmdit", FLUX),
    "t5": Part("t5", "t5", T5),
    "unet": Part("unet", "unet", UNET),
    "clip": Part("clip", "clip", CLIP),
    "clip_2": Part("clip_2", "clip", CLIP_2),
}


@functools.cache
def table(*roles: str) -> Table:
    """The names of a model that has these networks."""
    made = {}
    for role in roles:
        part = PARTS[role]
        made[role] = names_of(Target.of(part.component, part.config, _module(role)))
    return Table(made)


def filled(role: str, state: State | None = None) -> nn.Module:
    """A network with its values, without gradients."""
    values = PARTS[role].state if state is None else state
    module = _module(role).requires_grad_(False)
    module.load_state_dict({name: tensor.clone() for name, tensor in values.items()}, assign=True)
    return module.eval()


def _module(role: str) -> nn.Module:
    """On meta: no time goes into random values."""
    return write.build(PARTS[role].component, PARTS[role].config)


def merged(file: Path | list[Lora], *roles: str, partial: bool = False, base: State | None = None) -> State:
    """What the weights of the first of a model's networks become."""
    adapters = Adapters.open(
        file if isinstance(file, list) else [Lora(file)], table(*roles), "small", partial
    )
    module = filled(roles[0], base)
    adapters.apply(roles[0], module, lambda done, total: None)
    adapters.close()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def pairs(shapes: Mapping[str, tuple[int, int]], seed: int = 0, size: float = 0.1) -> Pairs:
    """Random changes of these [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        path: (random(rows, RANK) * size, random(RANK, columns)) for path, (rows, columns) in shapes.items()
    }


def applied(state: State, changes: Pairs, strength: float = 1.0) -> State:
    """The weights that a change asks for, by the definition."""
    out = dict(state)
    for path, (up, down) in changes.items():
        weight = out[f"{path}.weight"]
        out[f"{path}.weight"] = weight + strength * (up @ down).view(weight.shape)
    return out


# FLUX -----------------------------------------------------------------------------------------------------


def flux_pairs() -> Pairs:
    """Changes that every layout can say: attention, and of a single block's first product q, k and v."""
    shapes = {}
    for i in range(FLUX.depth):
        for stream in ("img", "txt"):
            shapes[f"double_blocks.{i}.{stream}_attn.qkv"] = (3 * HIDDEN, HIDDEN)
            shapes[f"double_blocks.{i}.{stream}_attn.proj"] = (HIDDEN, HIDDEN)
    for j in range(FLUX.depth_single_blocks):
        shapes[f"single_blocks.{j}.linear1"] = (3 * HIDDEN + FLUX.mlp_size, HIDDEN)
        shapes[f"single_blocks.{j}.linear2"] = (HIDDEN, HIDDEN + FLUX.mlp_size)
    made = pairs(shapes)
    for path, (up, _) in made.items():
        if path.endswith("linear1"):
            up[3 * HIDDEN :] = 0
    return made


def flux_split(changes: Pairs) -> Pairs:
    """The same by diffusers' modules: what is fused there shares its down."""
    out: Pairs = {}
    streams = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "linear2": ("proj_out",),
    }
    for path, (up, down) in changes.items():
        kind, number, layer = path.split(".", 2)
        block = f"{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{number}"
        rows = up.shape[0] if len(streams[layer]) == 1 else HIDDEN
        for i, name in enumerate(streams[layer]):
            out[f"{block}.{name}"] = (up[i * rows : (i + 1) * rows].clone(), down.clone())
    return out


def xlabs(changes: Pairs) -> State:
    names = {"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "txt_attn.qkv": "qkv_lora2",
             "txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora"}  # fmt: skip
    out = {}
    for path, (up, down) in changes.items():
        kind, number, layer = path.split(".", 2)
        head = f"{kind}.{number}.processor.{names[layer]}"
        out[f"{head}.up.weight"] = up[: 3 * HIDDEN] if layer == "linear1" else up
        out[f"{head}.down.weight"] = down
    return out


def kohya_split(changes: Pairs) -> State:
    """As kohya's trainer merges adapters of q, k and v apart: block diagonal, each with its own down."""
    out = {}
    for path, (up, down) in changes.items():
        if path.endswith(("qkv", "linear1")):
            thirds = up[: 3 * HIDDEN].split(HIDDEN)
            wide = up.new_zeros(up.shape[0], 3 * RANK)
            for i, third in enumerate(thirds):
                wide[i * HIDDEN : (i + 1) * HIDDEN, i * RANK : (i + 1) * RANK] = third
            up, down = wide, torch.cat([down, down, down])
        out |= kohya({path: (up, down)}, lambda path: "lora_unet_" + flat(path))
    return out


# endings --------------------------------------------------------------------------------------------------


def flat(path: str) -> str:
    return "_".join(path.split("."))


def kohya(changes: Pairs, named: Named, endings: tuple[str, str] = ("lora_down", "lora_up")) -> State:
    out = {}
    for path, (up, down) in changes.items():
        head, rank = named(path), down.shape[0]
        out[f"{head}.{endings[0]}.weight"] = down
        out[f"{head}.{endings[1]}.weight"] = up / SCALE
        out[f"{head}.alpha"] = torch.tensor(SCALE * rank)
    return out


def peft(changes: Pairs, named: Named, scale: float = 1.0, ending: str = ".weight") -> State:
    out = {}
    for path, (up, down) in changes.items():
        out[f"{named(path)}.lora_A{ending}"] = down
        out[f"{named(path)}.lora_B{ending}"] = up / scale
    return out


def plain(changes: Pairs, named: Named, ending: str = ".lora") -> State:
    """diffusers of 2023, XLabs: no alpha."""
    out = {}
    for path, (up, down) in changes.items():
        out[f"{named(path)}{ending}.down.weight"] = down
        out[f"{named(path)}{ending}.up.weight"] = up
    return out


def loha(changes: Pairs, named: Named) -> State:
    """The second product is the change, the first is 1 everywhere."""
    out = {}
    for path, (up, down) in changes.items():
        head, rank = named(path), down.shape[0]
        ones = torch.zeros_like(up), torch.zeros_like(down)
        ones[0][:, 0], ones[1][0] = 1, 1
        out |= {f"{head}.hada_w1_a": ones[0], f"{head}.hada_w1_b": ones[1]}
        out |= {f"{head}.hada_w2_a": up / SCALE, f"{head}.hada_w2_b": down}
        out[f"{head}.alpha"] = torch.tensor(SCALE * rank)
    return out


def lokr(changes: Pairs, named: Named) -> State:
    out = {}
    for path, (up, down) in changes.items():
        head, rank = named(path), down.shape[0]
        out |= {f"{head}.lokr_w1": torch.tensor([[2.0]]), f"{head}.lokr_w2_a": up / (2 * SCALE)}
        out |= {f"{head}.lokr_w2_b": down, f"{head}.alpha": torch.tensor(SCALE * rank)}
    return out


def differences(changes: Pairs, named: Named) -> State:
    return {f"{named(path)}.diff": up @ down for path, (up, down) in changes.items()}


def magnitudes(changes: Pairs, weights: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Row norms of the changed weights: with these, DoRA is the plain change."""
    return {path: (weights(path).flatten(1) + up @ down).norm(dim=1) for path, (up, down) in changes.items()}


# whole files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one change is written: its tensors, header, and PEFT's configuration beside it."""

    tensors: Callable[[State], State]  # given the base's weights
    metadata: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    def write(self, folder: Path, base: State) -> Path:
        """The file, or the folder that PEFT saves."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ("adapter.safetensors" if self.config is None else "adapter_model.safetensors")
        header = None
        if self.metadata is not None:
            header = {"lora_adapter_metadata": json.dumps(self.metadata)}
        save(self.tensors(base), file, header)
        if self.config is None:
            return file
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


def save(tensors: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def _flux_weight(base: State, path: str) -> Tensor:
    return write.flux_diffusers(base)[f"{path}.weight"]


def _flux_dora(base: State) -> State:
    changes = flux_split(flux_pairs())
    norms = magnitudes(changes, lambda path: _flux_weight(base, path))
    tensors = peft(changes, lambda path: f"transformer.{path}")
    return tensors | {f"transformer.{path}.lora_magnitude_vector": norm for path, norm in norms.items()}


def _kohya_dora(base: State, changes: Pairs) -> State:
    norms = magnitudes(changes, lambda path: base[f"{path}.weight"])
    scales = {f"lora_unet_{flat(path)}.dora_scale": norm[:, None] for path, norm in norms.items()}
    return kohya(changes, lambda path: f"lora_unet_{flat(path)}") | scales


ROOT = 6.0  # lora_alpha of the folder that divides by the root of the rank
ODD = "transformer_blocks.0.attn.to_out.0"  # the layer that has an alpha of its own


def _rslora(base: State) -> State:
    split = flux_split(flux_pairs())
    root = RANK**0.5
    odd = {ODD: split.pop(ODD)}
    return peft(split, lambda path: f"base_model.model.{path}", ROOT / root) | peft(
        odd, lambda path: f"base_model.model.{path}", 3.0 / root
    )


FLUX_LAYOUTS: dict[str, Layout] = {
    "kohya": Layout(lambda _: kohya(flux_pairs(), lambda path: f"lora_unet_{flat(path)}")),
    "kohya, q k v apart": Layout(lambda _: kohya_split(flux_pairs())),
    "diffusers, alpha in the header": Layout(
        lambda _: peft(flux_split(flux_pairs()), lambda path: f"transformer.{path}", SCALE),
        {"transformer.r": RANK, "transformer.lora_alpha": SCALE * RANK, "transformer.use_rslora": False},
    ),
    "PEFT folder, rslora and a pattern": Layout(
        _rslora,
        config={"peft_type": "LORA", "r": RANK, "lora_alpha": ROOT, "use_rslora": True,
                "alpha_pattern": {ODD: 3.0}},
    ),
    "ai-toolkit": Layout(lambda _: peft(flux_split(flux_pairs()), lambda path: f"transformer.{path}")),
    "ComfyUI, native names": Layout(lambda _: peft(flux_pairs(), lambda path: f"diffusion_model.{path}")),
    "BFL, bare": Layout(lambda _: peft(flux_pairs(), str)),
    "XLabs": Layout(lambda _: xlabs(flux_pairs())),
    "OneTrainer": Layout(
        lambda _: kohya(flux_split(flux_pairs()), lambda path: f"lora_transformer_{flat(path)}")
    ),
    "SimpleTuner, LoKr": Layout(
        lambda _: lokr(flux_split(flux_pairs()), lambda path: f"lycoris_{flat(path)}")
    ),
    "LyCORIS, LoHa": Layout(lambda _: loha(flux_pairs(), lambda path: f"lora_unet_{flat(path)}")),
    "full differences": Layout(lambda _: differences(flux_pairs(), lambda path: f"diffusion_model.{path}")),
    "PEFT, DoRA": Layout(_flux_dora),
    "kohya, DoRA": Layout(lambda base: _kohya_dora(base, flux_pairs())),
}  # fmt: skip


# Stable Diffusion -------------------------------------------------------------------------------------------


def unet_pairs() -> Pairs:
    """Changes that every layout can say: attention."""
    ends = tuple(f".attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    return pairs(_shapes("unet", ends), size=0.2)


def clip_pairs() -> Pairs:
    ends = tuple(f".self_attn.{layer}" for layer in ("q_proj", "k_proj", "v_proj", "out_proj"))
    return pairs(_shapes("clip", ends), seed=1, size=0.2)


def _shapes(role: str, ends: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    paths = {name.removesuffix(".weight"): tensor for name, tensor in PARTS[role].state.items()}
    return {path: (t.shape[0], t[0].numel()) for path, t in paths.items() if path.endswith(ends)}


def ldm(path: str) -> str:
    """The path of a UNet's layer in a single file of the first releases."""
    return sd_names.unet_ldm(f"{path}.weight", PARTS["unet"].state.keys()).removesuffix(".weight")


def kohya_clip(path: str) -> str:
    return f"lora_te_{flat(path)}"


def _both(written: Callable[[Pairs, Named], State], unet: Named, clip: Named) -> Callable[[State], State]:
    return lambda _: written(unet_pairs(), unet) | written(clip_pairs(), clip)


def _dora_unet(base: State) -> State:
    made = _kohya_dora(base, unet_pairs())
    return made | kohya(clip_pairs(), kohya_clip)


def _peft_dora_unet(base: State) -> State:
    norms = magnitudes(unet_pairs(), lambda path: base[f"{path}.weight"])
    made = peft(unet_pairs(), lambda path: f"unet.{path}") | peft(clip_pairs(), lambda p: f"text_encoder.{p}")
    return made | {f"unet.{path}.lora_magnitude_vector": norm for path, norm in norms.items()}


def _processor(path: str) -> str:
    """down_blocks...attn1.to_out.0 -> down_blocks...attn1.processor.to_out_lora"""
    head, layer = path.removesuffix(".0").rsplit(".", 1)
    return f"{head}.processor.{layer}_lora"


def _clip_of_old(path: str) -> str:
    head, layer = path.rsplit(".", 1)
    return f"text_encoder.{head}.to_{layer.removesuffix('_proj')}_lora"


SD_LAYOUTS: dict[str, Layout] = {
    "kohya, diffusers' paths": Layout(_both(kohya, lambda path: f"lora_unet_{flat(path)}", kohya_clip)),
    "kohya, LDM paths": Layout(_both(kohya, lambda path: f"lora_unet_{flat(ldm(path))}", kohya_clip)),
    "diffusers, alpha in the header": Layout(
        _both(lambda changes, named: peft(changes, named, SCALE), lambda path: f"unet.{path}",
              lambda path: f"text_encoder.{path}"),
        {f"{part}.{key}": value for part in ("unet", "text_encoder")
         for key, value in (("r", RANK), ("lora_alpha", SCALE * RANK))},
    ),
    "diffusers 2023": Layout(
        lambda _: plain(unet_pairs(), lambda path: f"unet.{path}")
        | plain(clip_pairs(), lambda path: f"text_encoder.{path}", ".lora_linear_layer")
    ),
    "attention processors": Layout(
        lambda _: plain(unet_pairs(), _processor, "") | plain(clip_pairs(), _clip_of_old, "")
    ),
    "ComfyUI, LDM names": Layout(
        _both(peft, lambda path: f"diffusion_model.{ldm(path)}",
              lambda path: f"text_encoders.clip_l.transformer.{path}")
    ),
    "SimpleTuner, LoKr": Layout(
        lambda _: lokr(unet_pairs(), lambda path: f"lycoris_{flat(path)}") | lokr(clip_pairs(), kohya_clip)
    ),
    "LyCORIS, LoHa": Layout(_both(loha, lambda path: f"lora_unet_{flat(path)}", kohya_clip)),
    "full differences": Layout(_both(differences, lambda path: f"lora_unet_{flat(path)}", kohya_clip)),
    "kohya, DoRA": Layout(_dora_unet),
    "PEFT, DoRA": Layout(_peft_dora_unet),
}  # fmt: skip
