"""The least time a search can take on a device: `python -m bench.floor [family ...] --device h100`.

Counts the work of each stage on the real modules, without running them (the meta device): floating-point operations of
matrix products, convolutions and attention, and the bytes that have to move (each weight, input and output once). A
stage takes at least the longer of operations / matrix rate and bytes / memory rate. Everything between the matrix
products counts as free, so nothing reaches this floor.

--device h100, h200: rates from below; measured: of this machine's GPU, or CPU, measured first.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import clock, environment
from ses_fast.cpu import fast_linears

POPSIZE = 10
STAGES = ("denoise", "decode", "reward", "preprocess", "population")


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    matrix: float  # operations of a large matrix product, bf16 (on a CPU fp32)
    memory: float  # bytes read and written by a large copy
    attention: float | None = None  # operations of scaled_dot_product_attention; None: as matrix


RATES = {
    "h100": Rates(790e12, 3.0e12),  # both measured on one
    "h200": Rates(
        790e12, 4.3e12
    ),  # not measured: the H100's cores, and as much of the published 4.8 TB/s as it reached
}


@dataclass(frozen=True)
class Work:
    """What one candidate costs in one stage."""

    operations: float
    attention: float  # of these, in attention
    weights: float  # bytes, read once a batch
    traffic: float  # bytes in and out, for each candidate

    def seconds(self, rates: Rates, batch: int = 1) -> float:
        """The least time for a candidate among `batch` that are done together."""
        rest = (self.operations - self.attention) / rates.matrix
        compute = rest + self.attention / (rates.attention or rates.matrix)
        return max(compute, (self.weights / batch + self.traffic) / rates.memory)

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * value for value in (self.operations, self.attention, self.weights, self.traffic)))


def count(call: Callable[[], Any], traffic: float) -> Work:
    """The work of a call; `traffic` are the bytes of its inputs and outputs."""
    with FlopCounterMode(display=False) as counter, _Noted() as noted, torch.no_grad():
        call()
    return Work(counter.get_total_flops() + noted.attention, noted.attention, sum(noted.weights.values()), traffic)


class _Noted(TorchFunctionMode):
    """Notes the parameters that are used, and attention by its shapes, in place of computing it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self.weights: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                self.weights[id(leaf)] = leaf.numel() * leaf.element_size()
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            *heads, queries, width = query.shape
            self.attention += 2 * torch.Size(heads).numel() * queries * key.shape[-2] * (width + value.shape[-1])
            return query.new_zeros(*heads, queries, value.shape[-1])
        return func(*args, **kwargs)


def stages(pipe: Any, clip: nn.Module, call: dict[str, Any], popsize: int = POPSIZE) -> dict[str, Work]:
    """The work of one preview of `pipe(prompt, **call)` by stage. The modules may be on the meta device."""
    from diffsynth.core.attention import attention

    from bench.baseline import Flow

    chosen, attention.ATTENTION_IMPLEMENTATION = attention.ATTENTION_IMPLEMENTATION, "torch"  # the one that is counted
    try:
        flow = Flow(pipe, "", seed=0, progress_bar_cmd=list, **call)
        noise = flow.base
        item, pixels = noise.element_size(), noise.numel()
        prompt = sum(leaf.numel() * item for leaf in tree_leaves(flow.posi) if isinstance(leaf, Tensor))
        step = count(lambda: flow.denoise(noise, 1), 2 * item * pixels + prompt)
        image = flow.decode(flow.denoise(noise, 0))
        decode = count(lambda: flow.decode(flow.denoise(noise, 0)), item * (pixels + image.numel()))
    finally:
        attention.ATTENTION_IMPLEMENTATION = chosen
    reward, nbytes = reward_work(clip)
    # The base is read once a generation, in fp32; a candidate is written once, in the pipeline's dtype.
    return {
        "denoise": step * len(pipe.scheduler.timesteps),
        "decode": decode,
        "reward": reward,
        "preprocess": Work(0, 0, 0, image.numel() * item + nbytes),
        "population": Work(0, 0, 4 * pixels / popsize, item * pixels),
    }


def reward_work(clip: nn.Module) -> tuple[Work, int]:
    """The work of a CLIPModel for one image, and the bytes that it reads of it."""
    size = clip.config.vision_config.image_size
    weight = next(clip.parameters())
    seen = torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype)
    nbytes = seen.numel() * weight.element_size()
    return count(lambda: clip.get_image_features(pixel_values=seen), nbytes), nbytes


def family_stages(name: str, **call: Any) -> dict[str, Work]:
    """The stages of a family of bench.families, or of the embedded model, with other arguments of the call."""
    if name == "embedded":
        from ses_fast import embedded

        pipe, reward = embedded.load_pipeline(), embedded.load_reward(device="cpu")
        return stages(pipe, reward.model, {"num_inference_steps": 8, **call})
    from bench.clip import clip_h
    from bench.families import FAMILIES, build

    family = FAMILIES[name]
    return stages(build(family, "meta"), clip_h("meta"), {**family.call, **call})


def measured(device: torch.device | str) -> Rates:
    """The best rates of this machine's device: of many runs the fastest, since a floor is what nothing passes."""
    cuda = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32

    def fastest(call: Callable[[], Any], rounds: int = 20 if cuda else 100) -> float:
        times = []
        for _ in range(rounds):
            begin = clock(device)
            call()
            times.append(clock(device) - begin)
        return min(times)

    n = 8192 if cuda else 512  # on a CPU short enough to be done between two turns of other processes
    layer = nn.Linear(n, n, bias=False, device=device, dtype=dtype)
    inputs = torch.randn(n, n, device=device, dtype=dtype)
    # Written first: pages that never were are all one page of zeros, in cache.
    source = torch.ones(2**31 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    query = torch.randn(1, 24 if cuda else 3, 4608 if cuda else 512, 128 if cuda else 64, device=device, dtype=dtype)
    length = query.shape[-2]
    with torch.no_grad(), fast_linears(layer):  # as previews run them
        matrix = 2 * n**3 / fastest(lambda: layer(inputs))
    return Rates(
        matrix=matrix,
        memory=2 * source.numel() / fastest(lambda: target.copy_(source)),
        attention=4 * query.numel() * length / fastest(lambda: F.scaled_dot_product_attention(query, query, query)),
    )


def table(rows: dict[str, dict[str, Work]], rates: Rates, batch: int, budget: int) -> str:
    """A Markdown table, one line a family."""
    lines = [
        "| per candidate | denoise ms | decode ms | reward ms | preprocess us | population us | attention of denoise "
        f"| x{budget}, s |",
        "|---" * 8 + "|",
    ]
    for name, works in rows.items():
        seconds = {stage: work.seconds(rates, batch) for stage, work in works.items()}
        scales = (1e3, 1e3, 1e3, 1e6, 1e6)
        cells = [short(scale * seconds[stage]) for stage, scale in zip(STAGES, scales, strict=True)]
        cells.append(f"{works['denoise'].attention / works['denoise'].operations:.0%}")
        lines.append(f"| {name} | " + " | ".join([*cells, short(budget * sum(seconds.values()))]) + " |")
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    from bench.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}, embedded; all but the last when none")
    parser.add_argument("--device", default="h100", choices=[*RATES, "measured"])
    parser.add_argument("--batch", type=int, default=1, help="candidates denoised together")
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--size", type=int, help="pixels of each side; the family's own when not given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg", type=float, help="cfg_scale; two forwards a step where it is not 1")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.families) - {*FAMILIES, "embedded"}:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}, embedded")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = measured(device) if arguments.device == "measured" else RATES[arguments.device]
    call = {"height": arguments.size, "width": arguments.size, "num_inference_steps": arguments.steps}
    call = {key: value for key, value in (call | {"cfg_scale": arguments.cfg}).items() if value is not None}
    rows = {name: family_stages(name, **call) for name in arguments.families or FAMILIES}
    print(f"At {rates.matrix / 1e12:.4g} TFLOP/s and {rates.memory / 1e12:.4g} TB/s", end="")
    print(f", attention at {rates.attention / 1e12:.4g} TFLOP/s:\n" if rates.attention else ":\n")
    print(table(rows, rates, arguments.batch, arguments.budget))
    if arguments.out:
        found = {name: {stage: vars(work) for stage, work in works.items()} for name, works in rows.items()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        head = {"environment": environment(device), "device": arguments.device, "rates": vars(rates)}
        arguments.out.write_text(json.dumps({**head, "batch": arguments.batch, "families": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
