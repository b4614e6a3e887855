"""The embedded model's world: captions, the scenes they describe, and an oracle that reads an image.

A caption names two groups of objects and how they stand: "two red squares left of three blue rings".
Such scenes are easy to check exactly and hard to draw exactly: a small diffusion model gets the colours and the
shapes right, but often stands the groups another way round, as large models do, and loses count. Which of these
happens depends on the noise. That is what a search over the noise can mend, so it is what this world is for.
"""

import itertools
import random
from dataclasses import dataclass

import torch

from ..checks import check_floating
from ..errors import missing_extra

try:
    import numpy as np
except ModuleNotFoundError as error:  # torch does without
    raise missing_extra("numpy", "embedded") from error

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
}
BACKGROUND = (236, 236, 232)  # what the oracle takes for no object; so it does each of the two grounds
GROUNDS = ((244, 236, 220), (190, 205, 230))  # sand, on which the first group stands, and water, for the second
SHAPES = ("square", "ring", "cross")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_PLURALS = {shape: shape + ("es" if shape.endswith("ss") else "s") for shape in SHAPES}
_UNIT = 128  # the drawing's own units: a scene of 128x128 pixels is drawn one to one
_CELLS = 4  # a side of the grid that objects stand in
_JITTER = 2.0  # how far an object stands from its cell's middle, along each axis
_HELD_OUT = 200


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and shape."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        return f"{NUMBERS[self.count - 1]} {self.colour} {noun}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: `first` stands `relation` `second`; the two colours differ."""

    first: Group
    relation: str
    second: Group

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}"

    @property
    def axis(self) -> int:
        """The image axis along which the groups are apart: 1 for left and right, 0 for above and below."""
        return 1 if self.relation in ("left of", "right of") else 0

    @property
    def first_is_before(self) -> bool:
        """Whether the first group has the smaller coordinates on that axis."""
        return self.relation in ("left of", "above")

    @property
    def mirrored(self) -> "Scene":
        """The same scene, told from the other side: "B right of A" for "A left of B"."""
        return Scene(self.second, OPPOSITES[self.relation], self.first)


def all_scenes() -> list[Scene]:
    """Every scene that can be named, in a fixed order."""
    counts = range(1, len(NUMBERS) + 1)
    groups = [Group(n, c, s) for n, c, s in itertools.product(counts, COLOURS, SHAPES)]
    pairs = itertools.product(groups, RELATIONS, groups)
    return [Scene(first, relation, second) for first, relation, second in pairs if first.colour != second.colour]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(the scenes to train on, the held-out ones); fixed for ever. Those that say what a held-out one says, the other
    way round ("B right of A" for "A left of B"), are in neither.
    """
    scenes = all_scenes()
    random.Random(0).shuffle(scenes)
    held_out = scenes[:_HELD_OUT]
    kept_back = {*held_out, *(scene.mirrored for scene in held_out)}
    return [scene for scene in scenes if scene not in kept_back], held_out


def vocabulary() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    words = [*NUMBERS, *COLOURS, *SHAPES, *_PLURALS.values(), *(" ".join(RELATIONS)).split()]
    return list(dict.fromkeys(words))


def parse(caption: str) -> Scene:
    """The scene that `caption` describes. Raises ValueError when it is not of this world."""
    words = caption.split() if isinstance(caption, str) else []
    shapes = {word: shape for shape in SHAPES for word in (shape, _PLURALS[shape])}
    try:
        relation = next(r for r in RELATIONS if tuple(r.split()) == tuple(words[3:-3]))
        (n1, c1, s1), (n2, c2, s2) = words[:3], words[-3:]
        scene = Scene(
            Group(NUMBERS.index(n1) + 1, c1, shapes[s1]),
            relation,
            Group(NUMBERS.index(n2) + 1, c2, shapes[s2]),
        )
        known = c1 in COLOURS and c2 in COLOURS and c1 != c2 and str(scene) == caption
    except (StopIteration, KeyError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"not a caption of the embedded world: {caption!r:.200}. Say, for example, 'two red squares left of three "
            f"blue rings': numbers {', '.join(NUMBERS)}; two different colours of {', '.join(COLOURS)}; "
            f"{', '.join(_PLURALS.values())}; {', '.join(RELATIONS)}"
        )
    return scene


def draw(scene: Scene, rng: np.random.Generator, size: int = _UNIT) -> np.ndarray:  # [size, size, 3] uint8
    """A picture of `scene`: every object apart from every other, each group on a ground of its own."""
    scale = size / _UNIT
    image = np.empty((size, size, 3), np.uint8)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / scale
    before = (x if scene.axis == 1 else y) < _UNIT / 2
    image[:] = np.where((before == scene.first_is_before)[..., None], *GROUNDS)
    radius, objects = _layout(scene, rng)
    for centre_y, centre_x, group in objects:
        image[_shape_mask(group.shape, abs(y - centre_y), abs(x - centre_x), radius)] = COLOURS[group.colour]
    return image


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[float, list[tuple[float, float, Group]]]:
    """One radius for the whole scene and (y, x, group) for every object, each in a cell of its own."""
    radius = rng.uniform(10.5, 11.5)  # at 256 pixels an object is some 2.8 of the denoiser's tokens wide
    cell = _UNIT / _CELLS
    objects = []
    for group, before in ((scene.first, scene.first_is_before), (scene.second, not scene.first_is_before)):
        for place in rng.permutation(_CELLS * _CELLS // 2)[: group.count]:
            across, along = divmod(int(place), _CELLS // 2)
            if not before:
                along += _CELLS // 2
            row, column = (across, along) if scene.axis == 1 else (along, across)
            y, x = (np.array([row, column]) + 0.5) * cell + rng.uniform(-_JITTER, _JITTER, 2)
            objects.append((float(y), float(x), group))
    return radius, objects


def _shape_mask(shape: str, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Where an object of `shape` covers the image, from the absolute distances to its centre."""
    if shape == "square":
        return np.maximum(dy, dx) < 0.92 * radius
    if shape == "ring":
        distance = np.hypot(dy, dx)
        return (distance < 1.05 * radius) & (distance > 0.5 * radius)
    arm, half_width = 1.05 * radius, 0.37 * radius
    return ((dy < half_width) & (dx < arm)) | ((dx < half_width) & (dy < arm))


@dataclass(frozen=True)
class Sighting:
    """One object the oracle saw: its colour, its shape (None when it is none of the three), its centre (y, x)."""

    colour: str
    shape: str | None
    centre: tuple[float, float]


def see(image: np.ndarray) -> list[Sighting]:  # image: [H, W, 3] uint8
    """Every object in `image`: nearest palette colour, then connected components, then hole and fill ratios."""
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise missing_extra("scipy", "embedded") from error
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    distance = np.square(image.astype(np.float32)[:, :, None] - palette).sum(-1)  # [H, W, 7]
    nearest = distance.argmin(-1)
    nearest[distance.min(-1) > 70**2] = 0  # a colour of no object counts as background
    specks = 60 * (min(image.shape[:2]) / _UNIT) ** 2  # smaller than this is noise, not an object

    found = []
    for index, colour in enumerate(COLOURS, start=1):
        labels, count = ndimage.label(nearest == index)
        for label, window in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[window] == label
            if mask.sum() < specks:
                continue
            y, x = window
            centre = ((y.start + y.stop) / 2, (x.start + x.stop) / 2)
            found.append(Sighting(colour, _name_shape(mask, ndimage.binary_fill_holes(mask)), centre))
    return found


def _name_shape(mask: np.ndarray, filled: np.ndarray) -> str | None:
    height, width = mask.shape
    if not 0.7 < height / width < 1.43:
        return None  # two that have grown together are longer: all three shapes are as high as wide
    hole = (filled.sum() - mask.sum()) / filled.sum()
    if hole > 0.08:
        return "ring"
    fill = filled.mean()  # a square fills its box, a cross about half of it
    return "square" if fill > 0.82 else "cross" if fill < 0.74 else None


def judge(image, caption: str) -> dict[str, bool]:
    """`embedded.judge`."""
    scene = parse(caption)
    seen = see(_to_uint8(image))
    first = [s for s in seen if s.colour == scene.first.colour]
    second = [s for s in seen if s.colour == scene.second.colour]
    both = bool(first) and bool(second)
    facts = {
        "colours": both,
        "first count": len(first) == scene.first.count,
        "second count": len(second) == scene.second.count,
        "shapes": both
        and all(s.shape == scene.first.shape for s in first)
        and all(s.shape == scene.second.shape for s in second),
        "relation": both and _stands(scene, first, second),
        "nothing extra": len(first) + len(second) == len(seen),
    }
    return facts | {"all": all(facts.values())}


def _stands(scene: Scene, first: list[Sighting], second: list[Sighting]) -> bool:
    """Whether the groups' mean positions are in the named order."""
    gap = np.mean([s.centre[scene.axis] for s in second]) - np.mean([s.centre[scene.axis] for s in first])
    return bool(gap > 0) == scene.first_is_before


def _to_uint8(image) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        check_floating("the image", image)
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"the image must be a (3, H, W) or (1, 3, H, W) tensor, got {tuple(image.shape)}")
        levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
        return levels.permute(1, 2, 0).cpu().numpy()
    if not hasattr(image, "convert"):
        raise ValueError(f"the image must be a PIL image or a tensor, got {type(image).__name__}")
    return np.asarray(image.convert("RGB"))
