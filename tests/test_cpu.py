"""Linear layers by oneDNN on a CPU: equal, only where they should be, and gone afterwards; and freed memory kept."""

import copy
import ctypes
import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tiny import brightness, manage_vram, tiny_z_image
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ses_fast
from ses_fast import SESConfig, cpu, embedded
from ses_fast.cpu import LEAST_WORK, fast_linears

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="torch without MKL or oneDNN",
)
TOLERANCE = {
    "layer": 2e-5,  # of sums of up to 512 products of N(0, 1) values and weights below 1: a few bits of fp32
    "brightness": 1e-5,  # of tiny previews
    "reward": 1e-4,  # of some 30
}


class Counted(TorchDispatchMode):
    """Counts the calls of oneDNN's linear."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "mkldnn._linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def counted(call):
    with Counted() as counter:
        value = call()
    return value, counter.calls


INPUTS = {
    "rows": lambda: torch.randn(128, 96),
    "a batch of tokens": lambda: torch.randn(4, 33, 96),
    "heads, not contiguous": lambda: torch.randn(4, 3, 33, 96).transpose(1, 2),
    "every second value": lambda: torch.randn(128, 192)[:, ::2],
    "expanded": lambda: torch.randn(1, 64, 96).expand(3, -1, -1),
    "one, without a batch": lambda: torch.randn(96),
    "none": lambda: torch.randn(0, 96),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_equals_linear(kind, bias, monkeypatch):
    monkeypatch.setattr("ses_fast.cpu.LEAST_WORK", 0)
    torch.manual_seed(0)
    layer, inputs = nn.Linear(96, 512, bias), INPUTS[kind]()
    expected = layer(inputs)
    with fast_linears(layer):
        found, calls = counted(lambda: layer(inputs))
    assert calls == 1
    assert_close(found, expected, atol=TOLERANCE["layer"], rtol=0)
    truth = nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert_close(found.double(), truth, atol=TOLERANCE["layer"], rtol=0)
    assert found.stride() == expected.stride()


@torch.no_grad()
def test_a_small_product_is_left_as_it_was_bit_for_bit():
    layer, inputs = nn.Linear(128, 128), torch.randn(LEAST_WORK // 128**2, 128)
    few = inputs[:-1]
    expected = layer(few)
    with fast_linears(layer):
        found, calls = counted(lambda: layer(few))
        assert calls == 0 and torch.equal(found, expected)
        assert counted(lambda: layer(inputs))[1] == 1


class Own(nn.Linear):
    pass


class Block(nn.Module):
    """Two layers, as a model's own block has them: dynamo does not look into nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 512), nn.Linear(512, 64)

    def forward(self, inputs):
        return self.second(self.first(inputs).tanh())


def sparse(layer):
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    return layer


OTHERS = {
    "a class of its own": lambda: Own(256, 256),
    "bf16": lambda: nn.Linear(256, 256, dtype=torch.bfloat16),
    "fp64": lambda: nn.Linear(256, 256, dtype=torch.float64),
    "on no device": lambda: nn.Linear(256, 256, device="meta"),
    "sparse": lambda: sparse(nn.Linear(256, 256)),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_other_layers_stay_what_they_are(kind):
    layer = OTHERS[kind]()
    before, inputs = type(layer), torch.randn(64, 256, dtype=layer.weight.dtype).to(layer.weight.device)
    with fast_linears(nn.Sequential(layer)):
        assert type(layer) is before
        assert counted(lambda: layer(inputs))[1] == 0


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("why", ["gradients", "autocast", "no oneDNN", "oneDNN turned off"])
def test_does_nothing_with(why, when, monkeypatch):
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256, requires_grad=True)
    if why == "no oneDNN":
        monkeypatch.setattr("ses_fast.cpu._both_libraries", lambda: False)

    if why == "oneDNN turned off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)

    @contextmanager
    def reason():
        with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
            yield

    first, second = (reason(), fast_linears(layer)) if when == "before" else (fast_linears(layer), reason())
    with torch.no_grad(), first, second:
        output, calls = counted(lambda: layer(inputs))
    assert calls == 0
    assert output.requires_grad == (why == "gradients")
    assert output.dtype == (torch.bfloat16 if why == "autocast" else torch.float32)


class Quantised(torch.Tensor):
    """A tensor whose class knows linear, and nothing else; as torchao's, it says that it is fp32 and on the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            args = [each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args]
        return super().__torch_function__(func, types, args, kwargs or {})


@torch.no_grad()
def test_an_input_of_a_class_of_its_own_goes_to_that_class():
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256).as_subclass(Quantised)
    expected = layer(inputs)
    with fast_linears(layer):
        found, calls = counted(lambda: layer(inputs))
    assert calls == 0 and torch.equal(found, expected)


@torch.no_grad()
def test_a_weight_of_a_class_of_its_own_keeps_its_layer():
    layer = nn.Linear(256, 256)
    layer.weight = nn.Parameter(torch.randn(256, 256).as_subclass(Quantised))
    assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32
    with fast_linears(layer):
        assert type(layer) is nn.Linear
        assert counted(lambda: layer(torch.randn(64, 256)))[1] == 0


@torch.no_grad()
def test_inputs_of_another_kind_raise_as_they_did():
    layer = nn.Linear(256, 256)
    for inputs in (torch.randn(64, 256).double(), torch.randn(64, 255)):
        with pytest.raises(RuntimeError) as stock:
            layer(inputs)
        with fast_linears(layer), pytest.raises(RuntimeError) as ours:
            layer(inputs)
        if inputs.dtype == torch.float64:
            assert str(ours.value) == str(stock.value)


@torch.no_grad()
def test_the_layers_are_their_own_again_whatever_happens():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)))
    weights = list(model.parameters())
    with pytest.raises(KeyError), fast_linears(model):
        assert type(model[0]) is not nn.Linear and isinstance(model[0], nn.Linear)
        assert type(model[2][0]) is not nn.Linear
        raise KeyError
    assert type(model[0]) is type(model[2][0]) is nn.Linear
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


@torch.no_grad()
def test_a_copy_made_meanwhile_is_an_ordinary_layer():
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256)
    with fast_linears(layer):
        twin = copy.deepcopy(layer)
    assert type(twin) is nn.Linear
    assert torch.equal(twin(inputs), layer(inputs))


@torch.no_grad()
def test_layers_stay_fast_until_the_last_one_leaves():
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256)
    outer, inner = fast_linears(layer), fast_linears(layer)
    with outer:
        with inner:
            assert counted(lambda: layer(inputs))[1] == 1
        assert counted(lambda: layer(inputs))[1] == 1
        with fast_linears(layer, when=False):  # as for a single image inside of a batch
            assert counted(lambda: layer(inputs))[1] == 0
    assert type(layer) is nn.Linear


def interrupted_at(n, model):
    """Runs `fast_linears(model)` with a Ctrl-C before line n of those of cpu.py; whether there was such a line."""
    left = [n]

    def trace(frame, event, arg):
        if frame.f_code.co_filename != cpu.__file__:
            return None
        if event == "line" and frame.f_lineno not in BLOCKS:  # Python looks for signals where it calls
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with fast_linears(model):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left[0] < 0


with open(cpu.__file__) as source:
    BLOCKS = {
        i for i, line in enumerate(source, 1) if line.split("#")[0].strip() in ("try:", "finally:", "with _lock:")
    }


@torch.no_grad()
def test_the_layers_are_their_own_again_whenever_it_is_interrupted():
    model, inputs = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]), torch.randn(64, 256)
    expected = model(inputs)
    for n in itertools.count():
        more = interrupted_at(n, model)
        assert [type(layer) for layer in model] == [nn.Linear] * 4, n
        assert not cpu._users and not cpu._thread.fast, n
        if not more:
            break
    assert n > 40  # the lines of entering and leaving, layer by layer
    assert torch.equal(model(inputs), expected)
    with fast_linears(model):
        assert counted(lambda: model(inputs))[1] == 4


@torch.no_grad()
def test_another_thread_computes_as_if_nothing_had_happened():
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256)
    expected = layer(inputs)
    with ThreadPoolExecutor(1) as other, fast_linears(layer):
        found, calls = other.submit(torch.no_grad()(lambda: counted(lambda: layer(inputs)))).result()
        assert calls == 0 and torch.equal(found, expected)
        assert counted(lambda: layer(inputs))[1] == 1

        def inside():
            with torch.no_grad(), fast_linears(layer):
                return counted(lambda: layer(inputs))[1]

        assert other.submit(inside).result() == 1
        assert counted(lambda: layer(inputs))[1] == 1  # which the other one, leaving, did not end
    assert type(layer) is nn.Linear


@torch.no_grad()
def test_a_layer_restored_while_a_method_runs_does_not_break_it():
    layer, inputs = nn.Linear(256, 256), torch.randn(64, 256)  # the class of `self` is `nn.Linear` again
    assert torch.equal(cpu._Linear.forward(layer, inputs), layer(inputs))
    assert cpu._Linear.__reduce_ex__(layer, 4)[1] == (nn.Linear,)


def test_threads_that_share_layers_meet_no_half_restored_one(monkeypatch):
    monkeypatch.setattr("ses_fast.cpu.LEAST_WORK", 0)
    model, inputs = nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)]), torch.randn(8, 16)
    start, end = threading.Barrier(3), time.monotonic() + 2
    with torch.no_grad():
        plain = model(inputs)

    def go(fast):
        start.wait()
        forwards = 0
        while time.monotonic() < end:
            with torch.no_grad(), fast_linears(model, when=fast):
                found = model(inputs)
                copy.deepcopy(model[0])
            torch.testing.assert_close(found, plain) if fast else torch.testing.assert_close(
                found, plain, rtol=0, atol=0
            )
            forwards += 1
        return forwards

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            assert all(threads.map(go, (True, True, False)))  # raises what a thread has raised
    finally:
        sys.setswitchinterval(before)
    assert {type(layer) for layer in model} == {nn.Linear}


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_layers_take_it_and_compile_once_inside_and_once_outside(fresh):
    model, inputs = Block(), torch.randn(4, 96)
    expected = model(inputs)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    model.compile(backend=backend)
    for _ in range(3):
        with fast_linears(model):
            assert_close(model(inputs), expected, atol=TOLERANCE["layer"], rtol=0)
        assert torch.equal(model(inputs), expected)
    ours, stock = graphs  # one of each, however often they take turns
    assert sum("ses_fast.linear" in target for target in ours) == 2
    assert not any("ses_fast" in target for target in stock)


@torch.no_grad()
def test_a_compiled_layer_in_another_thread_is_the_plain_one(fresh, monkeypatch):
    model, inputs = Block(), torch.randn(4, 96)
    model.compile(backend=lambda graph, example_inputs: graph.forward)
    expected = model(inputs)
    calls, onednn = [], cpu._onednn_linear
    monkeypatch.setattr("ses_fast.cpu._onednn_linear", lambda *given: calls.append(1) or onednn(*given))
    with ThreadPoolExecutor(1) as other, fast_linears(model):
        model(inputs)
        assert len(calls) == 2
        assert torch.equal(other.submit(torch.no_grad()(model), inputs).result(), expected)
    assert len(calls) == 2


CALL = {"prompt": "a red fox", "height": 64, "width": 80, "num_inference_steps": 2, "seed": 3}
CALL |= {"progress_bar_cmd": lambda steps: steps}
SES = {"enable_ses": True, "ses_reward_model": brightness, "ses_inference_steps": 2, "ses_eval_budget": 4}


def search(pipe, batch_size):
    config = SESConfig(progress=False, popsize=4, k_elites=2, batch_size=batch_size)
    return counted(lambda: pipe(**CALL, **SES, ses_config=config))


def test_previews_in_a_batch_take_it_and_one_alone_and_the_final_image_do_not(monkeypatch):
    monkeypatch.setattr("ses_fast.cpu.LEAST_WORK", 0)
    pipe = ses_fast.enable(tiny_z_image())
    _, alone = search(pipe, 1)
    one_by_one = pipe.ses_result
    _, together = search(pipe, 4)
    assert alone == 0 and together > 2 * len(pipe.dit.layers)
    a, b = (torch.tensor([each.score for each in result.trace]) for result in (one_by_one, pipe.ses_result))
    assert_close(a, b, atol=TOLERANCE["brightness"], rtol=0)
    assert {type(module) for module in pipe.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_previews_under_vram_management_keep_its_layers(monkeypatch):
    monkeypatch.setattr("ses_fast.cpu.LEAST_WORK", 0)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # which DiffSynth calls
    pipe = ses_fast.enable(manage_vram(tiny_z_image()))
    before = [type(module) for module in pipe.modules()]
    search(pipe, 4)
    assert [type(module) for module in pipe.modules()] == before


def test_a_reward_takes_it_only_for_several_images(monkeypatch):
    monkeypatch.setattr("ses_fast.cpu.LEAST_WORK", 0)
    reward = embedded.load_reward(device="cpu")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reward(images[:1], "two red squares")  # which encodes the prompt
    one, calls = counted(lambda: reward(images[:1], "two red squares"))
    assert calls == 0
    several, calls = counted(lambda: reward(images, "two red squares"))
    assert calls > 0
    assert_close(several[:1], one, atol=TOLERANCE["reward"], rtol=0)


MEMORY = """
import ctypes, torch
class Info(ctypes.Structure):  # of glibc, in bytes
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
{keep}
mapped = info().hblkhd
blocks = [torch.empty(20 << 20, dtype=torch.uint8) for _ in range(2)]
mapped = info().hblkhd - mapped  # what the system was asked for, and is given back when it is freed
del blocks
print(mapped >> 20, info().fordblks >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc from 2.33 on")
def test_freed_memory_is_kept():
    def mapped_and_kept(keep):
        done = subprocess.run([sys.executable, "-c", MEMORY.format(keep=keep)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return map(int, done.stdout.split())

    mapped, kept = mapped_and_kept("")
    assert mapped >= 40 and kept < 40
    mapped, kept = mapped_and_kept("from ses_fast.cpu import keep_memory; keep_memory()")
    assert mapped == 0 and kept >= 40


def test_a_search_on_a_cpu_keeps_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr("ses_fast.loop.keep_memory", lambda: asked.append(1))
    ses_fast.evolve(torch.zeros(1, 2, 16, 16), lambda latents: 0.0, 1, 1, 1, dwt_level=1, progress=False, seed=0)
    assert asked == [1]
