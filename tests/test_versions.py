"""The table of models."""

from __future__ import annotations

import pytest

from flux_sd.errors import UnknownVersionError
from flux_sd.versions import SDVersion

SPELLINGS = {
    SDVersion.FLUX_SCHNELL: "flux-schnell FLUX.1-schnell flux1-schnell schnell any-owner/FLUX.1-schnell",
    SDVersion.FLUX_DEV: "flux-dev FLUX.1-dev flux1-dev flux.1.dev dev Flux_Dev black-forest-labs/FLUX.1-dev",
    SDVersion.SD15: "sd15 SD1.5 sd-1.5 v1-5 stable-diffusion-v1-5 stable-diffusion-1.5",
    SDVersion.SD21: "sd21 sd2.1 v2-1 stable-diffusion-2-1 stabilityai/stable-diffusion-2-1",
    SDVersion.SDXL: "sdxl SDXL xl sdxl-base stabilityai/stable-diffusion-xl-base-1.0",
    SDVersion.SDXL_TURBO: "sdxl-turbo turbo stabilityai/sdxl-turbo",
    SDVersion.SD15_INPAINT: "sd15-inpaint sd1.5-inpainting runwayml/stable-diffusion-inpainting",
    SDVersion.SD2_INPAINT: "sd2-inpaint stabilityai/stable-diffusion-2-inpainting",
    SDVersion.SDXL_INPAINT: "sdxl-inpaint diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    SDVersion.TINY_FLUX: "tiny-flux tiny_flux TinyFlux tiny",
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
    with pytest.raises(UnknownVersionError, match="known are tiny-flux, flux-schnell"):
        SDVersion.parse(text)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UnknownVersionError, match="did you mean flux-schnell"):
        SDVersion.parse("flux-schnel")


def test_families() -> None:
    assert [v.info.key for v in SDVersion if v.is_flux] == ["tiny-flux", "flux-schnell", "flux-dev"]
    assert [v.info.key for v in SDVersion if v.is_inpainting] == [
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
