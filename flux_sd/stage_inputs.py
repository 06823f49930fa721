"""What one network is given when it runs alone, from a safetensors file. Floor 7.

The file may be made by hand, be a record of ours, or be a run that Candle's reference program wrote: the
names of all three are understood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import RequestError
from .sampling import State
from .schedulers.sampler import METHODS

# In the order of the networks' arguments.
TRANSFORMER_INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "vec", "guidance")
UNET_INPUTS = ("x", "timesteps", "context", "pooled", "sizes")
MASKED_CHANNELS = 9  # of an inpainting UNet: latents, mask, latents of the masked picture


@dataclass(frozen=True)
class StageInputs:
    """A file to take inputs from.

    config: of a network, by its role. step: which, where it is the record of a whole run. guidance: what the
    user says where the file does not, or in its place.
    """

    checkpoint: Checkpoint
    config: Callable[[str], Any]
    step: int = 0
    guidance: float | None = None

    def of(self, stage: str) -> dict[str, Tensor]:
        """What a stage (a key of READERS) is given, by the names of its arguments. Raises RequestError for
        what the file lacks, and for what does not fit the network."""
        return READERS[stage](self)

    def ids(self, role: str) -> Tensor:
        """int64 [B,L] of "clip", "clip_2" or "t5", called "ids" or as in a record. Raises RequestError."""
        config = self.config(role)
        name = self._first("ids", f"{role}.ids")
        ids = self.checkpoint.read(name)
        ids = ids[None] if ids.ndim == 1 else ids
        self._check(name, ids, ("B", "L"))
        if ids.is_floating_point():
            raise RequestError(f"{self._where(name)} holds {ids.dtype}, token ids are whole numbers")
        ids = ids.to(torch.int64)
        if ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise RequestError(f"{self._where(name)} is empty or has ids outside 0..{config.vocab_size - 1}")
        longest = getattr(config, "max_position_embeddings", ids.shape[1])  # T5 has no limit
        if ids.shape[1] > longest:
            raise RequestError(f"{self._where(name)} has {ids.shape[1]} ids, CLIP takes {longest} at most")
        return ids

    def latents(self) -> Tensor:
        """float32 [B,C,H/8,W/8], called "latents"."""
        latents = self._read(self._first("latents"))
        self._check("latents", latents, ("B", self.config("vae").z_channels, "H/8", "W/8"))
        return latents

    def image(self) -> Tensor:
        """float32 [B,3,H,W] in -1..1, called "image", or as in a record of a run that began from one."""
        name, vae = self._first("init.image", "image"), self.config("vae")
        image = self._read(name)
        self._check(name, image, ("B", vae.in_channels, "H", "W"))
        if any(side % vae.downsampling for side in image.shape[2:]):
            size = f"{image.shape[3]}x{image.shape[2]} pixels"
            raise RequestError(f"{self._where(name)} has {size}: multiples of {vae.downsampling} are wanted")
        return image

    def guidance_of_run(self) -> tuple[float | None, float]:
        """Guidance and its rescaling: the user's, else those that the file says its run had."""
        own = self._said("guidance") if self.guidance is None else self.guidance
        return own, self._said("guidance_rescale") or 0.0

    def _said(self, name: str) -> float | None:
        """A number that the record of a run tells beside its tensors."""
        try:
            found = json.loads(self.checkpoint.metadata.get(name, "null"))
        except ValueError:
            found = None
        return float(found) if isinstance(found, int | float) else None

    def transformer(self) -> dict[str, Tensor]:
        """The arguments by name, floats in float32: called as here, as `step.N.inputs.*` in a record of ours,
        or made from a run's latents, text states and times. Raises RequestError for what lacks or does not
        fit."""
        config = self.config("transformer")
        found = self._found("img", TRANSFORMER_INPUTS, self._transformer_of_run)
        if self.guidance is not None:
            if not config.guidance_embed:
                raise RequestError("this transformer embeds no guidance: leave it out")
            found["guidance"] = torch.tensor([self.guidance])
        wanted = [name for name in TRANSFORMER_INPUTS if name != "guidance" or config.guidance_embed]
        shapes: dict[str, tuple[str | int, ...]] = {
            "img": ("B", "S", config.in_channels), "img_ids": ("B", "S", len(config.axes_dim)),
            "txt": ("B", "L", config.context_in_dim), "txt_ids": ("B", "L", len(config.axes_dim)),
            "timesteps": ("B",), "vec": ("B", config.vec_in_dim), "guidance": ("B",),
        }  # fmt: skip
        return self._checked("transformer", found, {name: shapes[name] for name in wanted})

    def unet(self) -> dict[str, Tensor]:
        """The same for the UNet: a row for each image of each branch, the negative prompt's first."""
        config = self.config("unet")
        shapes: dict[str, tuple[str | int, ...]] = {
            "x": ("B", config.in_channels, "h", "w"), "timesteps": ("B",),
            "context": ("B", "L", config.context_dim),
        }  # fmt: skip
        if config.added_dim is not None:
            shapes |= {"pooled": ("B", "P"), "sizes": ("B", 6)}
        checked = self._checked("unet", self._found("x", UNET_INPUTS, self._unet_of_run), shapes)
        rows, (guidance, _) = len(checked["x"]), self.guidance_of_run()
        if guidance is not None and guidance > 1.0 and rows % 2:
            raise RequestError(
                f"guidance {guidance:g} wants two rows for each image, the negative prompt's first, and "
                f"{self.checkpoint.label} gives {rows}: leave --guidance out, or give both"
            )
        return checked

    def _found(
        self, first: str, names: tuple[str, ...], of_run: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The arguments of a denoiser, as a record of ours has them, from a run's other tensors, or by their
        own names. first: the one that tells which."""
        ours = f"step.{self.step}.inputs."
        if ours + first not in self.checkpoint:
            if f"step.{self.step}.latents" in self.checkpoint:
                return of_run()
            ours = ""
        return {name: self._read(ours + name) for name in names if ours + name in self.checkpoint}

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).float()

    def _transformer_of_run(self) -> dict[str, Tensor]:
        """What `step` began from, in a file that holds the run's noise or latents, times and text states."""
        txt, vec = self._read(self._first("t5.hidden")), self._read(self._first("clip.pooled"))
        times = self._times(ends=1)
        state = State.new(txt, vec, self._read(self._first("noise", "latents")))  # for the positions
        img = self._read(f"step.{self.step}.latents")
        return {
            "img": img, "img_ids": state.img_ids, "txt": state.txt, "txt_ids": state.txt_ids,
            "timesteps": times.expand(img.shape[0]), "vec": state.vec,
        }  # fmt: skip

    def _unet_of_run(self) -> dict[str, Tensor]:
        """The same for the UNet. Raises RequestError where the sampler scales latents before the UNet reads
        them, as those of Euler do: only `step.N.inputs.x` has them then."""
        context = self._branches("clip.hidden", "hidden")  # [R,77,D]
        x = self._read(f"step.{self.step}.latents")
        if not self._keeps_variance():
            raise RequestError(
                f"{self.checkpoint.label} is of a sampler that scales latents for the UNet, and "
                f"holds no step.{self.step}.inputs.x: record that with --stages default"
            )
        if self.config("unet").in_channels == MASKED_CHANNELS:
            x = torch.cat([x, *(self._read(self._first(name)) for name in ("mask", "masked.latents"))], dim=1)
        rows = len(context)
        found = {"x": x.repeat(rows, 1, 1, 1), "timesteps": self._times().expand(rows), "context": context}
        if self.config("unet").added_dim is not None:
            height, width = (side * self.config("vae").downsampling for side in x.shape[2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            found |= {"pooled": self._branches("clip.pooled"), "sizes": sizes.expand(rows, -1)}
        return found

    def _keeps_variance(self) -> bool:
        """Whether a run's states are what the UNet reads: pure noise begins such a run as it is."""
        first = "step.0.latents"
        if "noise" in self.checkpoint and first in self.checkpoint and "init.latents" not in self.checkpoint:
            return torch.equal(self._read("noise"), self._read(first))
        method = METHODS.get(self.checkpoint.metadata.get("sampler", ""))
        return method is not None and not method.exploding

    def _branches(self, name: str, *others: str) -> Tensor:
        """A text state of both branches, the negative one first, or of one where the run was not guided."""
        own = self._read(self._first(name, *others))
        negative = f"uncond.{name}"
        return torch.cat([self._read(negative), own]) if negative in self.checkpoint else own

    def _times(self, ends: int = 0) -> Tensor:
        """[1], the time of `step`. ends: how many of the run's times are those after its last step."""
        times = self._read(self._first("timesteps"))
        # A run that began from a picture tells all of its times; its steps are the last of them.
        steps = times.numel() - ends
        if self.step >= steps:
            raise RequestError(f"{self.checkpoint.label} has {steps} steps, none of number {self.step}")
        run = self._said("steps_run")
        skipped = 0 if run is None else steps - int(run)
        return times[self.step + skipped :][:1]

    def _checked(
        self, role: str, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[str | int, ...]]
    ) -> dict[str, Tensor]:
        lacking = [name for name in shapes if name not in found]
        if lacking:
            hint = "; --guidance can stand for guidance" if "guidance" in lacking else ""
            raise RequestError(
                f"{self.checkpoint.label} lacks {', '.join(lacking)} for the {role}: expected "
                f"{', '.join(shapes)}, or the record of a run with step {self.step}{hint}"
            )
        sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            self._check(name, found[name], shape, sizes)
        return {name: found[name] for name in shapes}

    def _check(
        self, name: str, tensor: Tensor, shape: tuple[str | int, ...], sizes: dict[str, int] | None = None
    ) -> None:
        """Holds a shape against one with letters; the same letter means the same size in every tensor."""
        known = {} if sizes is None else sizes
        fits = tensor.ndim == len(shape) and all(
            size == (known.setdefault(want, size) if isinstance(want, str) else want)
            for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            seen = "".join(f", {letter} = {size}" for letter, size in known.items())
            expected = f"[{', '.join(map(str, shape))}]"
            raise RequestError(
                f"{self._where(name)} has shape {list(tensor.shape)}, expected {expected}{seen}"
            )

    def _first(self, *names: str) -> str:
        for name in names:
            if name in self.checkpoint:
                return name
        raise RequestError(f"{self.checkpoint.label} holds no tensor {' or '.join(map(repr, names))}")

    def _where(self, name: str) -> str:
        return f"{name} in {self.checkpoint.label}"


READERS: Mapping[str, Callable[[StageInputs], dict[str, Tensor]]] = {
    "clip": lambda inputs: {"ids": inputs.ids("clip")},
    "clip_2": lambda inputs: {"ids": inputs.ids("clip_2")},
    "t5": lambda inputs: {"ids": inputs.ids("t5")},
    "transformer": StageInputs.transformer,
    "unet": StageInputs.unet,
    "vae-encode": lambda inputs: {"x": inputs.image()},
    "vae-decode": lambda inputs: {"z": inputs.latents()},
}
