"""What the ops share: one signature and docstring for op, reference and kernel, and the choice of a backend."""

import importlib.util
import inspect
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ses_fast import ops, reference

KERNEL_OF = {
    "haar_dwt2": "haar",
    "haar_idwt2": "haar",
    "split_low_band": "haar",
    "merge_low_band": "haar",
    "sample_population": "population",
    "update_elites": "elites",
    "resize_normalize": "preprocess",
}


@pytest.mark.parametrize("name", KERNEL_OF)
def test_an_op_is_its_reference_and_a_backend(name):
    public, plain = getattr(ops, name), getattr(reference, name)
    parameters = dict(inspect.signature(public).parameters)
    assert parameters.pop("backend").default is None
    assert parameters == dict(inspect.signature(plain).parameters)
    assert public.__doc__.startswith(plain.__doc__.rstrip()) and "RuntimeError" in public.__doc__


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", KERNEL_OF)
def test_a_kernels_launcher_is_its_reference(name):
    launcher, plain = getattr(import_module(f"ses_fast.kernels.{KERNEL_OF[name]}"), name), getattr(reference, name)
    assert inspect.signature(launcher) == inspect.signature(plain) and launcher.__doc__ == plain.__doc__


def test_backends(monkeypatch):
    x = torch.randn(4, 4)
    assert ops.get_backend() == "auto" and "CUDA" in ops.why_not_triton(x)
    with pytest.raises(RuntimeError, match='"triton" cannot run here: the kernels run on CUDA'):
        ops.haar_dwt2(x, 1, backend="triton")
    monkeypatch.setattr(ops, "_backend", "auto")
    ops.set_backend("triton")
    with pytest.raises(RuntimeError, match="a tensor is on cpu"):
        ops.split_low_band(x, 1)
    assert ops.split_low_band(x, 1, backend="torch")[0].shape == (2, 2)
    with pytest.raises(ValueError, match="auto, triton, torch"):
        ops.set_backend("gpu")
    assert ops.get_backend() == "triton"


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_resize_of_a_known_size_copies_nothing_from_the_host(rule):
    """A copy waits for the device, and a captured graph takes none. What is made of numbers is marked `lift_fresh`."""

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    images = torch.zeros(1, 3, 30, 40)
    ops.resize_normalize(images, rule, size=16, backend="torch")
    with Called():
        ops.resize_normalize(images, rule, size=16, backend="torch")
    assert "aten.div.Tensor" in names and not [name for name in names if "lift_fresh" in name]
