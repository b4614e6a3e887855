"""Prompts as the field keeps them: CSV, TSV, JSON lines, a JSON list, plain text.

A prompt is data. Nothing here loads a model, and what a file cannot mean is a ValueError with the line's number.
"""

import codecs
import csv
import hashlib
import io
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .files import as_path

FORMATS = ("csv", "tsv", "jsonl", "json", "text")
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"} | {
    ".txt": "text"
}
# Delimiters in the order in which they are tried on a header: some spreadsheets write CSV with semicolons.
DELIMITERS = {"csv": (",", ";", "\t"), "tsv": ("\t",)}
MOST = {"seed": 2**63 - 1, "width": 2**31 - 1, "height": 2**31 - 1}
LEAST = {"seed": 0, "width": 1, "height": 1}
OWN = ("prompt", "negative_prompt", "id", *MOST)  # the columns that mean something here


@dataclass(frozen=True)
class Prompt:
    """One image to make."""

    id: str  # the file's own, or a digest of what makes the image
    text: str
    seed: int | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # the file's further columns, as JSON
    line: int = 0  # where it stands in the file, or its number in a list, from 1

    @property
    def stem(self) -> str:
        return file_stem(self.id, self.text)


Row = tuple[int, Mapping[str, Any]]  # its line, and its cells by column


def read_prompts(source: str | Path, form: str | None = None) -> list[Prompt]:
    """The prompts of a file; of standard input for "-".

    form: one of FORMATS; None: by the file's suffix, or else by what it looks like. A CSV or TSV file has a column
    `prompt` (in any case), JSON has `prompt` or `text`; `seed`, `negative_prompt`, `width`, `height` and `id` are
    optional, and further columns are kept. UTF-8, or UTF-16 with a byte-order mark.

    Raises ValueError, with the line's number, for what cannot be read and for a file without a prompt; OSError for no
    such file.
    """
    if form is not None and (not isinstance(form, str) or form not in FORMATS):
        raise ValueError(f"unknown format {form!r:.100}; the known ones are {', '.join(FORMATS)}")
    path = as_path("source", source)
    name = "standard input" if str(path) == "-" else str(source)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = _decoded(data)
        rows = _rows(text, form or SUFFIXES.get(Path(name).suffix.lower()) or _looks_like(text))
        return _prompts(rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def as_prompts(prompts: Iterable[str | Mapping[str, Any] | Prompt]) -> list[Prompt]:
    """The same of a list in memory: strings, dicts with the columns of a file, or what `read_prompts` returned."""
    wrong = "prompts must be a list of them: read_prompts(path) reads a file"
    if isinstance(prompts, str | bytes | Mapping):
        raise ValueError(wrong)
    try:
        rows = iter(prompts)
    except TypeError as error:
        raise ValueError(f"{wrong}; got {type(prompts).__name__}") from error
    return _prompts(_from_json(number, each) for number, each in enumerate(rows, 1))


def slug(text: str, most: int = 40) -> str:
    """Letters, digits and underscores of the text's beginning, in lower-case ASCII, joined by hyphens."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:most].strip("-")


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def file_stem(id: str, text: str) -> str:
    """The name of a prompt's files, without a suffix: lower-case ASCII of a bounded length, never raw text.

    A plain id stands as it is; another gets a digest, so that two never have one name in any file system.
    """
    plain = slug(id)
    name = id if id == plain else f"{plain[:27]}-{digest(id)}".lstrip("-")
    return f"{name}-{slug(text) or 'prompt'}"


# ---------------------------------------------------------------- rows to prompts


def _prompts(rows: Iterable[Row]) -> list[Prompt]:
    return _without_repeats([_prompt(line, cells) for line, cells in rows])


def _prompt(line: int, cells: Mapping[str, Any]) -> Prompt:
    try:
        cells = _plain(cells)
        text, negative = (_text(name, cells.get(name)) for name in ("prompt", "negative_prompt"))
        if text is None or not text.strip():
            raise ValueError("the prompt is empty")
        id = cells.get("id")
        id = _text("id", str(id) if type(id) is int else id)
        numbers = {name: _whole(name, cells.get(name)) for name in MOST}
    except RecursionError:
        raise ValueError(f"line {line}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error
    columns = {name: value for name, value in cells.items() if name not in OWN}
    prompt = Prompt((id or "").strip(), text, negative_prompt=negative or None, columns=columns, line=line, **numbers)
    return prompt if prompt.id else replace(prompt, id=_derived_id(prompt))


def _plain(value: Any) -> Any:
    """As JSON. A number that is not finite is an empty cell, as in a pandas frame."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return (int(number) if number.is_integer() else number) if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else str(value)


def _without_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Rows that say the same stand once. Those that differ only in further columns, and have no id, are told apart."""
    if not prompts:
        raise ValueError("there is no prompt in it")
    rows: set[str] = set()
    counts: Counter[str] = Counter()  # of the rows that make the same image and have no id
    by_id: dict[str, Prompt] = {}
    by_stem: dict[str, Prompt] = {}
    for prompt in prompts:
        row = json.dumps(vars(prompt) | {"line": 0})
        if row in rows:
            continue
        rows.add(row)
        if prompt.id == _derived_id(prompt):
            counts[prompt.id] += 1
            if counts[prompt.id] > 1:
                prompt = replace(prompt, id=f"{prompt.id}-{counts[prompt.id]}")
        for names, name in ((by_id, prompt.id), (by_stem, prompt.stem)):
            other = names.setdefault(name, prompt)
            if other is not prompt:
                raise ValueError(
                    f"line {prompt.line}: the id {prompt.id!r:.100} is that of line {other.line} too, or leads to the "
                    "same file name: give each prompt its own"
                )
    return list(by_id.values())


def _derived_id(prompt: Prompt) -> str:
    """The id of a prompt that was given none: what makes the image decides it, not where the prompt stands."""
    return digest(prompt.text, prompt.negative_prompt, prompt.seed, prompt.width, prompt.height)


def _text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"the {name} is not a text, it is {value!r:.100}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {name} is not valid Unicode text") from None
    return value


def _whole(name: str, value: Any) -> int | None:
    """A whole number, None for an empty cell. "42.0" is one: pandas writes so where other rows have none."""
    if isinstance(value, str):
        value = value.strip()
        if match := re.fullmatch(r"(\d{1,20})(\.0*)?", value, re.ASCII):
            value = int(match[1])
    if value is None or value == "":
        return None
    if type(value) is not int:
        raise ValueError(f"the {name} must be a whole number, got {value!r:.100}")
    if not LEAST[name] <= value <= MOST[name]:
        raise ValueError(f"the {name} must be from {LEAST[name]} to {MOST[name]}, got {str(value)[:100]}")
    return value


# ---------------------------------------------------------------- text to rows


def _decoded(data: bytes) -> str:
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}: it is no {encoding.removesuffix('-sig').upper()} text: save it as UTF-8"
        ) from None


def _looks_like(text: str) -> str:
    start = text.lstrip()
    if start.startswith("["):
        return "json"
    if start.startswith("{"):
        return "jsonl"
    header = start.partition("\n")[0].rstrip("\r")
    return next((form for form in ("tsv", "csv") if _delimiter(header, form)), "text")


def _rows(text: str, form: str) -> Iterator[Row]:
    if form == "text":
        lines = io.StringIO(text, newline=None)  # \n, \r\n and \r end a line, and nothing else does
        return ((number, {"prompt": line.strip()}) for number, line in enumerate(lines, 1) if line.strip())
    if form == "jsonl":
        lines = io.StringIO(text, newline=None)
        return (_from_json(number, _loads(line, number)) for number, line in enumerate(lines, 1) if line.strip())
    return _json_list(text) if form == "json" else _table(text, form)


def _loads(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {line}: it is no JSON: {_reason(error)}") from None


def _json_list(text: str) -> Iterator[Row]:
    """Item by item, so that each has its line."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
    at, line = 0, 1

    def go(to: int) -> str:
        """Goes past blanks from there, and gives the character that it finds."""
        nonlocal at, line
        found = blank.match(text, to)
        assert found is not None  # nothing is blank too
        line += text.count("\n", at, found.end())
        at = found.end()
        return text[at : at + 1]

    if go(0) != "[":
        raise ValueError(f"line {line}: it is no JSON list, which begins with [")
    more = go(at + 1) != "]"
    while more:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line}: it is no JSON: {_reason(error)}") from None
        yield _from_json(line, value)
        more = go(end) == ","
        if more:
            go(at + 1)
    if text[at : at + 1] != "]":
        raise ValueError(f"line {line}: it is no JSON: a comma or ] should stand here")
    if go(at + 1):
        raise ValueError(f"line {line}: there is more after the end of the JSON list")


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply or has too long a number"


def _from_json(line: int, value: Any) -> Row:
    """A string, or an object with `prompt` or `text`; in memory a Prompt too."""
    if isinstance(value, str):
        return line, {"prompt": value}
    if isinstance(value, Prompt):
        own = {name: getattr(value, name) for name in OWN if name != "prompt"}
        return value.line or line, {**value.columns, **own, "prompt": value.text}
    if not isinstance(value, Mapping):
        raise ValueError(f"line {line}: a prompt is a string or an object, not {value!r:.100}")
    row = _lowered(line, [str(name) for name in value], list(value.values()))
    if "prompt" not in row:
        if "text" not in row:
            raise ValueError(f'line {line}: it has neither "prompt" nor "text"')
        row["prompt"] = row.pop("text")
    return line, row


def _table(text: str, form: str) -> Iterator[Row]:
    """Raises ValueError where a quote is never closed: a lenient reader takes the rest of the file for one cell."""
    start = re.match(r"(?:[ \t]*\r?\n)*", text)
    assert start is not None  # nothing is blank too
    skipped = start[0].count("\n")
    body = text[start.end() :]
    if not body.strip():
        return
    header = re.split(r"[\r\n]", body, maxsplit=1)[0]
    delimiter = _delimiter(header, form)
    if delimiter is None:
        raise ValueError(f"line {skipped + 1}: no column is called prompt; the header is {header!r:.200}")
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = skipped + 1
    try:
        for cells in reader:
            if names is None:
                names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
                _lowered(line, names, names)  # no two of one name
            elif any(map(str.strip, cells)):
                if len(cells) > len(names):
                    raise ValueError(
                        f"line {line}: {len(cells)} cells, and the header has {len(names)}: a prompt that holds the "
                        'delimiter stands in quotes, "so, as this"'
                    )
                yield line, _lowered(line, names, cells)
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {line}: {error}. A cell that begins with a quote ends with one, and doubles those inside"
        ) from None


def _delimiter(header: str, form: str) -> str | None:
    """The one by which the header has a column `prompt`."""
    for delimiter in DELIMITERS[form]:
        try:
            cells = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        if "prompt" in (cell.strip().lower() for cell in cells):
            return delimiter
    return None


def _lowered(line: int, names: Sequence[str], cells: Sequence[Any]) -> dict[str, Any]:
    """The cells by column, with our own columns' names in lower case; empty cells without a name are left out."""
    row: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=False):
        known = name.strip().lower()
        name = known if known in OWN else name
        if name in row:
            raise ValueError(f"line {line}: two columns are called {name!r}")
        if cell != "" or name in OWN or not re.fullmatch(r"column \d+", name):
            row[name] = cell
    return row
