"""The table of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_sd.errors import UnknownVersionError
from flux_sd.hub import _choose
from flux_sd.model_loader import parts_of
from flux_sd.versions import SDVersion

SPELLINGS = {
    SDVersion.FLUX_SCHNELL: "flux-schnell FLUX.1-schnell flux1-schnell schnell any-owner/FLUX.1-schnell",
    SDVersion.FLUX_DEV: "flux-dev FLUX.1-dev flux1-dev flux.1.dev dev Flux_Dev black-forest-labs/FLUX.1-dev",
    SDVersion.FLUX_FILL: "flux-fill FLUX.1-Fill-dev flux1-fill-dev flux-dev-fill Flux_Fill",
    SDVersion.FLUX_CANNY: "flux-canny black-forest-labs/FLUX.1-Canny-dev flux1-canny-dev flux-dev-canny",
    SDVersion.FLUX_DEPTH: "flux-depth black-forest-labs/FLUX.1-Depth-dev flux1-depth-dev flux-dev-depth",
    SDVersion.FLUX_KONTEXT: "flux-kontext FLUX.1-Kontext-dev flux1-kontext-dev flux-dev-kontext kontext-dev",
    SDVersion.FLUX_KREA: "flux-krea FLUX.1-Krea-dev flux1-krea-dev flux-dev-krea krea-dev",
    SDVersion.SD15: "sd15 SD1.5 sd-1.5 v1-5 stable-diffusion-v1-5 stable-diffusion-1.5",
    SDVersion.SD21: "sd21 sd2.1 v2-1 stable-diffusion-2-1 stabilityai/stable-diffusion-2-1 sd2",
    SDVersion.SD21_BASE: "sd21-base sd2.1-base v2-1-base stabilityai/stable-diffusion-2-1-base sd2-base",
    SDVersion.SDXL: "sdxl SDXL xl sdxl-base stabilityai/stable-diffusion-xl-base-1.0",
    SDVersion.SDXL_TURBO: "sdxl-turbo turbo stabilityai/sdxl-turbo",
    SDVersion.SD15_INPAINT: "sd15-inpaint sd1.5-inpainting runwayml/stable-diffusion-inpainting",
    SDVersion.SD2_INPAINT: "sd2-inpaint stabilityai/stable-diffusion-2-inpainting",
    SDVersion.SDXL_INPAINT: "sdxl-inpaint diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    SDVersion.TINY_FLUX: "tiny-flux tiny_flux TinyFlux tiny",
    SDVersion.TINY_SD: "tiny-sd tiny_sd TinySD",
}


@pytest.mark.parametrize("version", list(SDVersion))
def test_parse_takes_the_spellings_users_type(version: SDVersion) -> None:
    for text in SPELLINGS[version].split():
        assert SDVersion.parse(text) is version, text


def test_no_spelling_means_two_versions() -> None:
    seen: dict[str, SDVersion] = {}
    for version in SDVersion:
        for spelling in version._spellings():
            assert seen.setdefault(spelling, version) is version, spelling


@pytest.mark.parametrize("text", ["", "flux", "sd3", "sd14", "flux-pro", "../flux"])
def test_parse_refuses_the_rest_and_lists_what_there_is(text: str) -> None:
    with pytest.raises(UnknownVersionError, match="known are tiny-flux, tiny-sd, flux-schnell"):
        SDVersion.parse(text)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UnknownVersionError, match="did you mean flux-schnell"):
        SDVersion.parse("flux-schnel")


def test_families() -> None:
    assert [v.info.key for v in SDVersion if v.is_flux] == [
        "tiny-flux", "flux-schnell", "flux-dev", "flux-fill", "flux-canny", "flux-depth", "flux-kontext",
        "flux-krea",
    ]  # fmt: skip
    assert [v.info.key for v in SDVersion if v.is_inpainting] == [
        "flux-fill",
        "sd15-inpaint",
        "sd2-inpaint",
        "sdxl-inpaint",
    ]
    assert [v.info.key for v in SDVersion if v.is_xl] == ["sdxl", "sdxl-turbo", "sdxl-inpaint"]


def test_defaults_are_the_published_ones() -> None:
    schnell, dev = SDVersion.FLUX_SCHNELL.info, SDVersion.FLUX_DEV.info
    assert (schnell.width, schnell.height, schnell.steps, schnell.guidance, schnell.t5_length) == (
        1024,
        1024,
        4,
        None,
        256,
    )
    assert (dev.width, dev.height, dev.steps, dev.guidance, dev.t5_length) == (1024, 1024, 50, 3.5, 512)
    assert dev.repo == "black-forest-labs/FLUX.1-dev" and dev.gated
    assert SDVersion.SD21.info.width == 768 and SDVersion.SDXL_TURBO.info.steps == 1


@pytest.mark.parametrize(
    "version", [SDVersion.TINY_FLUX, SDVersion.TINY_SD, SDVersion.SD15, SDVersion.SDXL_INPAINT]
)
def test_parameters_are_counted_as_they_are(version: SDVersion) -> None:
    """The catalogue's figures; of the other released models `test_sd_maps` holds them against plans."""
    counts = [sum(p.numel() for p in part.module.parameters()) for part in parts_of(version)]
    assert sorted(counts) == sorted(version.info.parameters.values())


# the hub's files -------------------------------------------------------------------------------------------

SD = [version for version in SDVersion if version.info.family == "sd" and version.info.repo]
NETWORKS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
# What else the released repositories hold: formats of other programs, and files of all kinds.
BESIDE = (
    "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors",
    "safety_checker/model.safetensors", "safety_checker/model.fp16.safetensors", "unet/model.onnx",
    "feature_extractor/preprocessor_config.json", "vae_1_0/diffusion_pytorch_model.fp16.safetensors",
)  # fmt: skip


def listing(version: SDVersion, kinds: tuple[str, ...]) -> set[str]:
    """The files of a repository whose weights come in these kinds, as "" and ".fp16"."""
    folders = [folder for folder in NETWORKS if folder != "text_encoder_2" or version.is_xl]
    names = {f"{folder}/config.json" for folder in folders} | set(BESIDE)
    for folder in folders:
        for kind in (*kinds, ".non_ema"):
            names |= {f"{folder}/{NETWORKS[folder]}{kind}.{ending}" for ending in ("safetensors", "bin")}
    for folder in ("tokenizer", "tokenizer_2")[: 2 if version.is_xl else 1]:
        names |= {f"{folder}/{file}" for file in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    return names | {"scheduler/scheduler_config.json"}


@pytest.mark.parametrize("version", SD, ids=str)
def test_one_file_of_each_network_is_fetched_in_half_precision_where_there_is_one(version: SDVersion) -> None:
    roles = version.info.hub_files
    parts = set(version.info.parameters) | {"scheduler", "clip_tokenizer"}
    assert roles.keys() == parts | ({"clip_2_tokenizer"} if version.is_xl else set())
    for kinds, wanted in (((".fp16", ""), ".fp16"), (("",), "")):
        chosen = _choose(listing(version, kinds), roles)
        assert chosen.keys() == roles.keys()
        weights = [name for names in chosen.values() for name in names if "safetensors" in name]
        folders = [folder for folder in NETWORKS if folder != "text_encoder_2" or version.is_xl]
        assert sorted(weights) == sorted(f"{f}/{NETWORKS[f]}{wanted}.safetensors" for f in folders)
        others = {name for names in chosen.values() for name in names} - set(weights)
        assert {name.rpartition("/")[2] for name in others} == {
            "config.json", "vocab.json", "merges.txt", "scheduler_config.json"
        }  # fmt: skip


def test_a_repository_means_its_version() -> None:
    """Under its present owner and under the one it had before."""
    for version in SDVersion:
        if version.info.repo is not None:
            assert SDVersion.parse(version.info.repo) is version
    for repo, version in (
        ("runwayml/stable-diffusion-v1-5", SDVersion.SD15),
        ("runwayml/stable-diffusion-inpainting", SDVersion.SD15_INPAINT),
        ("stabilityai/stable-diffusion-2-1", SDVersion.SD21),
        ("stabilityai/stable-diffusion-2-1-base", SDVersion.SD21_BASE),
        ("stabilityai/stable-diffusion-2-inpainting", SDVersion.SD2_INPAINT),
        ("stabilityai/stable-diffusion-xl-base-1.0", SDVersion.SDXL),
        ("stabilityai/sdxl-turbo", SDVersion.SDXL_TURBO),
        ("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", SDVersion.SDXL_INPAINT),
    ):
        assert SDVersion.parse(repo) is version


def test_what_is_fetched_stands_in_the_released_repositories(hub_dir: Path) -> None:
    """All but the weights, of which no listing is at hand."""
    seen = 0
    for folder in sorted(hub_dir.glob("*/*/unet/..")):
        version = SDVersion.parse(folder.resolve().name)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for role, ways in version.info.hub_files.items():
            small = [pattern for pattern in ways[0] if "safetensors" not in pattern]
            assert small and set(small) <= names, (version, role)
            seen += 1
    assert seen >= 6 * 5
