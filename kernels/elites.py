"""The elite update in one launch: the k best of those so far and a generation, their mean and variance.

A program takes some coefficients and ranks all scores for itself, which is cheaper than a second launch: a score's
place is the number of scores that are better, or as good and earlier. That is a stable sort without sorting.
Bytes: the elites once and of the generation the new ones, the elites, mean and variance written (4 each).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ses_fast import reference
from ses_fast.reference import Elites, check_elites

POOL = 128  # scores at most: each is compared with each in registers
TILE = 1024  # numbers of the elites that a program holds: 8 a thread


@triton.jit
def score_of(i, scores, elite_scores, before, popsize):
    """Score i in fp64, the elites' first; minus infinity for one that is not finite or not there."""
    is_new = (i >= before) & (i < before + popsize)
    b_new = tl.load(scores + (i - before), is_new, other=0).to(tl.float64)
    b_new = tl.where(is_new & (tl.abs(b_new) < float("inf")), b_new, float("-inf"))
    return tl.where(i < before, tl.load(elite_scores + i, i < before, other=0.0), b_new)


@triton.jit(do_not_specialize=["before", "popsize", "kept"])
def update_elites_kernel(
    low,  # [P, D]
    scores,  # [P], any real dtype
    elite_low,  # [before, D]
    elite_scores,  # [before] fp64
    mean,  # [D]
    variance,  # [D]
    new_low,  # [kept, D], and so on: what comes of them
    new_scores,
    new_mean,
    new_variance,
    told,  # [P] fp64, minus infinity for a score that is not finite
    before,  # elites so far
    popsize,
    kept,  # elites now
    size,  # D
    N: tl.constexpr,  # at least before + popsize
    K: tl.constexpr,  # at least kept
    D: tl.constexpr,  # coefficients of a program
):
    i_n, i_k = tl.arange(0, N), tl.arange(0, K)
    b_scores = score_of(i_n, scores, elite_scores, before, popsize)  # [N]
    better = b_scores[None, :] > b_scores[:, None]
    earlier = (b_scores[None, :] == b_scores[:, None]) & (i_n[None, :] < i_n[:, None])
    rank = tl.sum((better | earlier).to(tl.int32), 1)  # [N] those past the end are last

    is_kth = rank[None, :] == i_k[:, None]  # [K, N]
    best = tl.sum(tl.where(is_kth, i_n[None, :], 0), 1)  # [K]
    best_scores = score_of(best, scores, elite_scores, before, popsize)
    m_k = i_k < kept
    weighs = m_k & (best_scores > float("-inf"))

    d = tl.program_id(0) * D + tl.arange(0, D)
    m_d = d < size
    m = m_k[:, None] & m_d[None, :]
    p_best = tl.where(best < before, elite_low + best.to(tl.int64) * size, low + (best - before).to(tl.int64) * size)
    b_low = tl.load(p_best[:, None] + d[None, :], m, other=0.0)  # [K, D]

    count = tl.sum(weighs.to(tl.float32), 0)
    b_weight = weighs[:, None]
    b_mean = tl.sum(tl.where(b_weight, b_low, 0.0), 0) / tl.maximum(count, 1.0)  # [D]
    b_rest = tl.where(b_weight, b_low - b_mean[None, :], 0.0)
    b_variance = tl.sum(b_rest * b_rest, 0) / tl.maximum(count - 1.0, 1.0) + 1e-7
    b_mean = tl.where(count > 0.0, b_mean, tl.load(mean + d, m_d, other=0.0))
    b_variance = tl.where(count > 1.0, b_variance, tl.load(variance + d, m_d, other=0.0))

    tl.store(new_low + i_k.to(tl.int64)[:, None] * size + d[None, :], b_low, m)
    tl.store(new_mean + d, b_mean, m_d)
    tl.store(new_variance + d, b_variance, m_d)
    if tl.program_id(0) == 0:
        tl.store(new_scores + i_k, best_scores, m_k)
        tl.store(told + (i_n - before), b_scores, (i_n >= before) & (i_n < before + popsize))


def unfit(popsize: int, k_elites: int) -> str | None:
    """Why the kernel cannot take a generation of this size, or None where it can."""
    if popsize + k_elites > POOL:
        return f"the kernel ranks at most {POOL} scores, and popsize + k_elites is {popsize + k_elites}"
    return None


def update_elites(
    low: Tensor,  # [P, D] fp32
    scores: Tensor,  # [P], any real dtype
    elite_low: Tensor,  # [K, D] fp32, the best first, K <= k_elites
    elite_scores: Tensor,  # [K] fp64
    mean: Tensor,  # [D] fp32
    variance: Tensor,  # [D] fp32
    *,
    k_elites: int,
) -> Elites:
    check_elites(low, scores, elite_low, elite_scores, mean, variance, k_elites)
    if reason := unfit(len(scores), k_elites):
        raise ValueError(reason)
    call = _op if torch.compiler.is_compiling() else _update
    return Elites(*call(low, scores, elite_low, elite_scores, mean, variance, k_elites))


def _outputs(
    low: Tensor,  # [P, D]
    scores: Tensor,  # [P]
    elite_low: Tensor,  # [K, D]
    elite_scores: Tensor,  # [K]
    mean: Tensor,  # [D]
    variance: Tensor,  # [D]
    k_elites: int,
) -> list[Tensor]:  # as `Elites`
    kept = min(k_elites, len(elite_scores) + len(scores))
    shapes = [(kept, mean.numel()), mean.shape, mean.shape]
    new_low, new_mean, new_variance = (mean.new_empty(shape) for shape in shapes)
    return [new_low, elite_scores.new_empty(kept), new_mean, new_variance, elite_scores.new_empty(scores.shape)]


def _update(
    low: Tensor,  # [P, D]
    scores: Tensor,  # [P]
    elite_low: Tensor,  # [K, D]
    elite_scores: Tensor,  # [K]
    mean: Tensor,  # [D]
    variance: Tensor,  # [D]
    k_elites: int,
) -> list[Tensor]:  # as `Elites`
    before, popsize, size = len(elite_scores), len(scores), mean.numel()
    out = _outputs(low, scores, elite_low, elite_scores, mean, variance, k_elites)
    N = triton.next_power_of_2(popsize + k_elites)  # also in the first generation, which has no elites yet
    K = triton.next_power_of_2(k_elites)
    D = min(TILE // K, max(16, triton.next_power_of_2(size)))
    given = (low, scores, elite_low, elite_scores, mean, variance)
    update_elites_kernel[(triton.cdiv(size, D),)](
        *(tensor.detach().contiguous() for tensor in given),
        *out,
        before,
        popsize,
        len(out[0]),
        size,
        N=N,
        K=K,
        D=D,
        num_warps=4 if N <= 32 else 8,
    )
    return out


# An operator to torch.compile, so that it neither breaks the graph nor looks inside.
_op = torch.library.custom_op("ses_fast::update_elites", _update, mutates_args=())
_op.register_fake(_outputs)

update_elites.__doc__ = reference.update_elites.__doc__
