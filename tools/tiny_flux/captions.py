"""The captions: English phrases about one emoji and the colour behind it."""

import random
from dataclasses import dataclass

from tiny_flux.pictures import BACKGROUNDS

WHITE = list(BACKGROUNDS).index("white")
# The first is what pictures are measured by.
TEMPLATES = (
    "{a} on a {colour} background",
    "{bare} on a {colour} background",
    "{bare}, {colour} background",
    "{a}, {colour} background",
    "{bare} on {colour}",
    "{a} on {colour}",
    "{a} in front of a {colour} background",
    "{a} against a {colour} background",
    "a picture of {a} on a {colour} background",
    "an emoji of {a} on a {colour} background",
    "{bare} with a {colour} background",
    "the {bare} on a {colour} background",
    "{colour} background, {bare}",
)
WITHOUT_BACKGROUND = ("{a}", "{bare}", "a picture of {a}", "an emoji of {a}")  # these mean white
# Everyday words for Unicode's.
SYNONYMS = {
    "aubergine": "eggplant",
    "hocho": "kitchen knife",
    "doughnut": "donut",
    "optical disc": "cd",
    "pistol": "water pistol",
    "electric torch": "flashlight",
    "teacup without handle": "teacup",
    "ear of maize": "corn",
    "cooking": "fried egg",
    "droplet": "water drop",
    "seat": "chair",
    "couch and lamp": "couch",
    "hourglass with flowing sand": "sand timer",
    "extraterrestrial alien": "alien",
    "school satchel": "backpack",
    "lady beetle": "ladybug",
    "sauropod": "dinosaur",
    "moyai": "stone head",
    "izakaya lantern": "red lantern",
    "earth globe americas": "earth globe",
    "nut and bolt": "bolt",
    "earth globe europe-africa": "globe",
    "table tennis paddle and ball": "ping pong paddle",
    "billed cap": "cap",
    "sake bottle and cup": "sake",
    "soft ice cream": "ice cream cone",
    "sleuth or spy": "detective",
    "dancer": "flamenco dancer",
    "fish cake with swirl design": "fish cake",
    "reminder ribbon": "yellow ribbon",
    "dark sunglasses": "sunglasses",
    "bottle with popping cork": "champagne",
    "gem stone": "diamond",
    "cheese wedge": "cheese",
    "thong sandal": "flip flop",
    "european castle": "castle",
    "fork and knife with plate": "plate",
    "poultry leg": "chicken leg",
    "gear": "cogwheel",
    "bathtub": "bath",
    "vertical traffic light": "traffic light",
    "flexed biceps": "strong arm",
    "rocket": "space rocket",
    "dove of peace": "dove",
    "drop of blood": "blood drop",
    "pot of food": "stew",
}
SINGULAR_ENDINGS = ("ss", "us", "is", "compass", "hourglass")


@dataclass(frozen=True)
class Captions:
    """What may be said of each emoji; `phrases[i][0]` is its name."""

    phrases: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Captions":
        """Names, and whatever else stands for exactly one of them."""
        found = [(name, *_further(name)) for name in names]
        counts: dict[str, int] = {}
        for phrase in (phrase for phrases in found for phrase in phrases):
            counts[phrase] = counts.get(phrase, 0) + 1
        return cls(tuple((p[0], *(q for q in p[1:] if counts[q] == 1)) for p in found))

    def canonical(self, emoji: int, background: int) -> str:
        """The caption that evaluation paints."""
        return fill(TEMPLATES[0], self.phrases[emoji][0], background)

    def draw(self, emoji: int, background: int, source: random.Random) -> str:
        """A random caption of one picture."""
        phrases = self.phrases[emoji]
        phrase = phrases[0] if source.random() < 0.65 else source.choice(phrases)
        if background == WHITE and source.random() < 0.25:
            caption = fill(source.choice(WITHOUT_BACKGROUND), phrase, background)
        else:
            caption = fill(
                TEMPLATES[0] if source.random() < 0.3 else source.choice(TEMPLATES), phrase, background
            )
        caption = caption[0].upper() + caption[1:] if source.random() < 0.1 else caption
        return caption + "." if source.random() < 0.1 else caption

    def all(self) -> list[str]:
        """Every caption there is, for the tokenizers."""
        colours = range(len(BACKGROUNDS))
        texts = [
            fill(template, phrase, colours[(i + j) % len(colours)])
            for i, phrases in enumerate(self.phrases)
            for phrase in phrases
            for j, template in enumerate(TEMPLATES + WITHOUT_BACKGROUND)
        ]
        return texts + [text[0].upper() + text[1:] + "." for text in texts[::5]]


def _further(name: str) -> tuple[str, ...]:
    further = [SYNONYMS[name]] if name in SYNONYMS else []
    if " of " in name and name not in SYNONYMS:
        further.append(name.split(" of ", 1)[1])
    for ending in (" face", " sign"):
        rest = name.removesuffix(ending)
        if rest != name and not rest.endswith(("with", "ing", "ed")):
            further.append(rest)
    return tuple(further)


def with_article(phrase: str) -> str:
    """ "an apple", "a slice of pizza", "grapes" """
    head = phrase.split(" of ")[0].split(" with ")[0]
    if head.endswith("s") and not head.endswith(SINGULAR_ENDINGS):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith(('uni', 'one')) else 'a'} {phrase}"


def fill(template: str, phrase: str, background: int) -> str:
    """A template with its words."""
    return template.format(a=with_article(phrase), bare=phrase, colour=list(BACKGROUNDS)[background])
