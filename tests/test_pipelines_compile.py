"""`enable(pipe, compile=True)`: what is compiled, how often, and that `disable` undoes it."""

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MAKE, brightness, manage_vram, tiny_z_image
from torch._dynamo.utils import counters

import ses_fast
from ses_fast import SESConfig
from ses_fast.pipelines.compiling import MOST_GRAPHS

PROMPTS = ["a red fox" + " and a dog" * i for i in range(20)]
BASE = {"prompt": "a red fox", "height": 64, "width": 80, "num_inference_steps": 2, "seed": 3}
BASE |= {"cfg_scale": 3.0, "progress_bar_cmd": lambda steps: steps}
SES = {"enable_ses": True, "ses_reward_model": brightness, "ses_inference_steps": 2, "ses_eval_budget": 7}
SES["ses_config"] = SESConfig(
    progress=False, popsize=4, k_elites=2, batch_size=4
)  # a batch of 4, one of 3 that is filled up, and the final image

TOLERANCE = 1e-4  # compiled against not, of pixels in [-1, 1] and their mean

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """How many there are; past the limit dynamo makes no more, runs uncompiled and only logs it."""
    frames = counters["frames"]
    assert frames["total"] == frames["ok"]
    return counters["stats"]["unique_graphs"]


def without_code(pipe):
    """To be compiled without a code generator: dynamo's graphs and guards are the same, and quick."""
    pipe.compile_pipeline = functools.partial(pipe.compile_pipeline, backend="eager")
    return pipe


def traced(family):
    return ses_fast.enable(without_code(MAKE[family]()), compile=True)


def compiled(pipe):
    """The modules that are."""
    return [module for module in pipe.modules() if module._compiled_call_impl is not None]


def blocks(pipe):
    """Those that should be."""
    return [module for module in pipe.dit.modules() if type(module).__name__ in pipe.dit._repeated_blocks]


@pytest.mark.parametrize("family", [f if f == "Z-Image" else pytest.param(f, marks=slow) for f in MAKE])
def test_no_new_graph_after_the_first_call_whatever_the_prompt(family):
    pipe = traced(family)
    pipe(**BASE | SES)
    seconds, first = dict(pipe.ses_result.seconds), graphs()
    total = seconds.pop("total")
    assert 0 < first <= 8 and seconds["compile"] > 0.5 * total and min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(total, rel=0.05)
    for prompt in PROMPTS:
        pipe(**BASE | SES | {"prompt": prompt})
        assert pipe.ses_result.seconds["compile"] == 0
    assert graphs() == first
    for _ in range(2):  # another size has its own, but for Z-Image, where the prompt is joined to the image
        pipe(**BASE | SES | {"height": 80, "width": 48})
        assert graphs() == (first if family == "Z-Image" else 2 * first)
    assert pipe.ses_result.seconds["compile"] == 0


@pytest.mark.parametrize("family", [f if f in ("Z-Image", "FLUX.1") else pytest.param(f, marks=slow) for f in MAKE])
def test_only_the_prompt_has_a_length_that_may_change(family):
    dynamic = set()  # how many different dynamic sizes each graph has

    def backend(graph, example_inputs):
        inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = [size for each in inputs if isinstance(each, torch.Tensor) for size in each.shape]
        dynamic.add(len({str(size) for size in sizes if isinstance(size, torch.SymInt)}))
        return graph.forward

    pipe = MAKE[family]()
    pipe.compile_pipeline = functools.partial(pipe.compile_pipeline, backend=backend)
    ses_fast.enable(pipe, compile=True)
    pipe(**BASE | SES)
    # The T5 of FLUX.1 and the text encoders of FLUX.2 pad every prompt to one length.
    assert graphs() > 0 and dynamic == {1 if family in ("Z-Image", "Qwen-Image") else 0}


@slow
@pytest.mark.parametrize("family", ["Z-Image", "Qwen-Image"])
def test_the_code_generator_has_no_guards_of_its_own(family):
    pipe = ses_fast.enable(MAKE[family](), compile=True)
    pipe(**BASE | SES)
    first = graphs()
    for prompt in PROMPTS[:8]:
        pipe(**BASE | SES | {"prompt": prompt})
    assert graphs() == first


@pytest.mark.parametrize("negative", [PROMPTS[0], PROMPTS[2]])
def test_a_negative_prompt_of_the_same_length_changes_nothing(negative):
    """CFG's two sides would then share a batch, of twice the rows."""
    pipe = traced("Qwen-Image")
    call = BASE | SES | {"negative_prompt": negative.replace("fox", "cat")}
    pipe(**call)
    first = graphs()
    for prompt in PROMPTS[:4]:
        pipe(**call | {"prompt": prompt})
    assert graphs() == first


def omni():
    """Z-Image-Omni: a forward with masks as long as the prompt."""
    pipe = tiny_z_image()
    pipe.dit = tiny_z_image(siglip=8).dit
    return pipe, {}


def entities():
    """Qwen-Image with entities: a mask of prompts and image."""
    mask = Image.new("RGB", (80, 64), "white")
    return MAKE["Qwen-Image"](), {"eligen_entity_prompts": ["a dog"], "eligen_entity_masks": [mask]}


@pytest.mark.parametrize("make", [omni, entities])
def test_masks_are_as_long_as_the_prompt_too(make):
    pipe, extra = make()
    ses_fast.enable(without_code(pipe), compile=True)
    pipe(**BASE | extra)
    first = graphs()
    for prompt in PROMPTS[::3]:
        pipe(**BASE | extra | {"prompt": prompt})
    assert graphs() == first > 0


def test_a_block_that_somebody_wrapped_is_called_as_before():
    pipe = tiny_z_image()
    stock = np.asarray(pipe(**BASE))
    for block in blocks(pipe):
        block.forward = lambda *args, _own=block.forward, **kwargs: _own(*args, **kwargs)
    ses_fast.enable(without_code(pipe), compile=True)
    assert abs(np.asarray(pipe(**BASE)).astype(int) - stock).max() <= 1  # of 255
    pipe(**BASE | SES)
    first = graphs()
    pipe(**BASE | SES | {"prompt": PROMPTS[9]})
    assert graphs() == first


def test_a_copy_is_not_compiled_and_can_be():
    pipe = traced("Z-Image")
    twin = copy.deepcopy(pipe)
    assert compiled(twin) == []
    _, together = previews(twin, 7)
    assert set(together) == {4, 3}  # nothing is filled up where nothing is compiled
    ses_fast.enable(twin, compile=True)
    assert compiled(twin) == blocks(twin) != []
    ses_fast.disable(twin)
    assert compiled(twin) == [] and compiled(pipe) == blocks(pipe)


def test_a_copy_of_what_the_user_had_compiled_gets_none_of_the_originals_blocks():
    pipe = without_code(tiny_z_image())
    pipe.compile_pipeline()
    ses_fast.enable(pipe, compile=True)
    twin = copy.deepcopy(pipe)
    twin.dit = twin.dit.apply(lambda module: [each.data.mul_(1.1) for each in module.parameters(recurse=False)])
    expected = np.asarray(twin(**BASE))
    assert not np.array_equal(expected, np.asarray(pipe(**BASE)))
    ses_fast.disable(twin)
    assert compiled(twin) == []
    assert np.array_equal(np.asarray(twin(**BASE)), expected)


def test_a_short_batch_halves_what_went_through_the_model(monkeypatch):
    """Room for 2: the batch of 3, filled up to 4, does not fit; 2 do."""
    pipe, sizes = traced("Z-Image"), []
    unit = pipe.units[-1]
    forward = unit.forward_together

    def small(*args, **inputs):
        sizes.append(len(inputs["latents"]))
        if len(sizes) > 4 and sizes[-1] > 2:  # after a generation of two steps, with and without the prompt
            raise torch.OutOfMemoryError("no room")
        return forward(*args, **inputs)

    unit.forward_together = small
    plain, _ = previews(ses_fast.enable(tiny_z_image()), 7)
    found = []
    config = SESConfig(
        progress=False, popsize=4, k_elites=2, batch_size="auto", on_preview=lambda new, *_: found.append(new)
    )
    pipe(**BASE | SES | {"ses_config": config})
    assert sizes == [4] * 4 + [4] + [2] * 4  # the seventh goes alone
    torch.testing.assert_close(torch.cat(found), plain, rtol=0, atol=TOLERANCE)


LIMITED = "recompile_limit" in inspect.signature(torch.compile).parameters


@pytest.mark.parametrize(
    "torch_is",
    [
        pytest.param("this", marks=pytest.mark.skipif(not LIMITED, reason="torch.compile has no limit")),
        pytest.param("2.11", marks=slow),
    ],
)
def test_many_sizes_stay_within_the_limit(torch_is, monkeypatch):
    if torch_is == "2.11":
        ours = torch.compile

        def compile_(model, mode, dynamic, fullgraph, backend):  # takes no recompile_limit
            return ours(model, mode=mode, dynamic=dynamic, fullgraph=fullgraph, backend=backend)

        monkeypatch.setattr(torch, "compile", compile_)
    with torch._dynamo.config.patch(recompile_limit=8):  # as it is; to be put back
        pipe = traced("FLUX.1")
        assert torch._dynamo.config.recompile_limit == (8 if torch_is == "this" else MOST_GRAPHS)
        for i in range(10):
            pipe(**BASE | {"width": 64 + 16 * i})
            assert graphs() == 2 * (i + 1)  # the joint blocks and the single ones


def previews(pipe, budget, batch_size=4, **settings):
    """The previews of a search, and of each forward of several how many went through it."""
    together, images, unit = [], [], pipe.units[-1]
    forward = unit.forward_together

    def noted(*args, **inputs):
        together.append(len(inputs["latents"]))
        return forward(*args, **inputs)

    unit.forward_together = noted
    settings |= {"popsize": 4, "k_elites": 2, "batch_size": batch_size, "progress": False}
    config = SESConfig(on_preview=lambda new, *_: images.append(new), **settings)
    pipe(**BASE | SES | {"ses_eval_budget": budget, "ses_config": config})
    del unit.forward_together
    return torch.cat(images), together


@pytest.mark.parametrize(
    "budget, batch_size, rows",
    [
        pytest.param(7, 4, {4}, id="the last is short"),
        pytest.param(5, 4, {4}, id="the last is one, which goes alone"),
        pytest.param(3, 4, {3}, id="a budget below a batch"),
        pytest.param(7, 3, {3}, id="a batch that is no divisor: 3, 1, 3"),
        pytest.param(4, 9, {4}, id="a batch above a generation"),
    ],
)
@pytest.mark.parametrize("family", [f if f == "Z-Image" else pytest.param(f, marks=slow) for f in MAKE])
def test_every_batch_is_as_long_as_the_first(family, budget, batch_size, rows):
    plain, _ = previews(ses_fast.enable(MAKE[family]()), budget, batch_size)
    found, together = previews(traced(family), budget, batch_size)
    sides = 2 if "FLUX" in family else 1  # CFG's two share a batch where every prompt has one length
    assert set(together) == {sides * n for n in rows}
    assert len(found) == budget
    torch.testing.assert_close(found, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["Z-Image"])
def test_disable_clears_what_was_compiled_and_only_that(family):
    pipe = MAKE[family]()
    own = pipe.dit.layers[0]
    own.compile(backend="eager")
    mine, stock = own._compiled_call_impl, np.asarray(pipe(**BASE))

    ses_fast.enable(without_code(pipe), compile=True)
    assert compiled(pipe) == blocks(pipe) and own._compiled_call_impl is not mine
    once = own._compiled_call_impl
    ses_fast.enable(ses_fast.enable(pipe), compile=True)
    assert own._compiled_call_impl is once
    ses_fast.disable(pipe)
    assert compiled(pipe) == [own] and own._compiled_call_impl is mine
    assert np.array_equal(np.asarray(pipe(**BASE)), stock)


def test_another_mode_compiles_anew():
    pipe, asked = tiny_z_image(), []
    compile_pipeline = pipe.compile_pipeline
    pipe.compile_pipeline = lambda mode, **others: (asked.append(mode), compile_pipeline(mode, **others))
    ses_fast.enable(pipe, compile=True)
    first = [block._compiled_call_impl for block in blocks(pipe)]
    ses_fast.enable(pipe, compile="max-autotune")
    second = [block._compiled_call_impl for block in blocks(pipe)]
    assert asked == ["default", "max-autotune-no-cudagraphs"]
    assert None not in second and not set(map(id, first)) & set(map(id, second))
    ses_fast.disable(pipe)
    assert compiled(pipe) == []


def test_a_model_that_was_replaced_is_compiled():
    pipe = ses_fast.enable(tiny_z_image(), compile=True)
    old, pipe.dit = pipe.dit, tiny_z_image(seed=1).dit
    assert compiled(pipe) == []
    ses_fast.enable(pipe, compile=True)
    assert compiled(pipe) == blocks(pipe) != []
    assert compiled(old) == []
    ses_fast.disable(pipe)
    assert compiled(pipe) == []


def test_a_pipeline_whose_unit_was_lost_is_disabled_without_a_rest():
    pipe = ses_fast.enable(tiny_z_image(), compile=True)
    pipe.units = pipe.units[:-1]
    ses_fast.enable(pipe)
    assert compiled(pipe) == blocks(pipe)
    ses_fast.disable(pipe)
    assert compiled(pipe) == []


def test_a_pipeline_without_its_model_is_not_enabled():
    pipe = tiny_z_image()
    stock, units, dit = type(pipe), list(pipe.units), pipe.dit
    pipe.dit = None
    with pytest.raises(ValueError, match="no model to compile"):
        ses_fast.enable(pipe, compile=True)
    assert type(pipe) is stock and pipe.units == units and "_ses_compiled" not in vars(pipe)
    pipe.dit = dit
    ses_fast.enable(pipe, compile=True)
    assert compiled(pipe) == blocks(pipe)


def managed(pipe):
    return {}, manage_vram(pipe)


def hot_lora_everywhere(pipe):
    generator, lora = torch.Generator().manual_seed(0), {}
    for name, layer in pipe.dit.named_modules():
        if isinstance(layer, torch.nn.Linear) and ("layers." in name or "refiner" in name):
            lora[f"{name}.lora_A.default.weight"] = torch.randn(4, layer.in_features, generator=generator)
            lora[f"{name}.lora_B.default.weight"] = 0.1 * torch.randn(layer.out_features, 4, generator=generator)
    pipe.dit = pipe.enable_lora_hot_loading(pipe.dit)
    return {"lora": lora}, pipe


@slow
@pytest.mark.parametrize(
    "prepare", [pytest.param(managed, id="VRAM management"), pytest.param(hot_lora_everywhere, id="a hot LoRA")]
)
def test_the_many_states_of_a_layer_stay_within_the_limit(prepare, monkeypatch):
    """Each is a graph of its own: more than the 8 of a block that are dynamo's own limit."""
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # which DiffSynth calls
    extra, pipe = prepare(tiny_z_image())
    call = BASE | SES | extra
    plain = np.asarray(ses_fast.enable(pipe)(**call)).astype(int)
    ses_fast.enable(without_code(pipe), compile=True)
    first = np.asarray(pipe(**call)).astype(int)
    count = graphs()
    assert count > 0 and abs(first - plain).max() <= 1  # of 255
    again = np.asarray(pipe(**call | {"prompt": PROMPTS[7]}))
    assert graphs() == count and pipe.ses_result.seconds["compile"] == 0
    assert not np.array_equal(again, first)
    assert np.array_equal(np.asarray(pipe(**call)), first)


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
    torch.testing.assert_close(seen["compiled"], seen["plain"], rtol=0, atol=TOLERANCE)
    assert pipe.ses_result.seconds["compile"] > 0


def test_held_out_rewards_compile_nothing_more():
    pipe = traced("Z-Image")
    _, before = previews(pipe, 7)
    count = graphs()
    _, together = previews(pipe, 7, report_rewards={"again": brightness})
    assert together == before and graphs() == count
    again = pipe.ses_result.held_out["again"]
    grey_level = 1 / 127.5  # they judge the pictures, the search's reward judged the decoder's output
    assert again.base == pytest.approx(pipe.ses_result.trace[0].score, abs=grey_level)
    assert again.answer == pytest.approx(pipe.ses_result.score, abs=grey_level)
