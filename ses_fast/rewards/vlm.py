"""A vision-language model behind an OpenAI-compatible server as a reward: it sees an image and answers with a number.

The client is `openai`, which vLLM, SGLang, llama.cpp, Ollama and OpenAI's own servers understand.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..checks import whole_number
from ..errors import missing_extra
from .base import check_images
from .pil import to_pil

if TYPE_CHECKING:
    from openai import OpenAI
    from PIL.Image import Image

QUESTION = """\
Rate this image from {low} to {high}. {high}: it shows everything that the caption says (the objects, how many they \
are, their colours and their places) and is well made. {low}: it shows nothing of it. Use decimals to tell similar \
images apart. Answer with the number alone.

Caption: {prompt}"""
AGAIN = "Answer with one number from {low} to {high} and nothing else."
SETTINGS = {"temperature": 0, "seed": 0, "max_tokens": 256}  # of every request: the same image, the same answer
OWN_FIELDS = ("model", "messages", "stream", "n")  # of a request: those that the reward alone decides

# Not the 4 of "GPT4", the 5 of "5x" or a part of "1.2.3"; the minus of "4-7" is none.
NUMBER = r"(?<![\w.,])[-\u2212+]?\d+(?:[.,]\d+)?(?!\w|[.,]\d)"
LAST_WORD = re.compile(rf"(?:[^\d:=]*[:=])?\s*({NUMBER})\W*")  # a line of a number alone, or of a label and a number


class CacheInfo(NamedTuple):
    """How many images were known, how many the model was asked about, and how many answers are kept."""

    hits: int
    misses: int
    size: int


@dataclass(frozen=True, eq=False)  # frozen: the answers that are kept belong to these settings
class VLMReward:
    """`reward(images, prompt)`: the model's rating of each image, from `low` to `high`; [n] fp64 on the CPU.

    model: its name on the server. base_url: the server's address, which mostly ends in /v1: "http://localhost:8000/v1".
    question: what the model is asked, with {prompt} where the prompt goes; {low} and {high} are the range's ends.
    api_key: None is OPENAI_API_KEY of the environment; a server of your own needs none. No message shows it.
    low, high: the least and the most that an answer may be; the question has to say them.
    attempts: how often the model is asked about an image before an answer without such a number is an error. From
        the second on it is reminded to give one number.
    max_retries: how often the client sends a request again, waiting longer each time, after a lost connection, a
        timeout, or one of the answers 408, 409, 429 and 5xx. timeout: seconds that the server may be silent.
    concurrency: images of one batch that are asked about at once. cache_size: answers that are kept; the one used
        least recently goes first. `cache_info()` counts.
    options: more fields of each request, or others than temperature 0, seed 0 and max_tokens 256. None leaves a field
        out: {"temperature": None, "max_tokens": None, "max_completion_tokens": 4000} suits OpenAI's models that think.

    The model sees the pictures that the pipeline would return, as PNG. An image that was rated for this prompt is not
    asked about again. An answer may have one number; with several the last line has to be a number alone or after a
    label ("Score: 7"). "7/10" and "7 out of 10" are 7, and thoughts in <think> tags are not read.
    Safe to use from several threads. Raises ValueError for bad settings, ImportError without openai or Pillow. A call
    raises ValueError for images that no reward takes, for a request that the server refuses and where no attempt gave
    a number, ConnectionError or TimeoutError where no answer came.
    """

    model: str
    base_url: str
    _: KW_ONLY
    question: str = QUESTION
    api_key: InitVar[str | None] = None  # no field: a field would be shown, and kept in a search's state
    low: float = 0
    high: float = 10
    attempts: int = 3
    max_retries: int = 4
    timeout: float = 120
    concurrency: int = 8
    cache_size: int = 4096
    options: Mapping[str, Any] = field(default_factory=dict)
    _answers: "Answers" = field(init=False, repr=False)

    def __post_init__(self, api_key: str | None) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model must be the name that the server knows it by, got {self.model!r}")
        _check_url(self.base_url)
        if not isinstance(self.question, str) or "{prompt}" not in self.question:
            raise ValueError(f"the question must hold {{prompt}}, where the prompt goes; got {self.question!r}")
        if not (_finite(self.low) and _finite(self.high) and self.low < self.high):
            raise ValueError(f"low must be a number below high, both finite; got {self.low!r} and {self.high!r}")
        if not (_finite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout must be a number of seconds above 0, got {self.timeout!r}")
        for name, least in (("attempts", 1), ("max_retries", 0), ("concurrency", 1), ("cache_size", 0)):
            whole_number(name, getattr(self, name), least)
        if not isinstance(self.options, Mapping) or not self.options.keys().isdisjoint(OWN_FIELDS):
            raise ValueError(f"options are a request's fields, without {', '.join(OWN_FIELDS)}; got {self.options!r}")
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as error:
            raise ValueError(f"options are sent as JSON, which {self.options!r} is not: {error}") from error
        for module, package in (("openai", "openai"), ("PIL", "pillow")):
            if find_spec(module) is None:
                raise missing_extra(package, "vlm")
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        if not isinstance(key, str | None):
            raise ValueError(f"api_key: the API key must be a str, got {type(key).__name__}")
        # A server of one's own asks for no key, but the client for one. The key is checked here, because the error
        # of a header that cannot be sent would show it.
        object.__setattr__(self, "api_key", _checked_key(key) if key else "none")
        object.__setattr__(self, "options", dict(self.options))  # a copy: the caller's may change
        object.__setattr__(self, "_answers", Answers(self.cache_size))

    @property
    def name(self) -> str:
        """What the ratings depend on, as a search's state keeps it: model, question, range and what else was set."""
        options = f", options {dict(sorted(self.options.items()))}" if self.options else ""
        return f"{self.model}, {_shown(self.low)} to {_shown(self.high)} for {self.question!r}{options}"

    def cache_info(self) -> CacheInfo:
        """How many images were known, and how many the model was asked about."""
        return self._answers.info()

    def __call__(
        self,
        images: Tensor,  # [n, 3, H, W] in [-1, 1], any float dtype and device
        prompt: str,
    ) -> Tensor:  # [n] fp64, on the CPU
        """One rating for each image. What was answered before an error is kept: the next call goes on from there."""
        check_images(images, prompt)
        question = self._with_range(self.question).replace("{prompt}", prompt)
        pictures = to_pil(images)
        keys = [_digest(picture, question) for picture in pictures]
        known = self._answers.find(keys)
        unknown = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in known}

        def rate(item: tuple[bytes, "Image"]) -> tuple[bytes, float]:
            key, picture = item
            score = self._rate(picture, question)
            self._answers.keep(key, score)
            return key, score

        if len(unknown) > 1 and self.concurrency > 1:
            with ThreadPoolExecutor(min(self.concurrency, len(unknown))) as threads:
                known.update(threads.map(rate, unknown.items()))  # the first error cancels what has not begun
        else:
            known.update(map(rate, unknown.items()))
        return torch.tensor([known[key] for key in keys], dtype=torch.float64, device="cpu")

    def _rate(self, picture: "Image", question: str) -> float:
        """The number in the model's answer. Raises ValueError where `attempts` answers have none."""
        image = {"type": "image_url", "image_url": {"url": png_data_uri(picture)}}
        messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        for attempt in range(1, self.attempts + 1):
            answer = self._answer(messages)
            try:
                return read_number(answer, self.low, self.high)
            except ValueError as error:
                if attempt == self.attempts:
                    raise ValueError(
                        f"{self._who} gave no rating in {attempt} answers: {self._without_key(str(error))}; "
                        "ask a plainer question, or a model that sees images"
                    ) from None
            messages += [{"role": "assistant", "content": answer}] if answer else []
            messages += [{"role": "user", "content": self._with_range(AGAIN)}]
        raise AssertionError("attempts is at least 1")

    def _answer(self, messages: list[Any]) -> str:
        """The text of the model's answer ("": none). The errors say who did not answer; none shows the key."""
        import openai

        fields = {name: value for name, value in {**SETTINGS, **self.options}.items() if value is not None}
        tries = f"in {self.max_retries + 1} tries"
        try:
            # As extra fields, because the client's own arguments are not those of every server.
            done = self._client.chat.completions.create(model=self.model, messages=messages, extra_body=fields)
        except openai.APITimeoutError:
            raise TimeoutError(f"{self._who} did not answer within {self.timeout:g} s, {tries}") from None
        except openai.APIConnectionError as error:
            reason = self._without_key(str(error.__cause__ or error))
            raise ConnectionError(
                f"{self._who} cannot be reached, {tries} ({reason}): is the server running, and base_url right?"
            ) from None
        except openai.APIStatusError as error:
            said = f"answered {error.status_code}: {self._without_key(error.message)}"
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise ConnectionError(f"{self._who} {said}, {tries}") from None
            raise ValueError(f"{self._who} {said}; check model, base_url, api_key and options") from None
        except ValueError:  # what came is no JSON
            done = None
        try:
            text, finish = done.choices[0].message.content or "", done.choices[0].finish_reason  # type: ignore[union-attr]
        except (AttributeError, IndexError, TypeError):  # a web page, or another program's JSON
            raise ValueError(
                f"{self._who}: what answers there is no OpenAI-compatible server; base_url mostly ends in /v1"
            ) from None
        if finish == "length":
            raise ValueError(f"{self._who} did not end its answer: raise max_tokens in options")
        return text

    @cached_property
    def _client(self) -> "OpenAI":
        from openai import OpenAI

        return OpenAI(api_key=self._key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries)

    @property
    def _key(self) -> str:
        return vars(self)["api_key"]

    @property
    def _who(self) -> str:
        return f"the model {self.model!r} at {self.base_url}"

    def _with_range(self, text: str) -> str:
        return text.replace("{low}", _shown(self.low)).replace("{high}", _shown(self.high))

    def _without_key(self, text: str) -> str:
        """The text's beginning; a server may send back the key that it was sent."""
        return text.replace(self._key, "(the API key)").strip()[:300] if self._key != "none" else text[:300]

    def __getstate__(self) -> dict[str, Any]:  # a copy has a client of its own
        return {name: value for name, value in vars(self).items() if name != "_client"}


class Answers:
    """The last `size` answers, by key; safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self.size, self.hits, self.misses = size, 0, 0
        self._scores: OrderedDict[bytes, float] = OrderedDict()  # the one used most recently last
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # a copy is empty: a lock cannot be copied
        return Answers, (self.size,)

    def find(self, keys: list[bytes]) -> dict[bytes, float]:
        """Those that are kept. A key that stands twice in `keys` is asked about once."""
        with self._lock:
            found = {key: self._scores[key] for key in keys if key in self._scores}
            for key in found:
                self._scores.move_to_end(key)
            asked = len(set(keys) - found.keys())
            self.misses += asked
            self.hits += len(keys) - asked
        return found

    def keep(self, key: bytes, score: float) -> None:
        with self._lock:
            self._scores[key] = score
            self._scores.move_to_end(key)
            while len(self._scores) > self.size:
                self._scores.popitem(last=False)

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(self.hits, self.misses, len(self._scores))


def png_data_uri(picture: "Image") -> str:
    """The picture as a data URI of a PNG, which keeps each pixel as it is."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def read_number(answer: str, low: float, high: float) -> float:
    """The number in a model's answer; see `VLMReward`. Raises ValueError for none, several, or one out of the range."""
    text = answer.rpartition("</think>")[2].replace("*", "").strip()
    least, most = re.escape(_shown(low)), rf"{re.escape(_shown(high))}(?:\.0+)?(?!\w|[.,]\d)"
    text = re.sub(rf"(?<![\w.,]){least}\s*(?:[-\u2013]|to)\s*{most}", "", text)  # "(0-10)"
    text = re.sub(rf"(?<=\d)\s*(?:/|out\s+of)\s*{most}", "", text)
    numbers = re.findall(NUMBER, text)
    shown = repr(answer if len(answer) <= 200 else f"{answer[:80]} ... {answer[-100:]}")
    if len(numbers) > 1 and (last := LAST_WORD.fullmatch(text.splitlines()[-1])):
        numbers = [last[1]]
    if len(numbers) != 1:
        raise ValueError(f"{'several numbers' if numbers else 'no number'} in the answer {shown}")
    score = float(numbers[0].replace(",", ".").replace("\u2212", "-"))
    if not low <= score <= high:
        raise ValueError(f"{_shown(score)} is not between {_shown(low)} and {_shown(high)}, in the answer {shown}")
    return score


def _shown(number: float) -> str:
    return f"{number:.15g}"


def _digest(picture: "Image", question: str) -> bytes:
    digest = hashlib.sha256(repr((picture.size, question)).encode())
    digest.update(picture.tobytes())
    return digest.digest()


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_url(url: Any) -> None:
    """Raises ValueError for what is no server's address, without showing what may be a password."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        server = False
    if isinstance(url, str) and "@" in url:
        raise ValueError("base_url must hold no user or password: give the server's key as api_key")
    if not server:
        raise ValueError(f'base_url must be the address of a server, as "http://localhost:8000/v1"; got {url!r}')


def _checked_key(key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "api_key: the API key must be letters, digits and signs alone: it has a space, a line's end or another"
        )
    return key
