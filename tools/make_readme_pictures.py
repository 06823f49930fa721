"""Paints the README's pictures with the embedded models: seed 1, default steps, no choice among results.

    python tools/make_readme_pictures.py

A contact sheet of each model: its first prompt is the README's, the others are pairs of emoji and background
that were kept from training (tests/data/tiny_flux_thumbnails.json). One sheet of tasks: a row a model,
from left to right a text, the picture turned into another, a mask, what was repainted under it, and for
tiny-flux the adapter that ships with it.
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw

import flux_sd
from flux_sd import GenerationRequest
from flux_sd.image import contact_sheet, save_png
from flux_sd.model_loader import embedded_folder

ROOT = Path(__file__).parent.parent
OUT = ROOT / "reference_outputs" / "pictures"
SHEETS = {"tiny-flux": "contact_sheet.png", "tiny-sd": "contact_sheet_sd.png"}
FIRST = "a slice of pizza on a blue background"
OTHER = "a red apple on a white background"
INSIDE = "a rocket on a blue background"
STRENGTH = 0.85
COUNT = 16


def sheet(model: flux_sd.LoadedModel) -> tuple[Image.Image, dict[str, object]]:
    """Sixteen pictures, and their records."""
    rows = json.loads((ROOT / "tests" / "data" / "tiny_flux_thumbnails.json").read_text("utf-8"))
    prompts = [FIRST, *(row["caption"] for row in rows if row["held_out"])][:COUNT]
    results = [model.generate(GenerationRequest(prompt=prompt, seed=1))[0] for prompt in prompts]
    labels = [prompt.removesuffix(" background").replace(" on a ", ", ") for prompt in prompts]
    made = contact_sheet([result.image for result in results], labels, columns=4, gap=48)
    return made, {"sheet": [result.metadata for result in results]}


def mask() -> Image.Image:
    """White, to be repainted, on the right half."""
    made = Image.new("L", (128, 128))
    ImageDraw.Draw(made).rectangle((64, 0, 128, 128), fill=255)
    return made


def framed(picture: Image.Image) -> Image.Image:
    """With a grey line around, where white would melt into the page."""
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline="grey")
    return picture


def tasks(model: flux_sd.LoadedModel) -> list[tuple[str, Image.Image]]:
    """Label and picture of each task."""
    text = model.generate(GenerationRequest(prompt=FIRST, seed=1))[0].image
    asked = GenerationRequest(prompt=OTHER, seed=1, init_image=text, strength=STRENGTH)
    other = model.generate(asked)[0].image
    asked = GenerationRequest(prompt=INSIDE, seed=1, init_image=text, mask=mask())
    repainted = model.generate(asked)[0].image
    return [
        ("pizza, blue", text),
        (f"apple, white; {STRENGTH}", other),
        ("mask", framed(mask().convert("RGB"))),
        ("rocket under it", repainted),
    ]


def with_adapter() -> Image.Image:
    """The README's prompt with the adapter that ships in the package."""
    file = embedded_folder(flux_sd.SDVersion.TINY_FLUX.info) / "adapters" / "sticker.safetensors"
    with flux_sd.load_model("tiny-flux", device="cpu", loras=[file]) as model:
        return model.generate(GenerationRequest(prompt=FIRST, seed=1))[0].image


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, file in SHEETS.items():
        with flux_sd.load_model(name, device="cpu", keep_loaded=True) as model:
            made, record = sheet(model)
            save_png(made, OUT / file, record, overwrite=True)
            shown += [(f"{name}: {label}", picture) for label, picture in tasks(model)]
        shown.append(
            ("adapter", with_adapter())
            if name == "tiny-flux"
            else ("", Image.new("RGB", (128, 128), "white"))
        )
    labels, pictures = zip(*shown, strict=True)
    save_png(
        contact_sheet(list(pictures), list(labels), columns=5, gap=48), OUT / "tasks.png", {}, overwrite=True
    )
    for path in sorted(OUT.glob("*.png")):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
