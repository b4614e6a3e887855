"""The elite update in one launch: the k best of those so far and a generation, their mean and variance.

A program takes some coefficients and ranks all scores for itself, which is cheaper than a second launch: a score's
place is the number of scores that are better, or as good and earlier. That is a stable sort without sorting.
Bytes: the elites once and of the generation the new ones, the elites, mean and variance written (4 each).
"""

import triton
import triton.language as tl
from torch import Tensor

from ses_fast.custom_op import operator
from ses_fast.reference import Elites, documented

POOL = 128  # scores at most: each is compared with each in registers
TILE = 1024  # numbers of the elites that a program holds: 8 a thread


@triton.jit
def score_of(i, scores, elite_scores, before, popsize):
    """Score i in fp64, the elites' first; -inf for one that is not finite or past the end."""
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
    new_low,  # [kept, D], and so on: the outputs
    new_scores,
    new_mean,
    new_variance,
    finite,  # [P] fp64, the scores, -inf for one that is not finite
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
    m_used = m_k & (best_scores > float("-inf"))

    d = tl.program_id(0) * D + tl.arange(0, D)
    m_d = d < size
    m = m_k[:, None] & m_d[None, :]
    p_best = tl.where(best < before, elite_low + best.to(tl.int64) * size, low + (best - before).to(tl.int64) * size)
    b_low = tl.load(p_best[:, None] + d[None, :], m, other=0.0)  # [K, D]

    count = tl.sum(m_used.to(tl.float32), 0)
    b_used = m_used[:, None]
    b_mean = tl.sum(tl.where(b_used, b_low, 0.0), 0) / tl.maximum(count, 1.0)  # [D]
    b_rest = tl.where(b_used, b_low - b_mean[None, :], 0.0)
    b_variance = tl.sum(b_rest * b_rest, 0) / tl.maximum(count - 1.0, 1.0) + 1e-7
    b_mean = tl.where(count > 0.0, b_mean, tl.load(mean + d, m_d, other=0.0))
    b_variance = tl.where(count > 1.0, b_variance, tl.load(variance + d, m_d, other=0.0))

    tl.store(new_low + i_k.to(tl.int64)[:, None] * size + d[None, :], b_low, m)
    tl.store(new_mean + d, b_mean, m_d)
    tl.store(new_variance + d, b_variance, m_d)
    if tl.program_id(0) == 0:
        tl.store(new_scores + i_k, best_scores, m_k)
        tl.store(finite + (i_n - before), b_scores, (i_n >= before) & (i_n < before + popsize))


def unfit(popsize: int, k_elites: int) -> str | None:
    """Why the kernel cannot take a generation of this size, or None where it can."""
    if popsize + k_elites > POOL:
        return f"the kernel ranks at most {POOL} scores, and popsize + k_elites is {popsize + k_elites}"
    return None


@documented
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
    if reason := unfit(len(scores), k_elites):
        raise ValueError(reason)
    kept = min(k_elites, len(elite_scores) + len(scores))
    out = Elites(
        mean.new_empty(kept, mean.numel()),
        elite_scores.new_empty(kept),
        mean.new_empty(mean.shape),
        mean.new_empty(mean.shape),
        elite_scores.new_empty(scores.shape),
    )
    fill_elites(low, scores, elite_low, elite_scores, mean, variance, list(out), k_elites)
    return out


@operator("out")
def fill_elites(
    low: Tensor,  # [P, D]
    scores: Tensor,  # [P]
    elite_low: Tensor,  # [before, D]
    elite_scores: Tensor,  # [before]
    mean: Tensor,  # [D]
    variance: Tensor,  # [D]
    out: list[Tensor],  # as `Elites`
    k_elites: int,
) -> None:
    before, popsize, size = len(elite_scores), len(scores), mean.numel()
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
