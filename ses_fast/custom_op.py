"""How a function that fills tensors becomes an operator of torch."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def operator(*outputs: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function that fills its arguments `outputs` an operator `ses_fast::<name>`, opaque to torch.compile.

    The fake does nothing, because outputs are arguments. Outside of compilation the function is called as it is: an
    operator's dispatch costs more than the smaller kernels take. The operator itself is at `.operator`.
    """

    def make(fill: Callable[..., None]) -> Callable[..., None]:
        @wraps(fill)
        def guarded(*args: Any) -> None:
            # Not every backend of torch.compile sets the device for an operator; eagerly `ops.py` has done so.
            with torch.cuda.device_of(next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))):
                fill(*args)

        op = torch.library.custom_op(f"ses_fast::{fill.__name__}", guarded, mutates_args=outputs)
        op.register_fake(lambda *args: None)

        @wraps(fill)
        def call(*args: Any) -> None:
            if torch.compiler.is_compiling():
                op(*args)
            else:
                fill(*args)

        call.operator = op  # type: ignore[attr-defined]
        return call

    return make
