"""What renderers made, given again: bit for bit what a search would have made itself, and only where it is the same."""

import pytest
import torch
from tiny import GUIDED, MAKE, brightness, forward_sizes, pixels, search, tiny_flux

import ses_fast
from ses_fast import Preview, SESConfig
from ses_fast.pipelines.renderer import Draft, Renderer
from ses_fast.pipelines.request import Request
from ses_fast.pipelines.sharing import Kept, shared, sharing

FOUR_STEPS = {"num_inference_steps": 4, "ses_inference_steps": 4}
RACE = ((0.95, 0.5), (0.7, 0.25))
SETTINGS = {
    "plain": {},
    "together": {"batch_size": "auto"},
    "raced": {"preview": Preview(race=RACE), "batch_size": "auto"},
    "half the size": {"preview": Preview(scale=2), "dwt_level": 1},
    "all": {"preview": Preview(scale=2, race=RACE, cfg=False, refine=2), "dwt_level": 1, "batch_size": 3},
}


@pytest.fixture(scope="module", params=["FLUX.1", "Z-Image"])
def pipe(request):
    return ses_fast.enable(MAKE[request.param]())


def same(one, other):
    """Two searches' pictures, results and previews are equal bit for bit."""
    (image, result, seen), (image_, result_, seen_) = one, other
    assert (pixels(image) == pixels(image_)).all()
    assert result.trace == result_.trace and result.refined == result_.refined
    assert torch.equal(result.latents, result_.latents) and result.forwards == result_.forwards
    assert len(seen.images) == len(seen_.images) and all(map(torch.equal, seen.images, seen_.images))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_shared_search_is_the_same_bit_for_bit(pipe, name):
    call = FOUR_STEPS | (GUIDED if name == "all" else {})
    alone = search(pipe, 8, call, **SETTINGS[name])
    with sharing(Kept()) as kept:
        same(search(pipe, 8, call, **SETTINGS[name]), alone)
        with forward_sizes(pipe) as second:
            same(search(pipe, 8, call, **SETTINGS[name]), alone)
        assert kept.reused > 0
    assert len(second) == (0 if name == "all" else 4), "the final image alone, and not where it was refined"
    with forward_sizes(pipe) as outside:
        same(search(pipe, 8, call, **SETTINGS[name]), alone)
    assert len(outside) > 4, "outside nothing is shared"


def test_methods_that_begin_alike_share_their_first_generation(pipe):
    with sharing(Kept()) as kept:
        random = search(pipe, 8, FOUR_STEPS, strategy="random")
        with forward_sizes(pipe) as sizes:
            staged = search(pipe, 8, FOUR_STEPS, strategy="two_stage")
    assert kept.reused == 2 * 4, "four noises, denoised and decoded one by one"
    assert len(sizes) == (4 + 1) * 4, "the second generation and the final image"
    same(staged, search(pipe, 8, FOUR_STEPS, strategy="two_stage"))
    same(random, search(pipe, 8, FOUR_STEPS, strategy="random"))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue owl"},
        {"cfg_scale": 3.0, "negative_prompt": "dark"},
        {"ses_inference_steps": 3},
        {"seed": 4},
    ],
)
def test_what_another_call_made_is_not_taken(pipe, change):
    with sharing(Kept()) as kept:
        search(pipe, 4, FOUR_STEPS)
        found = search(pipe, 4, FOUR_STEPS | change)
    assert kept.reused == 0
    same(found, search(pipe, 4, FOUR_STEPS | change))


def test_a_reward_may_write_on_what_it_gets(pipe):
    def spoils(images, prompt):
        scores = brightness(images, prompt)
        images.fill_(7)
        return scores

    call = FOUR_STEPS | {"ses_reward_model": spoils}
    alone = search(pipe, 4, call, on_preview=None)
    with sharing(Kept()):
        for _ in range(2):
            image, result, _ = search(pipe, 4, call, on_preview=None)
            assert result.trace == alone[1].trace and (pixels(image) == pixels(alone[0])).all()


def test_a_cache_that_counts_steps_is_never_left_out():
    pipe = ses_fast.enable(tiny_flux())
    call = FOUR_STEPS | {"tea_cache_l1_thresh": 0.3}
    alone = search(pipe, 4, call, preview=Preview(refine=1))
    with sharing(Kept()) as kept:
        for _ in range(2):
            same(search(pipe, 4, call, preview=Preview(refine=1)), alone)
    assert kept.reused == 4 + 4, "the previews of the second, which have no such cache"


def test_the_oldest_work_goes_first_where_there_is_too_much():
    kept, made = Kept(most=3 * 40), []

    def get(number):
        return kept.get((number,), lambda: made.append(number) or torch.full((10,), float(number)))

    for number in (0, 1, 2, 0, 3, 0, 1):
        assert torch.equal(get(number), torch.full((10,), float(number)))
    assert made == [0, 1, 2, 3, 1] and kept.size == 3 * 40
    get(0).fill_(9)
    assert get(0)[0] == 0, "what is given is the caller's"
    kept.clear()
    get(0)
    assert made[-1] == 0 and kept.size == 40


def test_all_of_a_draft_is_kept():
    draft = Draft(torch.ones(2, 3), 2, (torch.zeros(2, 3),), torch.full((2, 3), 5.0))
    kept = Kept()
    for _ in range(2):
        found = kept.get(("draft",), lambda: draft)
        assert (
            found.step == 2
            and torch.equal(found.clean, draft.clean)
            and torch.equal(found.history[0], draft.history[0])
        )
    assert found.latents is not draft.latents and kept.size == 3 * 6 * 4


def test_memory_that_ran_out_forgets_what_was_made_before():
    """CFG's sides no longer share a batch from then on: the same up to rounding, which is not the same bits."""

    class Short(Renderer):
        steps, model, device, repeatable = 4, torch.nn.Identity(), "cpu", True
        begin = advance = decode = None
        save_memory = staticmethod(lambda: True)

    request = Request(SESConfig(), "", 1, 4, None, 0, 0, {})
    with sharing(Kept()) as kept:
        renderer = shared(Short(), request, "preview")
        kept.get((1,), lambda: torch.ones(1))
        assert renderer.save_memory() and kept.size == 0
    assert isinstance(shared(Short(), request, "preview"), Short), "outside a renderer is itself"
