"""The pictures of a request, fitted to what is painted, and its size: the same for every family. Floor 5.

No file is read, so that this comes before any download. The rules:

- what is painted has the size that the request gives, else that of `init_image`, else of `control_image`,
  else of the fitted `reference`, else the version's; with `fit` crop or stretch a picture's size is rounded
  down to the multiples that the version needs;
- `init_image` and `control_image` are resized where their proportions are those of the size, and a note says
  so; where they are not, `fit` decides: refuse (the default), crop, stretch;
- a mask has the proportions of `init_image`, at any size, and is fitted alike, so that both lie over each
  other; white is repainted, black is kept;
- `reference` is looked at, not painted over, and keeps a size of its own: of those that the model was trained
  on the one that comes nearest to its proportions, with a note; without such, its own, rounded down.

A control picture is taken as it is: lines for a canny model, depths for a depth model. Neither is computed
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from . import image
from .errors import RequestError
from .request import GenerationRequest
from .steps import MAX_SIDE, check_size
from .versions import SDVersion, VersionInfo

if TYPE_CHECKING:
    from PIL.Image import Image

# How much of the way is run on a picture where the request does not say: all of it where a mask says what to
# keep.
STRENGTH, MASKED_STRENGTH = 0.8, 1.0
UNUSED_PICTURE = "strength 1 begins with noise alone: of init_image only the size is used"
# Pictures that only some versions can use, and the field of a version that says so.
ABILITIES = {"control_image": "takes_control", "reference": "takes_reference"}
GROUNDS = {"mask": "black"}  # under what is transparent; white elsewhere


class Canvas(NamedTuple):
    """What is painted on, and what is looked at."""

    width: int
    height: int
    picture: Image | None  # init_image, as 8-bit RGB of width x height
    mask: Tensor | None  # [1,H,W]; 1: repaint, 0: keep
    control: Image | None  # 8-bit RGB of width x height
    reference: Image | None  # 8-bit RGB of a size of its own
    hashes: Mapping[str, str]  # field of the request -> hash of its pixels, as they were given
    notes: tuple[str, ...]  # what the user should know


def strength_of(request: GenerationRequest) -> float | None:
    """The request's, or what it means by silence; None without a picture to begin from."""
    if request.init_image is None or request.strength is not None:
        return request.strength
    return STRENGTH if request.mask is None else MASKED_STRENGTH


def fit_canvas(info: VersionInfo, request: GenerationRequest, cell: int, rule: str = "refuse") -> Canvas:
    """The request's pictures as the version takes them.

    cell: pixels of the mask that are decided by the upper left one of them. rule: see `check_size`.
    Raises RequestError for a picture that the version cannot use or lacks, and for sizes that do not agree.
    """
    _check_pictures(info, request)
    given = _given(request)
    notes: list[str] = []
    reference = given.get("reference")
    if reference is not None:
        reference = fit_reference(info, reference, notes)
    base = given.get("init_image") or given.get("control_image")
    width, height = _size(info, request, base, reference, rule)

    def fitted(name: str) -> Image | None:
        return _fitted(name, given[name], (width, height), request.fit, notes) if name in given else None

    picture, mask = fitted("init_image"), None
    if "mask" in given:
        mask = _mask(given["mask"], given["init_image"], (width, height), request.fit or "refuse")
        _check_mask(mask, cell)
    hashes = {name: image.pixel_hash(each) for name, each in given.items()}
    return Canvas(width, height, picture, mask, fitted("control_image"), reference, hashes, tuple(notes))


def _given(request: GenerationRequest) -> dict[str, Image]:
    """The request's pictures as 8-bit RGB, upright."""
    names = ("init_image", "mask", "control_image", "reference")
    found = {name: getattr(request, name) for name in names}
    return {n: image.to_rgb(each, GROUNDS.get(n, "white")) for n, each in found.items() if each is not None}


def _check_pictures(info: VersionInfo, request: GenerationRequest) -> None:
    """Refuses pictures that the version has no use for, those that lack another, and an unknown `fit`."""
    for name, ability in ABILITIES.items():
        if getattr(request, name) is not None and not getattr(info, ability):
            able = " or ".join(version.info.key for version in SDVersion if getattr(version.info, ability))
            raise RequestError(f"{name} is not used by {info.key}: leave it out, or choose {able}")
    if info.is_inpainting and (request.init_image is None or request.mask is None):
        lacking = "init_image" if request.init_image is None else "mask"
        raise RequestError(f"{info.key} repaints a part of a picture and {lacking} is not given: give both")
    if info.takes_control and request.control_image is None:
        raise RequestError(
            f"{info.key} follows a control picture and control_image is not given: give one that is made "
            "already, for lines and depths are not computed here"
        )
    pairs = (("mask", "init_image"), ("strength", "init_image"), ("composite", "mask"))
    for name, needs in pairs:
        if getattr(request, name) is not None and getattr(request, needs) is None:
            raise RequestError(f"{name} is given and {needs} is not: give both, or leave {name} out")
    if request.fit is not None and request.init_image is None and request.control_image is None:
        raise RequestError("fit is given and init_image is not: give both, or leave fit out")
    if request.fit is not None and request.fit not in image.FITS:
        raise RequestError(f"fit {request.fit!r} is unknown: choose {', '.join(image.FITS)}")


def _size(
    info: VersionInfo, request: GenerationRequest, base: Image | None, reference: Image | None, rule: str
) -> tuple[int, int]:
    """Width and height: the request's, else a picture's, else the version's."""
    own = (info.width, info.height) if reference is None else reference.size
    if base is not None:
        own = base.size
        if request.fit in ("crop", "stretch"):
            own = (own[0] // info.multiple * info.multiple, own[1] // info.multiple * info.multiple)
    width = own[0] if request.width is None else request.width
    height = own[1] if request.height is None else request.height
    for name, side in (("width", width), ("height", height)):
        if side > MAX_SIDE:  # before a picture is made so large
            raise RequestError(f"{name} {side} is outside 1..{MAX_SIDE}")
    return check_size(info, width, height, rule)


def _fitted(name: str, picture: Image, size: tuple[int, int], fit: str | None, notes: list[str]) -> Image:
    if picture.size != size:
        found = f"{name} is resized from {picture.width}x{picture.height}"
        notes.append(f"{found} to {size[0]}x{size[1]} pixels")
    return image.fit_picture(picture, *size, fit or "refuse", "the picture" if name == "init_image" else name)


def _mask(white: Image, picture: Image, size: tuple[int, int], fit: str) -> Tensor:
    if not image.same_proportions(white.size, picture.size):
        sizes = f"{white.width}x{white.height} pixels, init_image {picture.width}x{picture.height}"
        raise RequestError(f"the mask is {sizes}: give one of the same proportions, best the same size")
    return image.mask_of(white, *size, fit)


def _check_mask(mask: Tensor, cell: int) -> None:
    """Raises RequestError for a mask that is too fine."""
    if not mask[:, ::cell, ::cell].any():
        found = f"the mask's white parts are smaller than {cell}x{cell} pixels and fall between the latents"
        raise RequestError(f"{found}, so nothing would be repainted: make them larger")


def fit_reference(info: VersionInfo, picture: Image, notes: list[str]) -> Image:
    """A picture to refer to, at a size of the version's own; a little distorted where none has its
    proportions."""
    width, height = (max(info.multiple, side // info.multiple * info.multiple) for side in picture.size)
    why = f"multiples of {info.multiple}"
    if info.reference_sizes:
        proportions = picture.width / picture.height
        width, height = min(info.reference_sizes, key=lambda size: abs(proportions - size[0] / size[1]))
        why = f"the nearest in proportions of the sizes that {info.key} was trained on"
    if picture.size != (width, height):
        found = f"reference is resized from {picture.width}x{picture.height}"
        notes.append(f"{found} to {width}x{height} pixels, {why}")
    return image.fit_picture(picture, width, height, "stretch")
