"""What renderers made, kept and given again: searches that look at one noise make its image once.

For comparisons, whose methods and tasks begin with the same noises. Kept is a batch's whole work by a digest of all
that it depends on, so that a search finds, bit for bit, what it would have made itself.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from ..digests import digest, digest_of_tensor
from .renderer import Draft, Renderer
from .request import Request

MOST_BYTES = 2**30  # that are kept
# What a renderer is: see `Renderer`.
FACTS = (
    *("steps", "model", "device", "sigmas", "in_one_go", "forwards_a_step"),
    *("largest_denoise", "largest_decode", "static_shapes", "models_take_turns"),
)
Work = TypeVar("Work", Tensor, Draft)


class Kept:
    """The work of renderers, by its key; what was not asked for the longest goes first where there is too much.

    most: bytes. reused: how many times work was given again.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most, self.size, self.reused = most, 0, 0
        self._work: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def get(self, key: tuple[Any, ...], make: Callable[[], Work]) -> Work:
        """What `make` gives, or gave before under this key; the caller's to write on."""
        if key in self._work:
            self._work.move_to_end(key)
            self.reused += 1
            return _copy(self._work[key])
        made: Work = make()
        self._work[key] = _copy(made)
        self.size += _bytes(made)
        while self.size > self.most:
            self.size -= _bytes(self._work.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        self._work.clear()
        self.size = 0


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def sharing(kept: Kept) -> Iterator[Kept]:
    """Searches inside use `kept`, and put there what they make. Their seconds are then not those of their work."""
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def shared(renderer: Renderer, request: Request, role: str) -> Renderer:
    """The renderer itself, or inside `sharing` one that makes nothing twice, where it is `repeatable`.

    role: what it renders of the request: "preview" or "final".
    """
    kept = _kept.get()
    if kept is None or not renderer.repeatable:
        return renderer
    cheap = request.config.preview if role == "preview" else None
    call = {name: request.fingerprint.get(name) for name in ("pipeline", "arguments")}
    about = (request.prompt, request.seed, json.dumps(call), role, renderer.steps, cheap and (cheap.scale, cheap.cfg))
    return _Sharing(renderer, kept, about)


class _Sharing(Renderer):
    """A renderer whose work is kept. about: what that depends on beside its arguments."""

    def __init__(self, renderer: Renderer, kept: Kept, about: tuple[Any, ...]) -> None:
        self.renderer, self.kept, self.about = renderer, kept, about
        for name in FACTS:
            setattr(self, name, getattr(renderer, name))

    def prepare(self, stage: str) -> None:
        self.renderer.prepare(stage)

    def save_memory(self) -> bool:
        saved = self.renderer.save_memory()
        if saved:
            self.kept.clear()  # from now on it makes the same up to rounding
        return saved

    def begin(self, noises: Tensor) -> Draft:
        return self.renderer.begin(noises)

    def advance(self, draft: Draft, to: int) -> Draft:
        key = (*self.about, draft.step, to, _key(draft.latents, *draft.history))
        return self.kept.get(key, lambda: self.renderer.advance(draft, to))

    def decode(self, latents: Tensor) -> Tensor:
        return self.kept.get((*self.about, "image", _key(latents)), lambda: self.renderer.decode(latents))


def _tensors(work: Tensor | Draft) -> tuple[Tensor, ...]:
    if isinstance(work, Tensor):
        return (work,)
    return (work.latents, *work.history, *(() if work.clean is None else (work.clean,)))


def _bytes(work: Tensor | Draft) -> int:
    return sum(part.numel() * part.element_size() for part in _tensors(work))


def _copy(work: Any) -> Any:
    if isinstance(work, Tensor):
        return work.clone()
    clean = None if work.clean is None else work.clean.clone()
    return replace(
        work, latents=work.latents.clone(), history=tuple(part.clone() for part in work.history), clean=clean
    )


def _key(*tensors: Tensor) -> str:
    return digest(*((part.stride(), digest_of_tensor(part)) for part in tensors))  # a layout may change the rounding
