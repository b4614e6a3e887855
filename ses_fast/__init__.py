"""Spectral Evolution Search for text-to-image models (arXiv 2602.03208).

Only the public names. Each is loaded when it is first used, so `import ses_fast` costs nothing and needs no
optional package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import batch, distributed, embedded, ops
    from .loop import evolve, search
    from .ops import set_backend
    from .pipelines import Preview, SESConfig, disable, enable
    from .result import SearchResult
    from .rewards import load_reward, unload_rewards

__version__ = "0.1.0"
__all__ = [
    "Preview",
    "SESConfig",
    "SearchResult",
    "batch",
    "disable",
    "distributed",
    "embedded",
    "enable",
    "evolve",
    "load_reward",
    "ops",
    "search",
    "set_backend",
    "unload_rewards",
]

_MODULE_OF = {
    "Preview": "pipelines",
    "SESConfig": "pipelines",
    "SearchResult": "result",
    "disable": "pipelines",
    "enable": "pipelines",
    "evolve": "loop",
    "load_reward": "rewards",
    "search": "loop",
    "set_backend": "ops",
    "unload_rewards": "rewards",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MODULE_OF:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
