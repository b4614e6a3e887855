"""What a family of DiffSynth's pipelines has of its own. Z-Image's is in `z_image.py`, and so on."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..compiling import GrowsWithPrompt


class Family:
    """How a family's candidates go through its models together, and what SES cannot go with."""

    decoder = "vae_decoder"  # the pipeline's attribute
    model_fn: Callable[..., Tensor]  # the stock `pipe.model_fn`
    takes: frozenset[str]  # its inputs
    together: frozenset[str]  # those that may be given where several candidates go at once
    text: tuple[str, ...] = ()  # those of `together` that CFG's two sides can share a batch by: [1, ...] each
    refused: dict[str, str] = {}  # arguments of the call that SES cannot go with, and why
    grows_with_prompt: GrowsWithPrompt | None = None  # what of a compiled block's inputs is longer for a longer prompt

    def forward_together(self, *args: Any, **inputs: Any) -> Tensor:
        """Predicts for n candidates as `latents` what `pipe.model_fn` does for each alone."""
        raise NotImplementedError

    def decode(
        self,
        pipe: Any,
        latents: Tensor,  # [n, C, h, w]
        shared: dict[str, Any],
    ) -> Tensor:  # [n, 3, H, W]
        """The decoder's output, as the pipeline's own call decodes."""
        raise NotImplementedError

    def unpack(
        self,
        noise: Tensor,  # [1, ...] as the pipeline has it
        shared: dict[str, Any],
    ) -> Tensor:  # [1, C, h, w], to search in
        return noise

    def pack(
        self,
        noises: Tensor,  # [n, C, h, w]
    ) -> Tensor:  # [n, ...] as the pipeline has them
        return noises

    def for_previews(self, shared: dict[str, Any]) -> dict[str, Any]:
        """The call's inputs, without what only the final image may have."""
        return shared

    def begun(self, shared: dict[str, Any]) -> dict[str, Any]:
        """The inputs for a new image: what counts its steps begins anew."""
        return shared

    def model_fn_together(self, pipe: Any, inputs: dict[str, Any]) -> Callable[..., Tensor] | None:
        """`forward_together`; None where model_fn is wrapped or takes an input that is made for one image."""
        given = {name for name in self.takes if inputs.get(name) is not None and inputs[name] is not False}
        stock = pipe.model_fn is self.model_fn
        return self.forward_together if stock and given <= self.together else None
