"""What both generations do with the components of a model, stage by stage. Floor 6.

A stage loads its network, runs it under the request's cancel token, counts the seconds, and lets it go.
Events, recorded tensors, decoding and the record in the picture are the same for both families.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import image
from .components import Components
from .device import available_memory, size_text
from .errors import RequestError
from .request import CancelToken, Complete, Event, Preview, Progress, Result, Step
from .steps import OnEvent, Timings, cancellable, check_finite, dtype_name, preview_image
from .text import PromptReport, describe_cut, describe_weighting, require_whole
from .vae_tiling import choose_tiling, decode_tiled, encode_tiled, predicted_bytes
from .version import __version__
from .versions import VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT_TEXTS = 8  # encoded prompts that a model remembers
Tap = Callable[[str, Tensor], None]
Made = TypeVar("Made")


class Stages:
    """One run on one model: its networks in turn, its notes, its clock, and who listens."""

    def __init__(
        self,
        components: Components,
        on_event: OnEvent | None = None,
        cancel: CancelToken | None = None,
        tap: Tap | None = None,
    ) -> None:
        self.components, self.on_event, self.cancel, self.tap = components, on_event, cancel, tap
        self.device, self.dtype = components.placement.device, components.placement.dtype
        self.notes: list[str] = list(components.placement.notes)
        self.notes += [] if components.changes is None else components.changes.notes()
        self.timings = Timings()
        self.tiled = False  # whether the autoencoder runs in tiles

    def network(self, role: str) -> Any:
        """The network of `role`, loaded if it is not there."""
        with self.timings.stage("load"):
            return self.components.network(role, self.on_event, self.cancel)

    def alone(self, role: str, stage: str, work: Callable[[Any], Made]) -> Made:
        """What `work` makes of the network of `role`, which is freed, whatever happens; the seconds count as
        `stage`."""
        network = self.network(role)
        try:
            with self.timings.stage(stage), cancellable(network, self.cancel):
                return work(network)
        finally:
            del network
            self.components.free(role)

    def images_at_once(self, batch: int, batched: bool | None) -> int:
        """How many images go through the networks together: all on a GPU, one on a CPU, unless asked
        otherwise."""
        together = batched if batched is not None else self.device.type != "cpu"
        return batch if together else 1

    def check_room(
        self,
        size: tuple[int, int],
        text_length: int,
        images: Mapping[str, int],
        tiling: bool | None,
        reference: tuple[int, int] = (0, 0),
    ) -> None:
        """Decides whether the autoencoder runs in tiles, see `choose_tiles`. Raises NotEnoughMemoryError for
        a request that does not fit.

        size: width and height in pixels; images: by role, how many a network sees at once; reference: size
        of a picture that the autoencoder sees alone, and the transformer beside what is painted.
        """
        largest = max(size, reference, key=math.prod)
        known = {"vae": self.choose_tiles(largest, images["vae"], tiling)}
        pixels = math.prod(size) + math.prod(reference)
        self.components.check_room(pixels, text_length, images, known)

    def choose_tiles(self, size: tuple[int, int], images: int, tiling: bool | None) -> int:
        """Decides whether the autoencoder runs in tiles: as asked, or (`tiling` None) where whole it would
        take nearly all memory, with a note. Returns the bytes in float32 that its activations will take."""
        (width, height), vae = size, self.components.config("vae")
        whole, tiled = (
            images * predicted_bytes(vae, height, width, torch.float32, tiles) for tiles in (False, True)
        )
        available = available_memory(self.device)
        needed = whole * self.components.dtype_of("vae").itemsize // 4
        self.tiled = choose_tiling(tiling, needed, available)
        if self.tiled and tiling is None:
            self.notes.append(
                f"the autoencoder runs in tiles: whole it would take {size_text(needed)} of the "
                f"{size_text(available)} of memory that are free"
            )
        return tiled if self.tiled else whole

    def read_prompts(self, prompts: Mapping[str, Sequence[PromptReport]], strict: bool) -> None:
        """Notes what a prompt's encoders cut, and once that weights are written, which nothing interprets.
        Raises PromptTooLongError for a cut where `strict`.

        prompts: what each encoder reports, by prompt; where there are two, the first is the negative one.
        """
        for reports in prompts.values():
            if strict:
                require_whole(reports)
        notes = [describe_cut(reports) for reports in prompts.values()]
        if len(notes) == 2 and notes[0] is not None:
            notes[0] = f"of the negative prompt {notes[0]}"
        notes.append(next(filter(None, map(describe_weighting, prompts)), None))
        self.notes += [note for note in notes if note]

    def remembered(self, key: Hashable, encode: Callable[[], Made]) -> Made:
        """What `encode` makes, or made for the same key; the model keeps the last few."""
        texts = self.components.texts
        if key not in texts:
            texts[key] = encode()
            if len(texts) > KEPT_TEXTS:
                texts.popitem(last=False)
        texts.move_to_end(key)
        made: Made = texts[key]
        return made

    def finish(self, step: Step, seconds: float, preview_every: int | None) -> Step:
        """Reports one step of the loop: its time, and a preview of each image where one is due."""
        self.timings.add("denoise", seconds)
        done = step.index + 1
        self.emit(Progress("denoise", done, step.total, seconds, step.image, step.images))
        if preview_every is not None and done % preview_every == 0:
            for offset, x0 in enumerate(step.x0):
                picture = image.to_picture(preview_pixels(self.components.info, x0))
                self.emit(Preview(done, step.total, picture, step.image + offset))
        return step

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Pictures [B,3,H,W] in -1..1 -> latents [B,C,H/8,W/8] float32 on the device: the mean of what the
        autoencoder makes of each."""
        dtype = self.components.dtype_of("vae")

        def work(vae: Any) -> list[Tensor]:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                given = (picture.to(self.device, dtype) for picture in pictures)
                return [self._encode(vae, picture).float() for picture in given]

        latents = self.alone("vae", "encode", work)
        for part in latents:
            check_finite(part, "the autoencoder's encoder", dtype)
        return latents

    @torch.inference_mode()
    def decode(self, latents: Tensor, at_once: int) -> Tensor:
        """latents [B,C,H/8,W/8] -> pictures [B,3,H,W] float32 in about -1..1, on the CPU."""
        dtype = self.components.dtype_of("vae")

        def work(vae: Any) -> Tensor:
            pictures: list[Tensor] = []
            # TF32, which CUDA's convolutions use by default, is not float32.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                for part in latents.split(at_once):
                    decoded = self._decode(vae, part.to(self.device, dtype))
                    check_finite(decoded, "the autoencoder", dtype)
                    pictures += decoded.float().cpu().split(1)
                    self.emit(Progress("decode", len(pictures), latents.shape[0]))
            return torch.cat(pictures)

        self.record({"latents": latents})
        decoded = self.alone("vae", "decode", work)
        self.record({"image": decoded})
        return decoded

    def _encode(self, vae: Any, picture: Tensor) -> Tensor:
        return encode_tiled(vae, picture, look=self._look) if self.tiled else vae.encode(picture)

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_tiled(vae, latents, look=self._look) if self.tiled else vae.decode(latents)

    def _look(self) -> None:
        if self.cancel is not None:
            self.cancel.check()

    def results(
        self,
        finished: Sequence[Tensor],
        at_once: int,
        original: tuple[Image, Tensor] | None,
        record: Callable[[int], dict[str, Any]],
        noise: Callable[[int], Tensor],
    ) -> list[Result]:
        """Decodes all pictures of a run, one Result for each, and tells the listener that it is complete.

        finished: final latents [n,C,H/8,W/8]. original: the picture whose own pixels are kept where the mask
        [1,H,W] is 0. record, noise: what repeats picture i, and the noise [C,H/8,W/8] that it began with.
        """
        latents = torch.cat(list(finished)).float().cpu()  # [batch,C,H/8,W/8]
        made = []
        for i, decoded in enumerate(self.decode(latents, at_once)):
            painted = image.to_picture(decoded, self.components.numerics.to_bytes)
            if original is not None:
                painted = image.composite(painted, *original)
            made.append(self.result(painted, record(i), latents[i], noise(i)))
        self.emit(Complete(made))
        return made

    def result(self, picture: Image, record: dict[str, Any], latents: Tensor, noise: Tensor) -> Result:
        """One finished picture; `record` is what repeats it, completed by the files that it was made from."""
        record["files"] = self.components.describe_files()
        record["weights"] = self.components.describe_weights()
        if self.components.changes is not None:
            record["loras"] = self.components.changes.describe()
        return Result(picture, record, latents, noise, list(self.notes), self.timings.seconds)

    def settings(self, at_once: int) -> dict[str, Any]:
        """The part of a record that is the same for both families: how it was computed, and by what. No
        paths."""
        placement = self.components.placement
        return {
            "batched": at_once,
            "numerics": self.components.numerics.name,
            "device": self.device.type,
            "dtype": dtype_name(placement.dtype),
            "stored_dtype_kept": sorted(placement.stored),
            "quantized": self.components.options.quantized,
            "vae_tiling": self.tiled,
            "versions": {
                "flux_sd": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "processor": processor(),
        }

    def emit(self, event: Event) -> None:
        """Tells the listener, if there is one."""
        if self.on_event is not None:
            self.on_event(event)

    def record(self, tensors: Mapping[str, Tensor]) -> None:
        """Hands named tensors to the tap, if there is one."""
        if self.tap is not None:
            for name, tensor in tensors.items():
                self.tap(name, tensor)


def decode_latents(components: Components, latents: Tensor) -> list[Image]:
    """Latents [B,C,H/8,W/8], such as a step's, to pictures. Raises RequestError for another shape."""
    stages, vae = Stages(components), components.config("vae")
    if latents.ndim != 4 or latents.shape[1] != vae.z_channels:
        found = f"latents are of shape {list(latents.shape)}"
        raise RequestError(f"{found}; {components.info.key} decodes [batch, {vae.z_channels}, H/8, W/8]")
    at_once, cell = stages.images_at_once(latents.shape[0], None), vae.downsampling
    stages.choose_tiles((latents.shape[3] * cell, latents.shape[2] * cell), at_once, None)
    decoded = stages.decode(latents.float(), at_once)
    return [image.to_picture(picture, components.numerics.to_bytes) for picture in decoded]


def preview_pixels(info: VersionInfo, x0: Tensor) -> Tensor:
    """Predicted clean latents [C,H/8,W/8] -> a soft picture [3,H,W] at full size, without the decoder."""
    small = preview_image(info, x0)[None]  # [1,3,H/8,W/8]
    return F.interpolate(small, scale_factor=8.0, mode="bilinear")[0]


def processor() -> str:
    """What decides the last bits of a CPU product: architecture and vector unit."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
