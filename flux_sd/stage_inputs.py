"""What one network is given when it runs alone, from a safetensors file. Floor 7.

The file may be made by hand, be a record of ours, or be a run that Candle's reference program wrote: the
names of all three are understood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import RequestError
from .sampling import State
from .versions import FluxConfigs

# In the order of the transformer's arguments.
TRANSFORMER_INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "vec", "guidance")


@dataclass(frozen=True)
class StageInputs:
    """A file to take inputs from; `step` says which, where it is the record of a whole run."""

    checkpoint: Checkpoint
    configs: FluxConfigs
    step: int = 0

    def ids(self, role: str) -> Tensor:
        """int64 [B,L] of "clip" or "t5", called "ids" or as in a record. Raises RequestError."""
        config = self.configs.clip if role == "clip" else self.configs.t5
        name = self._first("ids", f"{role}.ids")
        ids = self.checkpoint.read(name)
        ids = ids[None] if ids.ndim == 1 else ids
        self._check(name, ids, ("B", "L"))
        if ids.is_floating_point():
            raise RequestError(f"{self._where(name)} holds {ids.dtype}, token ids are whole numbers")
        ids = ids.to(torch.int64)
        if ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise RequestError(f"{self._where(name)} is empty or has ids outside 0..{config.vocab_size - 1}")
        longest = self.configs.clip.max_position_embeddings
        if role == "clip" and ids.shape[1] > longest:
            raise RequestError(f"{self._where(name)} has {ids.shape[1]} ids, CLIP takes {longest} at most")
        return ids

    def latents(self) -> Tensor:
        """float32 [B,16,H/8,W/8], called "latents"."""
        latents = self.checkpoint.read(self._first("latents")).float()
        self._check("latents", latents, ("B", self.configs.vae.z_channels, "H/8", "W/8"))
        return latents

    def transformer(self, guidance: float | None) -> dict[str, Tensor]:
        """The arguments by name, floats in float32: called as here, as `step.N.inputs.*` in a record of ours,
        or made from a run's latents, text states and times. Raises RequestError for what lacks or does not
        fit."""
        ours = f"step.{self.step}.inputs."
        if f"{ours}img" in self.checkpoint:
            found = {name: self._read(ours + name) for name in TRANSFORMER_INPUTS if self._has(ours + name)}
        elif f"step.{self.step}.latents" in self.checkpoint:
            found = self._from_run()
        else:
            found = {name: self._read(name) for name in TRANSFORMER_INPUTS if self._has(name)}
        if guidance is not None:
            if not self.configs.transformer.guidance_embed:
                raise RequestError("this transformer embeds no guidance: leave it out")
            found["guidance"] = torch.tensor([guidance])
        return self._checked(found)

    def _has(self, name: str) -> bool:
        return name in self.checkpoint

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).float()

    def _from_run(self) -> dict[str, Tensor]:
        """What `step` began from, in a file that holds the run's noise or latents, times and text states."""
        txt, vec = self._read(self._first("t5.hidden")), self._read(self._first("clip.pooled"))
        times = self._read(self._first("timesteps"))
        if self.step >= times.numel() - 1:
            raise RequestError(
                f"{self.checkpoint.label} has {times.numel() - 1} steps, none of number {self.step}"
            )
        state = State.new(txt, vec, self._read(self._first("noise", "latents")))  # for the positions
        img = self._read(f"step.{self.step}.latents")
        time = times[self.step].expand(img.shape[0])
        return {
            "img": img, "img_ids": state.img_ids, "txt": state.txt, "txt_ids": state.txt_ids,
            "timesteps": time, "vec": state.vec,
        }  # fmt: skip

    def _checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        config = self.configs.transformer
        wanted = [name for name in TRANSFORMER_INPUTS if name != "guidance" or config.guidance_embed]
        lacking = [name for name in wanted if name not in found]
        if lacking:
            hint = "; --guidance can stand for guidance" if "guidance" in lacking else ""
            raise RequestError(
                f"{self.checkpoint.label} lacks {', '.join(lacking)} for the transformer: expected "
                f"{', '.join(wanted)}, or the record of a run with step {self.step}{hint}"
            )
        shapes: dict[str, tuple[str | int, ...]] = {
            "img": ("B", "S", config.in_channels), "img_ids": ("B", "S", len(config.axes_dim)),
            "txt": ("B", "L", config.context_in_dim), "txt_ids": ("B", "L", len(config.axes_dim)),
            "timesteps": ("B",), "vec": ("B", config.vec_in_dim), "guidance": ("B",),
        }  # fmt: skip
        sizes: dict[str, int] = {}
        for name in wanted:
            self._check(name, found[name], shapes[name], sizes)
        return {name: found[name] for name in wanted}

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
