"""The pictures: colour emoji over plain backgrounds, rendered from Noto Color Emoji (SIL OFL)."""

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT_PATHS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",)
FONT_SIZE = 109  # the only size at which the bitmap font has glyphs
SIZE = 128
GLYPH = 96  # pixels of the longer side of an emoji
JITTERS = 8  # variants of each emoji; the first is canonical
EMOJI_COUNT = 416
MIN_DISTANCE = 0.012  # mean squared RGB difference (0..1) between two chosen emoji on grey
PIZZA = 0x1F355

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "red": (205, 40, 45),
    "green": (45, 150, 70),
    "blue": (45, 95, 215),
    "yellow": (245, 205, 50),
    "purple": (130, 60, 175),
    "grey": (130, 130, 130),
}

RANGES = ((0x1F300, 0x1FAF0), (0x2600, 0x27C0), (0x231A, 0x23F4), (0x2B50, 0x2B51))
# Words of names that say nothing about the picture, name a colour, or belong to rows of near-duplicates.
EXCLUDED_WORDS = frozenset(
    "clock moon keycap button input arrow arrows arrowhead leftwards rightwards upwards downwards "
    "pointing up-pointing down-pointing left-pointing right-pointing black white red green blue "
    "yellow purple grey orange brown large small heavy heart hearts heart-shaped fitzpatrick male "
    "female sign symbol aries taurus gemini virgo libra capricorn aquarius pisces leo latin hamsa "
    "component symbols square squared circle mark chart banknote envelope mailbox book notebook "
    "ledger person woman man men women boy girl mens womans adult child older couple family kiss "
    "bride busts bust deaf pregnant breast-feeding flag flags japanese japan love reversed medium "
    "speaker flashlight open-mouth smoking restroom loop ornament suit closed lowered face cat hand "
    "fist hands index finger fingers palm palms emoji".split()
)
# Names that hold an excluded word and are wanted all the same.
WANTED = frozenset(
    "cat, sun with face, grinning face, winking face, crying face, angry face, sleeping face, robot face, "
    "clown face, face with cowboy hat, face screaming in fear, nauseated face, nerd face, pouting face, "
    "smiling face with sunglasses, smiling face with halo, face with medical mask, dog face, mouse face, "
    "cow face, tiger face, rabbit face, cat face, dragon face, horse face, monkey face, pig face, frog "
    "face, hamster face, wolf face, bear face, panda face, lion face, unicorn face, fox face, giraffe "
    "face, zebra face, open book, crescent moon, moon cake, red apple, green apple, construction sign, "
    "broken heart, alarm clock, japanese castle, smiling face with horns, freezing face, flushed face, "
    "thumbs up sign, victory hand, raised fist".split(", ")
)


@dataclass(frozen=True)
class Pictures:
    """All emoji as cut-outs: name i, variant j is `rgba[i, j]`, uint8 [4,128,128]; variant 0 is canonical."""

    names: tuple[str, ...]
    codepoints: tuple[int, ...]
    rgba: Tensor

    def compose(self, emoji: Tensor, background: Tensor, variant: Tensor) -> Tensor:
        """emoji, background, variant [B] -> pictures [B,3,128,128] in -1..1"""
        cut = self.rgba[emoji, variant].float() / 255  # [B,4,H,W]
        alpha = cut[:, 3:]
        plain = background_colours()[background][:, :, None, None]  # [B,3,1,1]
        return (cut[:, :3] * alpha + plain * (1 - alpha)) * 2 - 1


def background_colours() -> Tensor:
    """[8,3] in 0..1"""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def is_held_out(name: str, background: str) -> bool:
    """Whether the pair is kept from training: a fixed tenth of all pairs, by hash."""
    digest = hashlib.sha256(f"{name}|{background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def pairs(names: tuple[str, ...], held_out: bool) -> list[tuple[int, int]]:
    """(emoji, background) index pairs of one side of the split, in order."""
    return [
        (i, j)
        for i, name in enumerate(names)
        for j, background in enumerate(BACKGROUNDS)
        if is_held_out(name, background) == held_out
    ]


def find_font(path: Path | None = None) -> Path:
    """The font file, or a sentence on how to get it."""
    for candidate in (path,) if path else map(Path, FONT_PATHS):
        if candidate.is_file():
            return candidate
    raise SystemExit("no Noto Color Emoji font found: apt-get install fonts-noto-color-emoji, or pass --font")


def glyph(font: ImageFont.FreeTypeFont, codepoint: int) -> Image.Image | None:
    """One emoji, cropped to what is visible."""
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((8, 8), chr(codepoint), font=font, embedded_color=True)
    box = image.getbbox()
    return image.crop(box) if box else None


def place(cut: Image.Image, scale: float, dx: int, dy: int) -> np.ndarray:
    """The emoji scaled and centred with an offset -> uint8 [4,128,128]"""
    factor = GLYPH * scale / max(cut.size)
    width, height = (max(1, round(side * factor)) for side in cut.size)
    small = cut.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    canvas.paste(small, ((SIZE - width) // 2 + dx, (SIZE - height) // 2 + dy))
    return np.asarray(canvas).transpose(2, 0, 1).copy()


def variants(cut: Image.Image, codepoint: int) -> np.ndarray:
    """Canonical position, then slight shifts and scales -> uint8 [JITTERS,4,128,128]"""
    random = np.random.default_rng(codepoint)
    made = [place(cut, 1.0, 0, 0)]
    for _ in range(JITTERS - 1):
        dx, dy = (int(v) for v in random.integers(-2, 3, 2))
        made.append(place(cut, float(random.uniform(0.97, 1.03)), dx, dy))
    return np.stack(made)


def is_candidate(name: str) -> bool:
    """Whether a Unicode name says what is to be seen and stands alone."""
    return name in WANTED or not EXCLUDED_WORDS.intersection(name.split())


def plain_name(codepoint: int) -> str:
    """The Unicode name in lower case, without where it points to."""
    return unicodedata.name(chr(codepoint), "").lower().removeprefix("lower left ")


def candidates(font: ImageFont.FreeTypeFont) -> list[tuple[int, str, Image.Image]]:
    """Code point, name and cut-out of everything that may be chosen."""
    found = []
    for codepoint in (c for first, end in RANGES for c in range(first, end)):
        name = plain_name(codepoint)
        cut = glyph(font, codepoint) if name and is_candidate(name) else None
        if cut is not None and min(cut.size) > 0.3 * max(cut.size):
            found.append((codepoint, name, cut))
    return found


def on_grey(rgba: np.ndarray) -> np.ndarray:
    """uint8 [4,H,W] -> float32 [3,H,W] in 0..1 over middle grey"""
    cut = rgba.astype(np.float32) / 255
    return cut[:3] * cut[3:] + 0.5 * (1 - cut[3:])


def detail(picture: np.ndarray) -> float:
    """How much of a picture is lost at a quarter of its size: fine drawings score high."""
    side = SIZE // 4
    blocks = picture.reshape(3, side, 4, side, 4)
    return float(((blocks - blocks.mean((2, 4), keepdims=True)) ** 2).mean())


def choose(found: list[tuple[int, str, Image.Image]]) -> list[int]:
    """Indices of the chosen: from plain to detailed, each far enough from all before it; pizza first."""
    shown = [on_grey(place(cut, 1.0, 0, 0)) for _, _, cut in found]
    order = sorted(range(len(found)), key=lambda i: (found[i][0] != PIZZA, detail(shown[i])))
    chosen: list[int] = []
    kept = np.empty((EMOJI_COUNT, 3 * SIZE * SIZE), np.float32)
    for i in order:
        flat = shown[i].reshape(-1)
        if len(chosen) == 0 or ((kept[: len(chosen)] - flat) ** 2).mean(1).min() >= MIN_DISTANCE:
            kept[len(chosen)] = flat
            chosen.append(i)
        if len(chosen) == EMOJI_COUNT:
            return sorted(chosen)
    raise SystemExit(
        f"only {len(chosen)} distinct emoji found, {EMOJI_COUNT} wanted: another version of the font?"
    )


def render(font_path: Path | None, cache: Path) -> Pictures:
    """All pictures, from the cache file where it exists."""
    if not cache.is_file():
        font = ImageFont.truetype(str(find_font(font_path)), size=FONT_SIZE)
        found = candidates(font)
        picked = [found[i] for i in choose(found)]
        rgba = torch.from_numpy(np.stack([variants(cut, codepoint) for codepoint, _, cut in picked]))
        torch.save(
            {"names": [p[1] for p in picked], "codepoints": [p[0] for p in picked], "rgba": rgba}, cache
        )
    stored = torch.load(cache, weights_only=True)
    return Pictures(tuple(stored["names"]), tuple(stored["codepoints"]), stored["rgba"])


@torch.no_grad()
def nearest(pictures: Pictures, painted: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B,3,H,W] in -1..1 -> emoji [B] and background [B] of the nearest canonical rendering, by mean
    squared RGB error over all of them."""
    count = len(pictures.names)
    flat = painted.flatten(1)
    best = torch.full((len(painted),), float("inf"))
    emoji = torch.zeros(len(painted), dtype=torch.long)
    background = torch.zeros_like(emoji)
    every = torch.arange(count)
    for j in range(len(BACKGROUNDS)):
        for part in every.split(64):
            shown = pictures.compose(part, torch.full_like(part, j), torch.zeros_like(part)).flatten(1)
            distance = (
                shown.square().sum(1) - 2 * flat @ shown.T
            )  # [B,part], less the painted picture's own square
            value, at = distance.min(1)
            closer = value < best
            best = torch.where(closer, value, best)
            emoji = torch.where(closer, part[at], emoji)
            background = torch.where(closer, torch.full_like(background, j), background)
    return emoji, background
