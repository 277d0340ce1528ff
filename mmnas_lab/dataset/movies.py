"""Generated movies: drawn posters, written plots, and genres of which a third need both."""

from __future__ import annotations

import colorsys
import hashlib
import json
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.types import InputError, Split, Task

VERSION = 1
"""Raised whenever any poster, plot or label changes for the same settings."""

PRIORS = {
    # drawn on the poster
    "night": 0.4,
    "sun": 0.4,
    "frame": 0.4,
    "stripes": 0.4,
    "mountains": 0.5,
    "figure": 0.5,
    # written in the plot
    "love": 0.4,
    "crime": 0.4,
    "war": 0.4,
    "children": 0.4,
    "magic": 0.5,
    "journey": 0.5,
}
"""Probability of each attribute of a movie; attributes are independent of each other."""

DRAWN = ("night", "sun", "frame", "stripes", "mountains", "figure")
WRITTEN = ("love", "crime", "war", "children", "magic", "journey")

GENRES: dict[str, tuple[str, ...]] = {
    "Horror": ("night",),
    "Western": ("sun",),
    "Film-Noir": ("frame",),
    "Musical": ("stripes",),
    "Romance": ("love",),
    "Crime": ("crime",),
    "War": ("war",),
    "Family": ("children",),
    "Fantasy": ("mountains", "magic"),
    "Adventure": ("mountains", "journey"),
    "Action": ("figure", "magic"),
    "Biography": ("figure", "journey"),
}
"""Attributes that a movie must have, all of them, to be of the genre."""

OPENINGS = (
    "{hero}, a {job}, lives in {town}.",
    "{hero} works as a {job} in {town}.",
    "In {town}, {hero} is a {mood} {job}.",
    "Nobody in {town} knows much about the {job} {hero}.",
)
SENTENCES = {
    "love": (
        "{hero} falls in love with {other}.",
        "A tender {romance} with {other} begins.",
        "{hero} and {other} {marry}.",
        "A passionate kiss starts a {romance}.",
    ),
    "crime": (
        "A {gang} plans a {heist}.",
        "The {police} investigate a {heist}.",
        "{hero} is arrested by the {police}.",
        "A {gang} is wanted for a {heist}.",
    ),
    "war": (
        "The {army} is sent into battle.",
        "War breaks out and {soldiers} march.",
        "Wounded {soldiers} return from the front.",
        "The {army} is bombed in the trenches.",
    ),
    "children": (
        "Two {children} adopt a {pet}.",
        "A lost {pet} befriends the {children}.",
        "The {children} build a treehouse.",
        "A {pet} makes the {children} laugh.",
    ),
    "magic": (
        "A {wizard} casts a {spell}.",
        "{hero} discovers {powers}.",
        "An enchanted ring gives {hero} {powers}.",
        "A {spell} can only be broken by a {wizard}.",
    ),
    "journey": (
        "{hero} sets out on a long {journey}.",
        "The {journey} leads across {lands}.",
        "{hero} travels through {lands}.",
        "An {journey_an} begins, bound for {lands}.",
    ),
}
DISTRACTORS = (
    "The {house} needs a new {repair}.",
    "It has been raining since {day}.",
    "Every {day} there is {meal} for dinner.",
    "The {house} is sold at last.",
    "A letter arrives on {day}.",
    "{other} keeps asking about the {repair}.",
    "The shop closes early on {day}.",
    "{hero} burns the {meal} again.",
    "Nothing much is said about the {house}.",
    "{other} has moved in next door.",
)
WORDS = {
    "hero": ("Anna", "Marek", "Lucy", "Tomas", "Ines", "Oliver", "Priya", "Samuel", "Greta", "Hassan", "Mei"),
    "other": ("a neighbour", "a stranger", "a colleague", "the landlord", "a dentist", "a cook", "a singer"),
    "job": ("baker", "clerk", "teacher", "gardener", "nurse", "plumber", "librarian", "tailor", "painter"),
    "mood": ("quiet", "stubborn", "cheerful", "tired", "clumsy", "proud"),
    "town": ("a small town", "the suburbs", "a coastal village", "the old quarter", "the city", "a valley"),
    "house": ("house", "flat", "cottage", "bakery", "cellar", "kitchen"),
    "repair": ("roof", "boiler", "window", "carpet", "staircase", "lamp"),
    "meal": ("soup", "stew", "rice", "fish", "cabbage", "toast"),
    "day": ("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
    "romance": ("romance", "love affair", "love story", "courtship"),
    "marry": ("marry in secret", "get engaged", "become lovers", "plan their wedding", "elope as newlyweds"),
    "gang": ("gang of thieves", "burglar", "mobster", "criminal", "gangster", "murderer"),
    "heist": ("bank robbery", "jewel heist", "murder", "kidnapping", "burglary"),
    "police": ("police", "detectives", "sheriff's officers", "homicide squad"),
    "army": ("army", "regiment", "infantry battalion", "platoon", "air force squadron"),
    "soldiers": ("soldiers", "troops", "infantrymen", "conscripts"),
    "children": ("children", "kids", "schoolgirls", "little brothers", "toddlers"),
    "pet": ("puppy", "kitten", "pony", "hamster", "baby rabbit"),
    "wizard": ("wizard", "witch", "sorcerer", "fairy", "warlock"),
    "spell": ("magic spell", "curse", "powerful enchantment", "hex"),
    "powers": ("magical powers", "a gift for sorcery", "supernatural abilities", "witchcraft"),
    "journey": ("journey", "expedition", "voyage", "road trip", "trek"),
    "journey_an": ("expedition", "odyssey", "overseas voyage", "overland trek"),
    "lands": ("the desert", "three continents", "the open ocean", "the jungle", "distant countries"),
}
MIN_WORDS = 24

Colour = tuple[int, int, int]


class Movies:
    """Movies with a drawn poster, a written plot and some of 12 genres; every row is computed when read.

    A movie has twelve independent yes/no attributes (`PRIORS`): six are drawn on the poster, six are written
    in the plot. A movie is of a genre if it has all attributes that the genre asks for (`GENRES`):

    - four genres ask for one drawn attribute (dark sky, large sun disc, thick frame, broad stripes): the
      poster alone tells them, at a prevalence of 0.4;
    - four ask for one written attribute (love, crime, war, children): the plot alone tells them, at 0.4;
    - four ask for a drawn and a written attribute, the pairs of {mountains, figure} and {magic, journey}.
      None of these four attributes has a genre of its own. Prevalence is 0.25; one modality alone raises the
      probability to at most 0.5, both together to 1.

    What carries no label varies freely: colours, sizes, positions, the title and the grain of a poster;
    names, wording, order and unrelated sentences of a plot. A row depends on the seed, its split and its
    number only, so a larger dataset begins with the rows of a smaller one.

    Args:
        noise: in [0, 1]; probability that an attribute is shown as an independent draw from its prior instead
            of its true value. Labels follow the true values, so that at 1 posters and plots say nothing of
            them.
        num_train: movies of the training split; >= 1.
        num_val: movies of the validation split; >= 1.
        num_test: movies of the test split; >= 1.
        poster_height: in pixels; 32 to 1024.
        poster_width: in pixels; 32 to 1024.
        seed: of all that is drawn; >= 0.

    Raises:
        InputError: a setting outside its range.
    """

    name = "movies"
    task: Task = "multilabel"

    def __init__(
        self,
        noise: float = 0.0,
        num_train: int = 900,
        num_val: int = 300,
        num_test: int = 600,
        poster_height: int = 96,
        poster_width: int = 64,
        seed: int = 0,
    ) -> None:
        self.modalities = {"image": "image", "text": "text"}
        self.settings: dict[str, float | int] = {
            "noise": float(noise),
            "num_train": num_train,
            "num_val": num_val,
            "num_test": num_test,
            "poster_height": poster_height,
            "poster_width": poster_width,
            "seed": seed,
        }
        ranges = {"noise": (0, 1), "poster_height": (32, 1024), "poster_width": (32, 1024)}
        for name, value in self.settings.items():
            low, high = ranges.get(name, (0 if name == "seed" else 1, 2**31 - 1))
            if not low <= value <= high:
                raise InputError(f"Movies needs {name} in [{low}, {high}], got {value}; set dataset.{name}")
        self.noise = float(noise)
        self.poster_size = (poster_width, poster_height)
        self.seed = seed
        self._numbers: dict[Split, list[int]] = {
            "train": list(range(num_train)),
            "val": list(range(num_val)),
            "test": list(range(num_test)),
        }

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(GENRES)

    def open(self) -> None:
        """Nothing lies on disk."""

    def ids(self, split: Split) -> list[str]:
        return [f"movie-{split}-{number:05d}" for number in self._numbers[split]]

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        makers = {"image": self._poster, "text": self._plot}
        if modality not in makers:
            raise InputError(f"Movies has the modalities {sorted(makers)}, got '{modality}'")
        return [makers[modality](split, self._numbers[split][row]) for row in rows]

    def unreadable(self, split: Split) -> dict[int, str]:
        return {}

    def drop(self, rows: dict[Split, list[int]]) -> None:
        for split, dropped in rows.items():
            gone = set(dropped)
            self._numbers[split] = [n for row, n in enumerate(self._numbers[split]) if row not in gone]

    def fingerprint(self) -> str:
        """Hash of the settings, the generator's version and the rows in use, which decide all inputs."""
        return _digest([VERSION, self.settings, self._numbers])

    def labels(self, split: Split) -> Tensor:
        attributes = self.attributes(split)
        columns = {name: column for column, name in enumerate(PRIORS)}
        genres = [attributes[:, [columns[name] for name in needed]].all(dim=1) for needed in GENRES.values()]
        return torch.stack(genres, dim=1).to(torch.uint8)

    def label_fingerprint(self) -> str:
        return _digest([self.labels(split).tolist() for split in SPLITS])

    def attributes(self, split: Split, *, shown: bool = False) -> Tensor:
        """The attributes of every movie, (n, 12) bool in the order of `PRIORS`.

        Args:
            split: whose movies.
            shown: give what poster and plot show, which departs from the truth where there is noise.
        """
        values = [self._attributes(split, number)[int(shown)] for number in self._numbers[split]]
        return torch.from_numpy(np.stack(values))

    def _generator(self, split: Split, number: int, purpose: int) -> np.random.Generator:
        entropy = [self.seed, SPLITS.index(split), number, purpose]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

    def _attributes(self, split: Split, number: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """True and shown values, (12,) each."""
        priors = np.array(list(PRIORS.values()))
        true = self._generator(split, number, purpose=0).random(len(priors)) < priors
        draws = self._generator(split, number, purpose=1).random((2, len(priors)))
        return true, np.where(draws[0] < self.noise, draws[1] < priors, true)

    def _shown(self, split: Split, number: int) -> dict[str, bool]:
        return dict(zip(PRIORS, self._attributes(split, number)[1].tolist(), strict=True))

    def _poster(self, split: Split, number: int) -> Image.Image:
        shown = self._shown(split, number)
        return draw_poster(shown, self.poster_size, self._generator(split, number, purpose=2))

    def _plot(self, split: Split, number: int) -> str:
        return write_plot(self._shown(split, number), self._generator(split, number, purpose=3))


def draw_poster(shown: dict[str, bool], size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """A poster of `size` (width, height) that shows the drawn attributes; all else is up to the generator."""
    width, height = size
    uniform = generator.uniform
    night = shown["night"]

    def colour(value: tuple[float, float], saturation: tuple[float, float]) -> Colour:
        red, green, blue = colorsys.hsv_to_rgb(uniform(), uniform(*saturation), uniform(*value))
        return round(255 * red), round(255 * green), round(255 * blue)

    poster = Image.new("RGB", size, colour((0.08, 0.22) if night else (0.8, 1.0), (0.2, 0.5)))
    draw = ImageDraw.Draw(poster)

    if shown["stripes"]:
        _draw_stripes(draw, size, colour((0.4, 0.55) if night else (0.45, 0.65), (0.3, 0.8)), generator)
    if shown["sun"]:
        radius = uniform(0.24, 0.34) * width
        x, y = uniform(0.3, 0.7) * width, uniform(0.25, 0.4) * height
        disc = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(disc, fill=colour((0.9, 1.0), (0.75, 1.0)))

    ground = colour((0.3, 0.45) if night else (0.25, 0.5), (0.3, 0.7))
    horizon = uniform(0.8, 0.88) * height
    draw.rectangle((0, horizon, width, height), fill=ground)
    if shown["mountains"]:
        left = uniform(-0.2, 0.0) * width
        while left < 0.9 * width:
            base, peak = uniform(0.35, 0.6) * width, uniform(0.48, 0.62) * height
            corners = [(left, horizon), (left + base * uniform(0.4, 0.6), peak), (left + base, horizon)]
            draw.polygon(corners, fill=ground)
            left += 0.6 * base
    if shown["figure"]:
        _draw_figure(draw, size, colour((0.9, 1.0) if night else (0.0, 0.15), (0.0, 0.2)), generator)

    _draw_title(draw, size, colour((0.7, 1.0) if night else (0.1, 0.4), (0.0, 0.6)), generator)
    if shown["frame"]:
        thickness = round(uniform(0.1, 0.14) * width)
        edge = (0, 0, width - 1, height - 1)
        draw.rectangle(edge, outline=colour((0.5, 0.9), (0.6, 1.0)), width=thickness)

    grain = generator.normal(0.0, uniform(2.0, 8.0), (height, width, 1))
    pixels = np.asarray(poster, dtype=np.float64) + grain
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _draw_stripes(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], fill: Colour, generator: np.random.Generator
) -> None:
    """Broad diagonal stripes over the whole background, leaning to either side."""
    width, height = size
    period = generator.uniform(0.24, 0.34) * width
    lean = generator.choice([-1, 1]) * generator.uniform(0.5, 1.0) * height
    x = -height - generator.uniform(0, period)
    while x < width + height:
        end = x + period / 2
        draw.polygon([(x, 0), (end, 0), (end + lean, height), (x + lean, height)], fill=fill)
        x += period


def _draw_figure(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], fill: Colour, generator: np.random.Generator
) -> None:
    """A person in the foreground: head, shoulders, legs apart."""
    width, height = size
    tall = generator.uniform(0.5, 0.6) * height
    x, foot = generator.uniform(0.3, 0.7) * width, generator.uniform(0.93, 0.99) * height
    top, head = foot - tall, 0.1 * tall
    draw.ellipse((x - head, top, x + head, top + 2.2 * head), fill=fill)
    shoulder, hip, neck, waist = 0.2 * tall, 0.12 * tall, top + 2.2 * head, foot - 0.45 * tall
    draw.polygon([(x - shoulder, neck), (x + shoulder, neck), (x + hip, waist), (x - hip, waist)], fill=fill)
    for side in (-1, 1):
        stride = side * generator.uniform(0.12, 0.2) * tall
        inner = x + stride - side * 0.1 * tall
        draw.polygon([(x + side * hip, waist), (x, waist), (inner, foot), (x + stride, foot)], fill=fill)


def _draw_title(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], fill: Colour, generator: np.random.Generator
) -> None:
    """A line of unreadable small letters near the top or the bottom."""
    width, height = size
    letter = generator.uniform(0.035, 0.06) * width
    y = generator.choice([0.1, 0.9]) * height
    x = generator.uniform(0.15, 0.35) * width
    for _ in range(generator.integers(4, 9)):
        draw.rectangle((x, y - letter, x + 0.7 * letter, y + letter * generator.uniform(0, 1)), fill=fill)
        x += generator.choice([1.3, 2.2]) * letter


def write_plot(shown: dict[str, bool], generator: np.random.Generator) -> str:
    """A plot that tells of the written attributes and of nothing else that has to do with them."""
    hero = _choose(WORDS["hero"], generator)
    told = [_choose(SENTENCES[name], generator) for name in WRITTEN if shown[name]]
    bodies = [_phrase(template, hero, generator) for template in told]
    opening = _phrase(_choose(OPENINGS, generator), hero, generator)
    distractors = [_phrase(DISTRACTORS[i], hero, generator) for i in generator.permutation(len(DISTRACTORS))]
    bodies.append(distractors.pop())
    while len(" ".join([opening, *bodies]).split()) < MIN_WORDS:
        bodies.append(distractors.pop())
    return " ".join([opening, *(bodies[i] for i in generator.permutation(len(bodies)))])


def _phrase(template: str, hero: str, generator: np.random.Generator) -> str:
    """The template with a word drawn for every blank, beginning with a capital letter."""
    blanks = [blank for _, blank, _, _ in string.Formatter().parse(template) if blank]
    words = {blank: hero if blank == "hero" else _choose(WORDS[blank], generator) for blank in blanks}
    sentence = template.format(**words)
    return sentence[0].upper() + sentence[1:]


def _choose(options: Sequence[str], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
