"""What two processes are compared by: another weight or buffer is another digest, wherever the model is kept."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ses_fast.digests import digest_of_weights, digests_of_weights
from ses_fast.rewards import WeightedReward, from_pil
from ses_fast.rewards.base import Reward


def model(weight=1.0, mean=0.0):
    made = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    for parameter in made.parameters():
        nn.init.constant_(parameter, weight)
    made[1].running_mean.fill_(mean)
    made.register_buffer("scale", torch.ones(2), persistent=False)
    return made


def test_weights_and_buffers_count_and_nothing_else_does():
    same = [digest_of_weights(each) for each in (model(), model().eval(), model().requires_grad_(False))]
    other = model()
    other.scale += 1
    names = nn.Sequential(*model())  # without the buffer
    others = [digest_of_weights(each) for each in (model(2.0), model(mean=1.0), other, names, model().double())]
    assert len({*same}) == 1 and len({same[0], *others}) == 1 + len(others)


def test_what_holds_no_numbers_counts_by_its_name_and_shape():
    assert digest_of_weights(model().to("meta")) == digest_of_weights(model(2.0).to("meta"))
    assert digest_of_weights(nn.Linear(3, 1, device="meta")) != digest_of_weights(nn.Linear(4, 1, device="meta"))


MODEL = None  # of `by_a_global`


def by_a_global(images, prompt):
    return MODEL(images)


def by_another(images, prompt):
    return by_a_global(images, prompt)


class Scorer(Reward):
    def __init__(self, given):
        super().__init__(given, "cpu", None)


class Lazy:
    model = None

    def __call__(self, images, prompt):
        self.model = self.model or model()


class Slots:
    __slots__ = ("model",)


def closure(given):
    def reward(images, prompt):
        return inner(images, prompt)

    def inner(images, prompt):
        return given(images), unfilled

    if given is None:
        unfilled = 1
    return reward


def round_and_round(given):
    pipe = SimpleNamespace(model=given, number=3, text="x")
    pipe.itself = [pipe, {"again": given}]
    return pipe


# How a model is kept -> (what makes it of a model, where it is then found).
KEPT = {
    "itself": (lambda given: given, ""),
    "a bound method": (lambda given: given.forward, ".__self__"),
    "a reward of the package": (Scorer, ".model"),
    "a sum": (lambda given: WeightedReward({"a": Scorer(given)}, {"a": 1.0}), ".rewards.a.model"),
    "held-out rewards": (lambda given: {"a": Scorer(given)}, ".a.model"),
    "a scorer of pictures": (lambda given: from_pil(functools.partial(print, given)), ".function.0"),
    "a partial's keyword": (lambda given: functools.partial(print, end=given), ".end"),
    "a closure in a closure": (closure, ".inner.given"),
    "a default": (lambda given: lambda images, prompt, net=given: net(images), ".0"),
    "a circle": (round_and_round, ".model"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_model_is_found_where_it_is_kept(case):
    make, place = KEPT[case]
    found = digests_of_weights(reward=make(model()))
    assert found == {f"weights of reward{place}": digest_of_weights(model())}
    assert digests_of_weights(reward=make(model(mean=1.0))) != found


def test_a_global_that_a_function_names(monkeypatch):
    monkeypatch.setattr(f"{__name__}.MODEL", model())
    assert digests_of_weights(reward=by_a_global) == {"weights of reward.MODEL": digest_of_weights(model())}
    assert digests_of_weights(reward=by_another) == {}  # functions lead anywhere


def test_where_no_model_is():
    deep = functools.reduce(lambda inner, _: [inner], range(9), model())
    nothing = (None, "pick", {"pick": 1.0}, ("pick",), print, len, Slots(), object(), deep, by_a_global, torch.ones(3))
    assert digests_of_weights(**{f"v{i}": value for i, value in enumerate(nothing)}) == {}
    lazy = Lazy()
    assert digests_of_weights(reward=lazy) == {}
    lazy(None, "")
    assert list(digests_of_weights(reward=lazy)) == ["weights of reward.model"]


def test_two_values_are_told_apart():
    shared = model()
    for other in (model(2.0), shared):
        assert list(digests_of_weights(pipe=shared, reward=Scorer(other))) == [
            "weights of pipe",
            "weights of reward.model",
        ]
