"""The documented call on every family of diffusers, through its own classes with tiny random weights."""

import numpy as np
import pytest
import torch
from tiny_diffusers import MAKE, brightness, first, make, search
from torch import Tensor

import ses_fast
from ses_fast import Preview, evolution
from ses_fast.pipelines.diffusers.family import FAMILIES

# What takes longest, or stands for no layout, scheduler or call of its own.
SLOW = ("CogView4", "Chroma", "Lumina2", "PixArt-Alpha", "AuraFlow")
NAMES = [pytest.param(name, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MAKE]
RACE = Preview(race=((0.94, 0.5),))  # after the first or the second of three steps

_made = {}


@pytest.fixture
def tiny(family):
    """The enabled pipeline; made once, as every test leaves it as it was."""
    if family not in _made:
        _made[family] = make(family)
    yield ses_fast.enable(_made[family].pipe) and _made[family]
    ses_fast.disable(_made[family].pipe)


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(pipe, noise: Tensor) -> Tensor:
    """A noise as `latents=` takes it."""
    if "Flux2" in type(pipe).__name__ or not hasattr(pipe, "_pack_latents"):
        return noise
    *_, channels, height, width = noise.shape
    return pipe._pack_latents(noise, 1, channels, height, width)


def levels(images: Tensor) -> np.ndarray:  # [n, 3, H, W] or [n, F, 3, H, W] in [-1, 1]
    """Previews as a reward takes them: truncated to 8 bits, colours last."""
    return ((images + 1) * 127.5).clip(0, 255).to(torch.uint8).movedim(-3, -1).numpy()


def rounded(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


def previews(tiny, budget=5, **settings):
    """(the result, the previews of one generation, after how many steps each was stopped)"""
    seen = []

    def keep(images, scores, generation, first, steps):
        seen.append((images.clone(), steps))

    output, result = search(tiny, budget, on_preview=keep, **settings)
    return output, result, torch.cat([images for images, _ in seen]), torch.cat([steps for _, steps in seen])


def first_noises(result, n: int) -> tuple[Tensor, ...]:
    """The first candidates of a search, drawn anew."""
    state = result.state
    begun = evolution.start(state.base, state.config, seed=result.seed, include_base=True)
    return evolution.ask(begun, n)[0].split(1)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, which moves a number to the next of the 256 levels where it lies between two."""
    apart = (a - b).abs()
    return apart.max() < 1.01 / 127.5 and (apart > 0).float().mean() < 0.01


def test_every_family_has_its_row():
    assert {type(make(name).pipe).__name__ for name in MAKE} == set(FAMILIES)


@pytest.mark.parametrize("family", NAMES)
def test_without_ses_the_stock_image_and_with_a_budget_of_one_too(tiny):
    enabled = type(tiny.pipe)
    ses_fast.disable(tiny.pipe)
    stock_class, before = type(tiny.pipe), dict(vars(tiny.pipe))
    stock = first(tiny(num_inference_steps=3, generator=drawn()))
    ses_fast.enable(tiny.pipe)
    assert type(tiny.pipe) is enabled and isinstance(tiny.pipe, stock_class)
    assert np.array_equal(first(tiny(num_inference_steps=3, generator=drawn())), stock)
    generator = drawn()
    output, result = search(tiny, 1, call={"generator": generator})
    assert np.array_equal(first(output), stock) and result.score == result.base_score
    left = drawn()
    tiny(num_inference_steps=3, generator=left)
    assert torch.equal(generator.get_state(), left.get_state()), (
        "the generator stands elsewhere than after a stock call"
    )
    ses_fast.disable(tiny.pipe)
    assert type(tiny.pipe) is stock_class and vars(tiny.pipe)["scheduler"] is before["scheduler"]
    assert not {"prepare_latents", "encode_prompt", "maybe_free_model_hooks", "ses_result"} & vars(tiny.pipe).keys()


@pytest.mark.parametrize("family", NAMES)
def test_previews_and_the_answer_are_the_stock_calls_images_of_their_noises(tiny):
    output, result, images, _ = previews(tiny, 4, steps=2, batch_size=1)
    winner = result.best.index
    assert winner != 0 or result.score == result.base_score
    after = drawn()
    noise = torch.randn(result.latents.shape, generator=after, dtype=result.latents.dtype)
    noises = first_noises(result, 4)
    assert torch.equal(noise, noises[0]) and torch.equal(result.latents, noises[winner])
    shown = [(2, levels(image[None])[0], noise) for image, noise in zip(images, noises, strict=True)]
    for steps, image, noise in [*shown, (3, rounded(first(output)), result.latents)]:
        generator = drawn()
        generator.set_state(after.get_state())
        stock = tiny(num_inference_steps=steps, generator=generator, latents=packed(tiny.pipe, noise))
        assert np.array_equal(image, rounded(first(stock)))


@pytest.mark.parametrize("family", NAMES)
def test_together_equals_one_by_one_and_a_race_spares_the_survivors(tiny):
    _, alone, images, _ = previews(tiny, batch_size=1)
    assert images.std(0).mean() > 0.05, "the previews hardly differ"
    _, together, more, _ = previews(tiny, batch_size=4)
    assert close(images, more)
    assert [each.score for each in together.trace] == pytest.approx([each.score for each in alone.trace], abs=1e-3)
    _, raced, shown, steps = previews(tiny, batch_size=1, preview=RACE)
    final = steps == 0
    assert 3 <= final.sum() < 5 and raced.forwards["preview"] < alone.forwards["preview"]
    assert torch.equal(shown[final], images[final]) and not close(shown[~final], images[~final])


# Packed latents, a list of images in the model, noise inside the steps, a history that the later of five steps still
# read; the schedulers' own
# tests in test_diffusers_call.py race in batches on SDXL and FLUX.1.
@pytest.mark.parametrize("family", ["Qwen-Image", "Z-Image", "SDXL-Turbo", "PixArt-Sigma"])
def test_a_race_in_batches_spares_the_survivors(tiny):
    _, _, images, _ = previews(tiny, steps=5, batch_size=1)
    _, _, shown, steps = previews(tiny, steps=5, batch_size=2, preview=RACE)
    final = steps == 0
    assert 3 <= final.sum() < 5
    assert close(shown[final], images[final]) and not close(shown[~final], images[~final])


@pytest.mark.parametrize("family", [name for name in NAMES if name.id != "SDXL-Turbo"])
def test_half_the_size_and_refining(tiny):
    size = {"height": 64, "width": 64} if tiny.call["height"] == 32 else {}
    preview = Preview(scale=2, cfg=False, refine=2)
    call = {"generator": drawn(), **size}
    output, result, images, _ = previews(tiny, steps=2, preview=preview, batch_size=1, call=call)
    assert len(result.refined) >= 2 and first(output).shape[-2] == 2 * images.shape[-1]
    stock = tiny(num_inference_steps=3, generator=drawn(), latents=packed(tiny.pipe, result.latents), **size)
    assert np.array_equal(first(output), first(stock))
    shown = 2 * torch.from_numpy(first(stock))[None] - 1
    assert result.score == pytest.approx(brightness(shown, "").item(), abs=0.01)
    assert max(each.score for each in result.refined) == result.score
