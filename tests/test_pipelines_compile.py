"""`enable(pipe, compile=True)`: what is compiled, how often, and that `disable` undoes it."""

import functools

import numpy as np
import pytest
import torch

import ses_fast
from ses_fast import SESConfig
from ses_fast._torchvision import mend_torchvision

mend_torchvision()

from tiny import brightness, tiny_flux, tiny_flux2, tiny_qwen_image, tiny_z_image  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

MAKE = {"Z-Image": tiny_z_image, "FLUX.1": tiny_flux, "FLUX.2-dev": tiny_flux2, "Qwen-Image": tiny_qwen_image}
PROMPTS = ["a red fox" + " and a dog" * i for i in range(20)]
# 20 tokens. Where one size of the tiny models happens to equal another (16 tokens, 16 channels of a head), dynamo takes
# the two for one and compiles once more when only one of them changes.
BASE = {"prompt": "a red fox", "height": 64, "width": 80, "num_inference_steps": 2, "seed": 3}
BASE |= {"cfg_scale": 3.0, "progress_bar_cmd": lambda steps: steps}
SES = {"enable_ses": True, "ses_reward_model": brightness, "ses_inference_steps": 2, "ses_eval_budget": 7}
SES["ses_config"] = SESConfig(
    progress=False, popsize=4, k_elites=2, batch_size=4
)  # batches of 4, 3 and the final image

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def traced(family):
    """An enabled pipeline compiled without a code generator: dynamo's graphs and guards are the same, and quick."""
    pipe = MAKE[family]()
    pipe.compile_pipeline = functools.partial(pipe.compile_pipeline, backend="eager")
    return ses_fast.enable(pipe, compile=True)


@pytest.mark.parametrize(
    "family", ["Z-Image", *(pytest.param(f, marks=slow) for f in ("FLUX.1", "FLUX.2-dev", "Qwen-Image"))]
)
def test_no_new_graph_after_the_first_call_whatever_the_prompt(family, recwarn):
    pipe = traced(family)
    pipe(**BASE | SES)
    seconds, first = dict(pipe.ses_result.seconds), graphs()
    total = seconds.pop("total")
    assert 0 < first <= 8 and seconds["compile"] > 0.5 * total and min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(total, rel=0.05)
    for prompt in PROMPTS:
        pipe(**BASE | SES | {"prompt": prompt})
        assert pipe.ses_result.seconds["compile"] == 0
    pipe(**BASE | SES | {"height": 80, "width": 48})
    assert graphs() == first and not [w for w in recwarn if "recompile" in str(w.message)]


@pytest.mark.parametrize("family", ["Z-Image"])
def test_disable_clears_what_was_compiled_and_only_that(family):
    pipe = MAKE[family]()
    own = pipe.dit.layers[0]
    own.compile(backend="eager")
    mine, stock = own._compiled_call_impl, np.asarray(pipe(**BASE))

    def compiled():
        return [module for module in pipe.modules() if module._compiled_call_impl is not None]

    pipe.compile_pipeline = functools.partial(pipe.compile_pipeline, backend="eager")
    ses_fast.enable(pipe, compile=True)
    blocks = [m for m in pipe.dit.modules() if type(m).__name__ in pipe.dit._repeated_blocks]
    assert compiled() == blocks and own._compiled_call_impl is not mine
    ses_fast.enable(ses_fast.enable(pipe), compile=True)
    ses_fast.disable(pipe)
    assert compiled() == [own] and own._compiled_call_impl is mine
    assert np.array_equal(np.asarray(pipe(**BASE)), stock)


@pytest.mark.parametrize(
    "compile, mode",
    [(True, "default"), ("default", "default"), ("max-autotune", "max-autotune-no-cudagraphs"), (False, None)],
)
def test_modes(compile, mode, monkeypatch):
    pipe, asked = tiny_z_image(), []
    monkeypatch.setattr(type(pipe.dit.layers[0]), "compile", lambda block, **options: asked.append(options["mode"]))
    if mode is None:
        ses_fast.enable(pipe, compile=compile)
    else:
        with pytest.raises(ValueError, match="no model to compile"):  # the monkeypatch compiled nothing
            ses_fast.enable(pipe, compile=compile)
    assert set(asked) == ({mode} if mode else set())


@pytest.mark.parametrize("compile", ["fast", 1, None, "reduce-overhead"])
def test_another_mode_raises_before_anything_is_done(compile):
    pipe = tiny_z_image()
    with pytest.raises(ValueError, match="compile must be one of False, True, 'default', 'max-autotune'"):
        ses_fast.enable(pipe, compile=compile)
    assert type(pipe).__mro__[0].__module__.startswith("diffsynth") and not hasattr(pipe, "ses_result")


@slow
@pytest.mark.parametrize("family", MAKE)
def test_compiled_equals_the_stock_pipe_compiled_and_plain_to_rounding(family):
    stock = MAKE[family]()
    plain = np.asarray(stock(**BASE)).astype(int)
    stock.compile_pipeline()
    compiled = np.asarray(stock(**BASE)).astype(int)
    pipe = ses_fast.enable(MAKE[family](), compile=True)
    assert np.array_equal(np.asarray(pipe(**BASE)).astype(int), compiled)
    assert abs(compiled - plain).max() <= 1  # of 255
    seen = {}
    for name, one in (("plain", ses_fast.enable(MAKE[family]())), ("compiled", pipe)):
        images = []
        config = SESConfig(
            progress=False, popsize=4, batch_size=4, on_preview=lambda x, *_, images=images: images.append(x)
        )
        one(**BASE | SES | {"ses_config": config})
        seen[name] = torch.cat(images)
    torch.testing.assert_close(seen["compiled"], seen["plain"], rtol=0, atol=1e-4)
    assert pipe.ses_result.seconds["compile"] > 0
