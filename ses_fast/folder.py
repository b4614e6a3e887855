"""The folder of a batch: what is in it, who may work in it, and what a kill at any moment leaves of it.

    batch.json           the settings, which every run in this folder shares
    results.jsonl        a line a prompt that ended; of several with one id the last counts
    results.N.jsonl      the same of process N, while several work; taken into results.jsonl when they have ended
    images/              NAME.png, the answer, and NAME.base.png, the image without search
    searches/            NAME.safetensors, a search under way, after its last complete generation
    summary.json, index.html

Every file but the records of results appears whole. Each of those has one writer, which holds a lock of its own. There
a line is on the disk before the next prompt begins, and a last line that was cut off is dropped. What cannot be written
is an error of the folder, not of the prompt.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from .checks import differences
from .errors import missing_extra
from .files import make_folder, sync_folder, write_whole
from .prompts import Prompt, file_stem
from .result import SearchResult

FOLDER_FORMAT = 1  # raised when an old folder could no longer be gone on with
DONE, FAILED = "done", "failed"


class CannotWrite(OSError):
    """The folder takes no more: the disk is full, or it may not be written to. The same command goes on later."""


@dataclass(frozen=True)
class Result:
    """What became of one prompt: a line of results.jsonl. A score that was not finite is None."""

    id: str
    prompt: str
    status: str  # DONE or FAILED
    seed: int
    negative_prompt: str | None = None
    width: int | None = None  # None: the call's
    height: int | None = None
    image: str | None = None  # within the folder
    base_image: str | None = None
    score: float | None = None
    base_score: float | None = None
    held_out: dict[str, dict[str, float | None]] = field(default_factory=dict)  # name -> "base", "answer"
    evaluations: int = 0
    scores: list[float | None] = field(default_factory=list)  # in order
    early: list[int] = field(default_factory=list)  # which of them a race stopped: these rank, and are never the best
    seconds: dict[str, float] = field(default_factory=dict)  # of the run that ended it, by stage
    error: str | None = None  # of a failed one
    traceback: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)  # the prompt file's further ones

    @property
    def gain(self) -> float | None:
        """How much higher the answer scores than the image without search."""
        return None if self.score is None or self.base_score is None else self.score - self.base_score

    @property
    def stem(self) -> str:
        return file_stem(self.id, self.prompt)

    def is_of(self, prompt: Prompt, seed: int) -> bool:
        """Whether the prompt, with its seed, still is what this is the result of."""
        mine = self.prompt, self.negative_prompt, self.seed, self.width, self.height
        return mine == (prompt.text, prompt.negative_prompt, seed, prompt.width, prompt.height)

    @staticmethod
    def from_json(value: Any) -> "Result":
        """Raises ValueError for what no batch has written."""
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        kinds = {each.name: KINDS[each.name] for each in fields(Result)}
        if missing := kinds.keys() - value.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if unknown := value.keys() - kinds.keys():
            raise ValueError(f"it has {', '.join(sorted(unknown))}, which no result has")
        for name, fits in kinds.items():
            if not fits(value[name]):
                raise ValueError(f"its {name} is {value[name]!r:.100}")
        result = Result(**value)
        images = [f"images/{result.stem}{end}" for end in (".png", ".base.png")]
        if result.status == DONE and [result.image, result.base_image] != images:
            raise ValueError(f"its images are not {' and '.join(images)}")
        return result


Fits = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _or_none(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


def _list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _dict_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_two(value: Any) -> bool:
    return _dict_of(_or_none(_is_number))(value) and value.keys() == {"base", "answer"}


# A field of `Result` -> whether a value read from the disk fits it.
KINDS: dict[str, Fits] = {
    "id": _is_text,
    "prompt": _is_text,
    "status": lambda value: value in (DONE, FAILED),
    "seed": _is_count,
    "negative_prompt": _or_none(_is_text),
    "width": _or_none(_is_count),
    "height": _or_none(_is_count),
    "image": _or_none(_is_text),
    "base_image": _or_none(_is_text),
    "score": _or_none(_is_number),
    "base_score": _or_none(_is_number),
    "held_out": _dict_of(_is_two),
    "evaluations": _is_count,
    "scores": _list_of(_or_none(_is_number)),
    "early": _list_of(_is_count),
    "seconds": _dict_of(_is_number),
    "error": _or_none(_is_text),
    "traceback": _or_none(_is_text),
    "columns": lambda value: isinstance(value, dict),
}


class Folder:
    """The folder at `path`, which the processes of one run alone work in until `close`.

    settings: what every run in it shares, as JSON. restart: what an earlier batch left is removed first.
    rank: of this process. The first one looks after the folder, and opens it before the others do.

    Raises ValueError where another process works in it, where an earlier batch had other settings (the message says
    which), and for a file that no batch has written; CannotWrite where it cannot be written to.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, restart: bool = False, rank: int = 0
    ) -> None:
        self.path, self.rank = Path(path), rank
        self.results: dict[str, Result] = {}  # by id, the last of each
        self._has_record = False  # whether the record's name is on the disk
        with self._writing(self.path):
            for folder in (self.path, self.images, self.searches):
                make_folder(folder)
        self._lock = self._locked(rank)
        if rank > 0:
            return
        try:
            for other in self.path.glob(".lock.*"):  # whoever holds it has outlived an earlier run
                if other.suffix[1:].isdecimal():
                    self._locked(int(other.suffix[1:])).release()
            self._tidy(restart)
            self._share(settings)
            self._read(self._record)
            self.take_in()
            self._forget_finished()
        except BaseException:
            self.close()
            raise

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def searches(self) -> Path:
        return self.path / "searches"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def page(self) -> Path:
        return self.path / "index.html"

    @property
    def _record(self) -> Path:
        return self.path / (f"results.{self.rank}.jsonl" if self.rank else "results.jsonl")

    @property
    def _others(self) -> list[Path]:
        """The records of other processes, in the order of their ranks."""
        records = self.path.glob("results.*.jsonl")
        return sorted((path for path in records if path.name.split(".")[1].isdecimal()), key=_rank_of)

    @property
    def _settings(self) -> Path:
        return self.path / "batch.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others work in it."""
        self._lock.release()

    def image(self, stem: str, base: bool = False) -> Path:
        return self.images / f"{stem}{'.base' if base else ''}.png"

    def search(self, stem: str) -> Path:
        return self.searches / f"{stem}.safetensors"

    def finished(self, prompt: Prompt, seed: int) -> bool:
        """Whether the prompt is done and its images are there. Raises ValueError where its id is another prompt's."""
        result = self.results.get(prompt.id)
        if result is None or result.status != DONE:
            return False
        if not result.is_of(prompt, seed):
            raise ValueError(
                f"line {prompt.line}: the id {prompt.id!r:.100} is in {self._record} already, with another prompt, "
                "seed or size: give it another id, or start again with --restart (restart=True)"
            )
        return self.image(result.stem).is_file() and self.image(result.stem, base=True).is_file()

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """`write_whole`. Raises CannotWrite where that fails."""
        with self._writing(path):
            write_whole(path, write)

    def save_search(self, stem: str, found: SearchResult) -> None:
        """Keeps a search under way; a kill leaves the one before it or this one."""
        with self._writing(self.search(stem)):
            found.save(self.search(stem))

    def saved_search(self, stem: str) -> SearchResult | None:
        """The search that was kept, if there is one. Raises ValueError for a file that cannot be gone on with."""
        path = self.search(stem)
        return SearchResult.load(path) if path.exists() else None

    def remove(self, path: Path) -> None:
        with self._writing(path):
            path.unlink(missing_ok=True)

    def add(self, result: Result) -> None:
        """Puts a line in results.jsonl; it is on the disk when this returns."""
        with self._writing(self._record), self._record.open("ab") as file:
            if not self._has_record:  # it may be new, or its folder may not have been synced before a kill
                sync_folder(self.path)
                self._has_record = True
            file.write(_line(result))
            file.flush()
            os.fsync(file.fileno())
        self.results[result.id] = result

    def take_in(self) -> None:
        """Takes the results of the other processes, which have ended, into results.jsonl."""
        others = self._others
        news = [result for path in others for result in self._read(path)]
        if news:
            before = self._record.read_bytes() if self._record.exists() else b""
            self.write(self._record, lambda path: path.write_bytes(before + b"".join(map(_line, news))))
        for path in others:  # a kill before this leaves lines that are known
            self.remove(path)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the last file of a batch that has ended."""
        text = json.dumps({**summary, "results_bytes": self._record.stat().st_size}, indent=1, allow_nan=False) + "\n"
        self.write(self.summary, lambda path: path.write_text(text))

    def is_summarised(self) -> bool:
        """Whether summary and page are those of all results: a kill may have come before them."""
        try:
            summary = json.loads(self.summary.read_bytes())
            return self.page.exists() and summary["results_bytes"] == self._record.stat().st_size
        except (OSError, ValueError, LookupError, TypeError):
            return False

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        # safetensors has an error of its own for a full disk; nothing but writing happens inside
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CannotWrite(f"cannot write {path}: {reason}") from error

    def _locked(self, rank: int) -> Any:
        try:
            from filelock import FileLock, Timeout
        except ModuleNotFoundError as error:
            raise missing_extra("filelock", "batch") from error
        # The operating system's lock: it ends with its owner, however that ends.
        path = self.path / (f".lock.{rank}" if rank else ".lock")
        lock = FileLock(path, blocking=False, thread_local=False)
        try:
            with self._writing(path):
                lock.acquire()
        except CannotWrite as error:
            if not isinstance(error.__cause__, Timeout):
                raise
            raise ValueError(f"another process works in {self.path}: wait for it, or give another folder") from None
        return lock

    def _tidy(self, restart: bool) -> None:
        """Removes what a killed run left half-written, and with restart all that a batch has made."""
        folders = (self.path, self.images, self.searches)
        left = [part for folder in folders for part in folder.glob(".*.part")]
        restarts = restart and self._settings.exists()
        if restarts:
            left += [self._record, *self._others, self.summary, self.page]
            left += [*self.searches.glob("*.safetensors"), *self.images.glob("*.png")]
        for path in left:
            self.remove(path)
        if restarts:
            # The settings last: what a kill or a power cut leaves is a batch without results, which begins anew.
            for folder in folders:
                with self._writing(folder):
                    sync_folder(folder)
            self.remove(self._settings)

    def _share(self, settings: Mapping[str, Any]) -> None:
        now = {"format": FOLDER_FORMAT, **json.loads(json.dumps(settings))}
        if not self._settings.exists():
            if self._record.exists():
                raise ValueError(f"{self._record} is there, and {self._settings.name} is not: give another folder")
            self.write(self._settings, lambda path: path.write_text(json.dumps(now, indent=1) + "\n"))
            return
        try:
            was = json.loads(self._settings.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._settings} is no batch's: {error}. Give another folder") from None
        if others := list(differences(was, now)):
            which = "; ".join(f"{name} was {before!r:.200}, and now is {here!r:.200}" for name, before, here in others)
            raise ValueError(
                f"{self.path} holds a batch with other settings: {which}. Give another folder, or start again with "
                "--restart (restart=True)"
            )

    def _read(self, record: Path) -> list[Result]:
        """Takes up a file of results, and drops a last line that was cut off. Returns what was not known."""
        if not record.exists():
            return []
        news: list[Result | None] = []
        *lines, rest = record.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                news.append(self._take(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{record}, line {number}, is no result of a batch: {error}. Mend or remove the line"
                ) from None
        if rest:
            with self._writing(record):
                try:
                    news.append(self._take(rest))
                except (ValueError, RecursionError):
                    os.truncate(record, record.stat().st_size - len(rest))
                else:  # it lacks its end alone
                    with record.open("ab") as file:
                        file.write(b"\n")
        return [result for result in news if result is not None]

    def _forget_finished(self) -> None:
        """Removes the searches of prompts that a kill found done, and their searches still there."""
        done = {result.stem for result in self.results.values() if result.status == DONE}
        for path in self.searches.glob("*.safetensors"):
            if path.stem in done:
                self.remove(path)

    def _take(self, line: bytes) -> Result | None:
        """The line's result, where it was not known."""
        result = Result.from_json(json.loads(line.decode("utf-8-sig")))
        known = self.results.get(result.id) == result
        self.results[result.id] = result
        return None if known else result


def _line(result: Result) -> bytes:
    return json.dumps(asdict(result), allow_nan=False).encode() + b"\n"


def _rank_of(record: Path) -> int:
    return int(record.name.split(".")[1])
