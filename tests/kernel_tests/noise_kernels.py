"""Kernels that write down what `ses_fast.kernels.philox` draws, for the interpreter's tests and the GPU's."""

import triton
import triton.language as tl

from ses_fast.kernels import philox


@triton.jit(do_not_specialize=["seed", "generation", "candidate"])
def words_kernel(
    out,  # [4, SIZE] int64
    seed,
    generation,
    candidate,
    SIZE: tl.constexpr,
):
    d = tl.arange(0, SIZE)
    seed, generation, candidate = philox.number(seed), philox.number(generation), philox.number(candidate)
    w0, w1, w2, w3 = philox.words(seed, generation, candidate, d)
    tl.store(out + d, w0.to(tl.int64))
    tl.store(out + SIZE + d, w1.to(tl.int64))
    tl.store(out + 2 * SIZE + d, w2.to(tl.int64))
    tl.store(out + 3 * SIZE + d, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(
    w,  # [SIZE] int64, words
    radius,  # [SIZE] fp32, and so the next two
    cosine,
    sine,
    SIZE: tl.constexpr,
):
    i = tl.arange(0, SIZE)
    b_w = tl.load(w + i).to(tl.uint32)
    tl.store(radius + i, philox.radius(b_w))
    tl.store(cosine + i, philox.cosine(b_w, tl.zeros([SIZE], tl.uint32)))
    tl.store(sine + i, philox.cosine(b_w, tl.full([SIZE], 1, tl.uint32)))
