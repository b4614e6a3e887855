"""The page of a batch: one HTML file that needs no other. The only file that imports jinja2."""

import base64
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import missing_extra
from .folder import DONE, Result

try:
    from jinja2 import Environment, StrictUndefined
    from PIL import Image
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "jinja2", "batch") from error

PAGE_BYTES = 30e6  # what a page's pictures take together, roughly: a browser still opens it
LARGEST, SMALLEST = 320, 64  # pixels on a picture's longer side
BYTES_OF_A_PIXEL = 0.25  # of a JPEG as it is saved here, in base64
MOST_CHARACTERS = 600  # of a text that are shown
WIDTH, HEIGHT = 240, 80  # of a curve
# What no page may hold, and what would turn the text around it: HTML's escaping leaves both as they are.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_page(path: Path, folder: Path, results: Sequence[Result], summary: Mapping[str, Any]) -> None:
    """Writes the page of `results`, whose images are in `folder`, to `path`.

    The pictures are thumbnails within the page, smaller where there are many; each links to the image itself.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "number": _number}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    side = picture_side(len(results))
    with path.open("w", encoding="utf-8") as file:
        cards = _cards(folder, results, side)
        file.writelines(template.generate(cards=cards, summary=summary, side=side, width=WIDTH, height=HEIGHT))


def picture_side(prompts: int) -> int:
    """How many pixels a picture's longer side has on a page of so many prompts."""
    side = math.sqrt(PAGE_BYTES / (2 * max(1, prompts) * BYTES_OF_A_PIXEL))
    return int(min(LARGEST, max(SMALLEST, side)))


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text as a person may read it: cut where it is very long, and without what controls a terminal or a page."""
    text = text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"
    return UNPRINTABLE.sub("\ufffd", text)


def curve(scores: Sequence[float | None], early: Collection[int] = ()) -> dict[str, Any] | None:
    """SVG paths of a search's scores: each one a dot, and the best so far as steps. None without two finite ones.

    early: the numbers of those that a race stopped, which have paler dots and are never the best. Coordinates are
    whole units of a WIDTH x HEIGHT box.
    """
    finite = [score for score in scores if score is not None]
    if len(finite) < 2:
        return None
    low, high = min(finite), max(finite)
    span = high - low or 1.0

    def x(i: int) -> int:
        return round(4 + i * (WIDTH - 8) / (len(scores) - 1))

    def y(score: float) -> int:
        return round(HEIGHT - 4 - (score - low) * (HEIGHT - 8) / span)

    dots, pale, best, last = "", "", "", -math.inf
    for i, score in enumerate(scores):
        if score is None:
            continue
        dot = f"M{x(i)} {y(score)}h0"
        if i in early:
            pale += dot
            continue
        dots += dot
        if score > last:
            best += f"H{x(i)}V{y(score)}" if best else f"M{x(i)} {y(score)}"
            last = score
    best = best and f"{best}H{x(len(scores) - 1)}"
    return {"dots": dots, "pale": pale, "best": best, "low": low, "high": high, "count": len(scores)}


def _cards(folder: Path, results: Iterable[Result], side: int) -> Iterator[dict[str, Any]]:
    """What the template says of each prompt."""
    for number, result in enumerate(results):
        pictures: list[dict[str, Any]] = []
        if result.status == DONE:
            for label, name, score in (
                ("without search", result.base_image, result.base_score),
                ("with search", result.image, result.score),
            ):
                pictures.append({"label": label, "name": name, "score": score, "data": _thumbnail(folder, name, side)})
        yield {
            "number": number,
            "result": result,
            "pictures": pictures,
            "curve": curve(result.scores, frozenset(result.early)),
        }


def _thumbnail(folder: Path, name: str | None, side: int) -> str | None:
    """A JPEG as a data URI; None where the file is no picture any more."""
    try:
        with Image.open(folder / str(name)) as image:
            small = image.convert("RGB")
            small.thumbnail((side, side))
    except OSError:
        return None
    held = io.BytesIO()
    small.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
