"""The class that an enabled pipeline has before its own, whatever the library."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..result import SearchResult
from .compiling import NOTE
from .request import facts


class Enabled:
    """What the documented call of every library has in common; a library's class adds `__call__`.

    Its keyword-only parameters are shown behind the stock call's own.
    """

    ses_result: SearchResult | None = None
    _ses_stock: type  # the pipeline's own class

    def __getstate__(self) -> Any:
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != NOTE}  # it is of the original's blocks

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here, so that its name leads to the stock one: a copy makes it again.
        ours = next(each for each in type(self).__mro__[1:] if issubclass(each, Enabled))
        reduced: Any = super().__reduce_ex__(protocol)
        return _remake, (ours, self._ses_stock), *reduced[2:]


@functools.cache
def enabled_class(ours: type, stock: type) -> type:
    """`stock` with the documented call of `ours`."""
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    call = _documented(ours.__call__, stock.__call__)
    return type(stock.__name__, (ours, stock), names | {"_ses_stock": stock, "__call__": call})


def facts_of(bound: inspect.BoundArguments, without: frozenset[str]) -> dict[str, Any]:
    """A call's arguments as JSON, but some; one that was left out counts as its default."""
    return facts({name: value for name, value in arguments_of(bound).items() if name not in without})


def arguments_of(bound: inspect.BoundArguments) -> Mapping[str, Any]:
    """All arguments of a call by name, its defaults and what it takes as **kwargs included."""
    bound = inspect.BoundArguments(bound.signature, dict(bound.arguments))
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    return arguments


def _remake(ours: type, stock: type) -> Any:
    return object.__new__(enabled_class(ours, stock))


def _documented(our_call: Callable, stock_call: Callable) -> Callable:
    """`our_call` under a signature that shows the stock parameters and the new ones."""

    @functools.wraps(our_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return our_call(self, *args, **kwargs)

    own = inspect.signature(our_call).parameters.values()
    stock = list(inspect.signature(stock_call).parameters.values())
    rest = [stock.pop()] if stock[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    new = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    signature = inspect.Signature([*stock, *new, *rest])
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    return __call__
