"""Scores as callables return them: a float for one image, a sequence, an array or a tensor."""

from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def as_scores(value: Any, n: int, who: str, device: torch.device | str = "cpu") -> Tensor:  # [n] fp64
    """What `who` ("the objective", "reward 'pick'") returned for n candidates, on `device`.

    value: a tensor or an array of n, a sequence of n numbers, or one number where n is 1. The result is always a
    copy, because the callable may write on its own tensor again. Does not wait for the device. Raises ValueError
    for anything else.
    """
    if isinstance(value, float) and n == 1:  # most scores: the short way
        return torch.tensor([value], dtype=torch.float64, device=device)
    given = value.detach() if isinstance(value, Tensor) else _numbers(value, n, who)
    scores = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64, device=device)
    if scores.is_complex() or not (scores.shape == (n,) or scores.numel() == n == 1):
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(f"{who} must return {n} scores, shape ({n},), for {n} candidates; got {got}")
    return scores.reshape(n).to(device, torch.float64, copy=scores is given)


def _numbers(value: Any, n: int, who: str) -> list[float]:
    try:
        # A NumPy array of no dimensions is one number too.
        values = [value] if isinstance(value, Real) or getattr(value, "ndim", None) == 0 else value
        if isinstance(values, str | bytes | Mapping | Set):  # float() would read them, or their parts, as numbers
            raise TypeError(f"no scores: {value!r}")
        values = list(values)
        if any(isinstance(each, str | bytes) for each in values):
            raise TypeError(f"no scores: {value!r}")
        return [float(each) for each in values]
    except (TypeError, ValueError, OverflowError) as error:
        what = type(value).__name__
        raise ValueError(f"{who} must return {n} numbers, as a tensor or a sequence; got {what}") from error
