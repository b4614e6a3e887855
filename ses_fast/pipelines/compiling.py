"""torch.compile of a pipeline's repeated blocks, its undoing, and the seconds that it takes."""

import functools
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..stopwatch import device_clock

# What `enable` takes for compile -> torch.compile's mode. CUDA graphs would hold one graph's memory per shape.
COMPILE_MODES: dict[bool | str, str] = {
    True: "default",
    "default": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
# A block has a graph for every image size and number of candidates, and each of these again for every state that VRAM
# management and hot-loaded LoRAs give it. Past dynamo's recompile_limit, 8, it would run uncompiled. At 256 there is
# dynamo's accumulated_recompile_limit: more would be of no use.
MOST_GRAPHS = 256
NOTE = "_ses_compiled"  # the pipeline's attribute that holds a `Compiled`

# What of a block's inputs (by name) grows with the prompt: each tensor (None where it is not given) with the dimension
# that grows. None for all: every prompt is padded to one length.
GrowsWithPrompt = Callable[[Mapping[str, Any]], Sequence[tuple[Tensor | None, int]]]


@dataclass
class Compiled:
    """What `compile_blocks` did to a pipeline."""

    mode: str
    models: list[Any]
    changed: list[tuple[Any, Any]]  # each block, and what it was compiled to before


def compile_mode(compile: bool | str) -> str | None:
    """What torch.compile calls it; None for no compilation. Raises ValueError for what is none of `COMPILE_MODES`."""
    if compile is False:
        return None
    if isinstance(compile, bool | str) and compile in COMPILE_MODES:
        return COMPILE_MODES[compile]
    modes = ", ".join(map(repr, [False, *COMPILE_MODES]))
    raise ValueError(f"compile must be one of {modes}; got {compile!r}")


def compile_blocks(pipe: Any, grows_with_prompt: GrowsWithPrompt | None, mode: str) -> None:
    """Compiles the repeated blocks of the pipeline's models in place, as `pipe.compile_pipeline()` does.

    Shapes are static except for the prompt's length: another image size or another number of previews together (CFG may
    double it) compiles anew, another prompt does not. Z-Image's blocks take image and prompt as one sequence, so there
    another image size does not compile anew either. Does nothing where it was done; another mode, or a model that was
    replaced, is compiled anew. Raises ValueError where there is nothing to compile.
    """
    models = [getattr(pipe, name, None) for name in getattr(pipe, "compilable_models", ())]
    compile_models(pipe, models, functools.partial(pipe.compile_pipeline, dynamic=False), grows_with_prompt, mode)


def compile_models(
    pipe: Any,
    models: list[Any],
    compile: Callable[..., Any],
    grows_with_prompt: GrowsWithPrompt | None,
    mode: str,
) -> None:
    """Compiles blocks of `models` in place by `compile`, which takes torch.compile's arguments."""
    done = compilation(pipe)
    if done is not None and done.mode == mode and all(a is b for a, b in zip(done.models, models, strict=True)):
        return
    undo_compilation(pipe)
    parts = [module for model in models if model is not None for module in model.modules()]
    before = [(module, module._compiled_call_impl) for module in parts]
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_GRAPHS
    else:  # torch 2.11 has one for the whole process; it stays raised after `disable`
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    compile(mode=mode, **limit)
    changed = [(module, was) for module, was in before if module._compiled_call_impl is not was]
    if not changed:
        raise ValueError("the pipeline has no model to compile: load its dit first, or leave compile out")
    if grows_with_prompt is not None:
        for block, _ in changed:
            block._compiled_call_impl = _for_any_prompt(block, grows_with_prompt)
    setattr(pipe, NOTE, Compiled(mode, models, changed))


def compilation(pipe: Any) -> Compiled | None:
    """What `compile_blocks` left, if it still holds: a copy of the pipeline may have no compiled blocks."""
    done: Compiled | None = vars(pipe).get(NOTE)
    return done if done and all(module._compiled_call_impl is not None for module, _ in done.changed) else None


def undo_compilation(pipe: Any) -> None:
    """Gives every block what it was compiled to before."""
    done = compilation(pipe)
    vars(pipe).pop(NOTE, None)
    for module, before in done.changed if done else ():
        module._compiled_call_impl = before


def _for_any_prompt(block: Any, grows_with_prompt: GrowsWithPrompt) -> Callable[..., Any]:
    """What `block` was compiled to, with the prompt's length marked as one that changes."""
    compiled = block._compiled_call_impl
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor, dimension in grows_with_prompt({**dict(zip(names, args, strict=False)), **kwargs}):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        return compiled(*args, **kwargs)

    return call


class CompileClock:
    """Seconds, when the device has done what it was given; as a context it stands still while dynamo compiles.

    compiling: the seconds that compilations took, whoever asked for them. Where dynamo is not loaded nothing compiles.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.compiling = 0.0
        self._began = 0.0

    def __call__(self) -> float:
        return device_clock(self.device) - self.compiling

    def __enter__(self) -> Self:
        self._handler = None
        if "torch._dynamo" in sys.modules:
            from torch._dynamo.callback import callback_handler

            self._handler = callback_handler
            self._handler.register_start_callback(self._start)
            self._handler.register_end_callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            self._handler.remove_start_callback(self._start)
            self._handler.remove_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.compiling += time.perf_counter() - self._began
