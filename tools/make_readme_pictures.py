"""Paints the README's pictures with the embedded models: seed 1, default steps, no choice among results.

    python tools/make_readme_pictures.py

The first prompt is the README's; the others are pairs of emoji and background that were kept from training
(those of tests/data/tiny_flux_thumbnails.json).
"""

import json
from pathlib import Path

import flux_sd
from flux_sd.image import contact_sheet, save_png

ROOT = Path(__file__).parent.parent
OUT = ROOT / "reference_outputs" / "pictures" / "contact_sheet.png"
FIRST = "a slice of pizza on a blue background"
COUNT = 16


def main() -> None:
    rows = json.loads((ROOT / "tests" / "data" / "tiny_flux_thumbnails.json").read_text("utf-8"))
    prompts = [FIRST, *(row["caption"] for row in rows if row["held_out"])][:COUNT]
    with flux_sd.load_model("tiny-flux", device="cpu", keep_loaded=True) as model:
        requests = [flux_sd.GenerationRequest(prompt=prompt, seed=1) for prompt in prompts]
        results = [model.generate(request)[0] for request in requests]
    labels = [prompt.removesuffix(" background").replace(" on a ", ", ") for prompt in prompts]
    sheet = contact_sheet([result.image for result in results], labels, columns=4, gap=48)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, OUT, {"sheet": [result.metadata for result in results]}, overwrite=True)
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
