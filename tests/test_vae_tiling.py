"""The autoencoder in tiles: the same picture as whole, without seams, in less memory; and who chooses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_flux
import helpers_sd
import numpy as np
import pytest
import torch
from golden import difference
from helpers_sd import half_mask, peak, picture
from torch import Tensor

from flux_sd import device, stages, vae_tiling
from flux_sd.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_sd.errors import Cancelled, NotEnoughMemoryError
from flux_sd.model_loader import Model
from flux_sd.request import CancelToken, Event, GenerationRequest, Progress
from flux_sd.vae_tiling import choose_tiling, decode_tiled, encode_tiled, predicted_bytes
from flux_sd.versions import SDVersion

GIB = 2**30
CONFIGS = {
    "flux": replace(AutoEncoderConfig.flux(), ch=32),
    "sd": replace(AutoEncoderConfig.sd(), ch=32),
    "sdxl": replace(AutoEncoderConfig.sdxl(), ch=32, num_res_blocks=1),
    "tiny-flux": AutoEncoderConfig.tiny_flux(),
    "tiny-sd": AutoEncoderConfig.tiny_sd(),
}
REQUEST = GenerationRequest(prompt="a red kite over the sea", seed=5, width=48, height=32, steps=2)


def autoencoder(name: str, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    torch.manual_seed(0)
    made = AutoEncoder(CONFIGS[name])
    with torch.no_grad():
        for part, parameter in made.named_parameters():
            if "norm" in part:  # as trained ones have: of each channel another scale and shift
                parameter += torch.randn_like(parameter) * 0.3
    return made.eval().to(dtype)


def inputs(vae: AutoEncoder, height: int, width: int, images: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and a picture, brighter to one side so that no two tiles have the same mean."""
    torch.manual_seed(1)
    latents = torch.randn(images, vae.config.z_channels, height // 8, width // 8)
    latents += torch.linspace(-2, 2, height // 8)[:, None]
    pixels = torch.rand(images, 3, height, width) - 0.5 + torch.linspace(-0.5, 0.5, height)[:, None]
    kind = next(vae.parameters()).dtype
    return latents.to(kind), pixels.to(kind)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return difference(ours, theirs).relative


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Of pictures in -1..1, in decibels."""
    return -10 * math.log10(((ours.float() - theirs.float()) / 2).square().mean().item())


# ------------------------------------------------------------------------------------------ the same picture


@pytest.mark.parametrize(("height", "width"), [(40, 24), (24, 56), (8, 8)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_tiles_make_the_picture_of_the_whole(name: str, height: int, width: int) -> None:
    vae = autoencoder(name)
    latents, pixels = inputs(vae, height, width, images=2)
    decoded, encoded = vae.decode(latents), vae.encode(pixels)
    for tile in (1, 7 * 2 * 64 * width):  # a row at a time, and seven, which divide no height
        ours = decode_tiled(vae, latents, tile)
        assert apart(ours, decoded) < 1e-5 and apart(encode_tiled(vae, pixels, tile=tile), encoded) < 1e-5
        assert psnr(ours, decoded) > 100


@torch.inference_mode()
def test_there_is_no_seam() -> None:
    """Where two tiles meet, the difference from the whole is as small as anywhere."""
    vae = autoencoder("sd")
    latents, _ = inputs(vae, 64, 64)
    rows = (decode_tiled(vae, latents, 8 * 64 * 64) - vae.decode(latents)).abs().amax(dim=(0, 1, 3))  # [H]
    assert rows.max() < 20 * rows.median() + 1e-6 and rows.max() < 1e-5


@torch.inference_mode()
def test_a_sample_is_drawn_as_from_the_whole() -> None:
    vae = autoencoder("sd")
    _, pixels = inputs(vae, 40, 24)
    noise = torch.randn(1, 4, 5, 3)
    assert apart(encode_tiled(vae, pixels, noise, tile=999), vae.encode(pixels, noise)) < 1e-5
    assert apart(encode_tiled(vae, pixels, tile=999), vae.encode(pixels, noise)) > 1e-3


@pytest.mark.parametrize(("name", "dtype"), [("flux", torch.bfloat16), ("tiny-sd", torch.float16)])
@torch.inference_mode()
def test_tiles_lose_no_more_to_half_precision_than_the_whole(name: str, dtype: torch.dtype) -> None:
    exact, rough = autoencoder(name), autoencoder(name, dtype)
    latents, pixels = inputs(rough, 40, 24)
    for true, whole, tiled in (
        (exact.decode(latents.float()), rough.decode(latents), decode_tiled(rough, latents, 3000)),
        (exact.encode(pixels.float()), rough.encode(pixels), encode_tiled(rough, pixels, tile=3000)),
    ):
        assert tiled.dtype == dtype and apart(tiled, true) < 1.3 * apart(whole, true)


@torch.inference_mode()
def test_tiles_do_not_disturb_what_they_are_given() -> None:
    vae = autoencoder("sd")
    latents, pixels = inputs(vae, 40, 24)
    before = latents.clone(), pixels.clone()
    decode_tiled(vae, latents, 999), encode_tiled(vae, pixels, tile=999)
    assert torch.equal(latents, before[0]) and torch.equal(pixels, before[1])


@torch.inference_mode()
def test_each_tile_looks_first_and_may_stop() -> None:
    vae, looks = autoencoder("sd"), list[int]()

    def stop_at_ten() -> None:
        looks.append(1)
        if len(looks) == 10:
            raise Cancelled

    latents, pixels = inputs(vae, 40, 24)
    for work in (decode_tiled, encode_tiled):
        looks.clear()
        with pytest.raises(Cancelled):
            work(vae, latents if work is decode_tiled else pixels, tile=999, look=stop_at_ten)
        assert len(looks) == 10


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("name", "side", "tile"),
    [
        ("sdxl", 128, 2**15),
        ("tiny-flux", 128, 2**15),
        *(pytest.param(name, 512, 2**18, marks=pytest.mark.slow) for name in CONFIGS),
    ],
)
def test_tiles_take_less_memory_and_no_more_than_predicted(
    name: str, side: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_tiling, "TILE", tile)
    vae = autoencoder(name)
    latents, pixels = inputs(vae, side, side)
    whole, tiled = (predicted_bytes(vae.config, side, side, torch.float32, tiles) for tiles in (False, True))
    decoding = peak(lambda: vae.decode(latents)), peak(lambda: decode_tiled(vae, latents, tile))
    encoding = peak(lambda: vae.encode(pixels)), peak(lambda: encode_tiled(vae, pixels, tile=tile))
    print(name, [f"{value / 1e6:.1f} MB" for value in (*decoding, *encoding, whole, tiled)])
    assert decoding[1] < 0.55 * decoding[0] and encoding[1] < 0.6 * encoding[0]
    # At most 5% over: what a convolution takes beside its maps depends on the processor.
    assert max(decoding[1], encoding[1]) < 1.05 * tiled < 1.8 * decoding[1]
    assert max(decoding[0], encoding[0]) < 1.05 * whole < 2.5 * decoding[0]


@pytest.mark.parametrize(
    "config", [AutoEncoderConfig.sd(), AutoEncoderConfig.sdxl(), AutoEncoderConfig.flux()]
)
def test_a_released_autoencoder_takes_26_gb_at_2048_and_7_in_tiles(config: AutoEncoderConfig) -> None:
    """The width of the layers decides: 6 maps of 256 channels; 3 of 128 and the tiles."""
    whole, tiled = (predicted_bytes(config, 2048, 2048, torch.float32, tiles) for tiles in (False, True))
    assert whole == (6 * 256 + 3) * 2048 * 2048 * 4 and 25.7e9 < whole < 25.9e9
    assert tiled == 3 * 128 * 2048 * 2048 * 4 + 8 * 2**24 * 4 and 6.9e9 < tiled < 7.0e9
    assert predicted_bytes(config, 2048, 2048, torch.bfloat16) == whole // 2


# ------------------------------------------------------------------------------------------ who chooses


def test_tiles_are_used_as_asked_or_where_the_whole_would_take_nearly_all() -> None:
    assert choose_tiling(True, 1, 10 * GIB) and not choose_tiling(False, 10 * GIB, 1)
    assert not choose_tiling(None, 7 * GIB, 10 * GIB) and choose_tiling(None, 9 * GIB, 10 * GIB)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """A small model of either family."""
    flux = helpers_flux.small_info()
    sd = helpers_sd.small_info(SDVersion.SD15)
    folders = [tmp_path_factory.mktemp(name) for name in ("flux", "sd")]
    made = {
        "flux": helpers_flux.open_model(helpers_flux.write_folder(folders[0], flux), flux),
        "sd": helpers_sd.open_model(helpers_sd.write_folder(folders[1], sd), sd),
    }
    yield made
    for model in made.values():
        model.close()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tiled functions that ran, with tiles so small that there are several."""
    ran: list[str] = []
    for name in ("decode_tiled", "encode_tiled"):
        work: Callable[..., Tensor] = getattr(stages, name)

        def run(*rest: Any, name: str = name, work: Callable[..., Tensor] = work, **more: Any) -> Tensor:
            ran.append(name)
            return work(*rest, **more, tile=4096)

        monkeypatch.setattr(stages, name, run)
    return ran


def free_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in (device, stages):
        monkeypatch.setattr(module, "available_memory", lambda _: nbytes)


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_a_run_uses_tiles_where_memory_asks_for_it(
    family: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = models[family], spied(monkeypatch)
    free_memory(monkeypatch, 2 * GIB)
    (whole,) = model.generate(REQUEST)
    assert ran == [] and whole.metadata["vae_tiling"] is False and whole.notes == []
    # What is free is a little over what the run needs in tiles; here those are a fraction of a megabyte.
    monkeypatch.setattr(vae_tiling, "TILE", 4096)
    needed = predicted_bytes(model.components.config("vae"), 32, 48, torch.float32)
    monkeypatch.setattr(stages, "available_memory", lambda _: int(needed * 1.2))
    (tiled,) = model.generate(REQUEST)
    assert ran == ["decode_tiled"] and tiled.metadata["vae_tiling"] is True
    (note,) = tiled.notes
    assert note.startswith(
        "the autoencoder runs in tiles: whole it would take 1.2 MB of the 1.4 MB of memory"
    )
    assert torch.equal(tiled.latents, whole.latents)
    levels = np.abs(np.asarray(tiled.image).astype(int) - np.asarray(whole.image))
    assert levels.max() <= 1 and levels.mean() < 0.01
    (unasked,) = model.generate(replace(REQUEST, vae_tiling=False))
    assert len(ran) == 1 and unasked.metadata["vae_tiling"] is False
    (picture_of_latents,) = model.decode(whole.latents[None])
    assert ran == ["decode_tiled"] * 2 and picture_of_latents.tobytes() == tiled.image.tobytes()


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_tiles_let_a_picture_be_painted_that_would_not_fit(
    family: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 3072 x 3072 the activations of these autoencoders take 7.4 GB whole, 3.0 or 4.2 in tiles."""
    model, seen = models[family], list[str]()

    def stop(event: Event) -> None:
        if isinstance(event, Progress):
            seen.append(event.stage)
            token.cancel()

    large = replace(REQUEST, width=3072, height=3072)
    free_memory(monkeypatch, 6 * GIB)
    with pytest.raises(NotEnoughMemoryError, match="the vae stage needs 8"):
        model.generate(replace(large, vae_tiling=False))
    token = CancelToken()
    with pytest.raises(Cancelled):  # it was let in: the first weights were loaded
        model.generate(large, on_event=stop, cancel=token)
    assert len(seen) == 1 and seen[0].startswith("load ")
    free_memory(monkeypatch, 2 * GIB)
    with pytest.raises(NotEnoughMemoryError):
        model.generate(large)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_painted_on_is_encoded_in_tiles_too(
    masked: bool, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(REQUEST, init_image=picture(), strength=0.5, mask=half_mask() if masked else None)
    (whole,) = models["sd"].generate(asked)
    ran = spied(monkeypatch)
    (tiled,) = models["sd"].generate(replace(asked, vae_tiling=True))
    assert ran == ["encode_tiled", "decode_tiled"] and tiled.notes == []
    assert (tiled.latents - whole.latents).norm() / whole.latents.norm() < 1e-4


def test_an_inpainting_model_encodes_in_tiles_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = helpers_sd.small_info(SDVersion.SDXL_INPAINT)
    ran = spied(monkeypatch)
    with helpers_sd.open_model(helpers_sd.write_folder(tmp_path, info), info) as model:
        model.generate(replace(REQUEST, init_image=picture(), mask=half_mask(), vae_tiling=True))
    assert ran == ["encode_tiled", "decode_tiled"]


def test_a_run_in_tiles_is_cancelled_between_two(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    token, looks = CancelToken(), list[int]()
    ran, check = spied(monkeypatch), token.check

    def counted() -> None:
        if ran:
            looks.append(1)
            if len(looks) == 7:
                token.cancel()
        check()

    monkeypatch.setattr(token, "check", counted)
    with pytest.raises(Cancelled):
        models["flux"].generate(replace(REQUEST, vae_tiling=True), cancel=token)
    assert ran == ["decode_tiled"] and len(looks) == 7 and models["flux"].components.loaded == set()
