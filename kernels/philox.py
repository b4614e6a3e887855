"""The noise of `ses_fast.reference.philox_normal`, drawn in a kernel: the same words, normals to 2e-6."""

import triton
import triton.language as tl


@triton.jit
def number(x):
    """An int argument, or what a pointer to a 0-d int64 tensor holds."""
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.int64)


@triton.jit
def words(seed, generation, candidate, d):
    """The Philox4x32-10 words of coefficients `d`: key (seed's low and high word), counter (d // 4, candidate, ...)."""
    return tl.philox(seed, (d >> 2).to(tl.uint32), candidate.to(tl.uint32), generation.to(tl.uint32), 0)


@triton.jit
def normal(seed, generation, candidate, d):
    """Box-Muller of the words of coefficients `d`, each the cosine or the sine of one of the two pairs."""
    w0, w1, w2, w3 = words(seed, generation, candidate, d)
    second = (d & 2) != 0
    return radius(tl.where(second, w2, w0)) * cosine(tl.where(second, w3, w1), (d & 1).to(tl.uint32))


@triton.jit
def radius(w):
    """sqrt(-2 ln u), u = (w + 0.5) / 2^32.

    Near u = 1 the logarithm hangs on 1 - u, which fp32 cannot hold as u: it comes from the complement of w instead.
    So u = 2^e (1 + t) with t in [sqrt(1/2) - 1, sqrt(2) - 1], exact where it is small, and ln(1 + t) is a polynomial.
    """
    upper = w >= 0x80000000
    v = (tl.minimum(w, w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32  # the distance to 0 or 1
    u = tl.where(upper, 1.0 - v, v)
    e = (u.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23  # 0x3F3504F3: sqrt(1/2)
    t = (u.to(tl.int32, bitcast=True) - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    t = tl.where(e == 0, -v, t)
    p = 0.08672134578227997 * t - 0.14379027485847473
    p = p * t + 0.14978018403053284
    p = p * t - 0.16564422845840454
    p = p * t + 0.19954873621463776
    p = p * t - 0.250016987323761
    p = p * t + 0.33334165811538696
    logarithm = e.to(tl.float32) * 0.6931471805599453 + ((p * t - 0.5) * t * t + t)
    return tl.sqrt_rn(-2.0 * logarithm)


@triton.jit
def cosine(w, quarters):
    """cos(2 pi u - quarters * pi / 2), u = (w + 0.5) / 2^32, by quarter turns that are taken off exactly.

    `tl.cos` would bring a slow path for large angles, and with it a stack.
    """
    k = (w + 0x20000000) >> 30  # the nearest quarter turn, 0 ... 4 wrapped to 0 ... 3
    angle = ((w - (k << 30)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * (6.283185307179586 * 2.0**-32)
    q = angle * angle
    odd = ((-0.00019495633023325354 * q + 0.00833197869360447) * q - 0.16666650772094727) * q * angle + angle
    even = ((2.4438448235741816e-05 * q - 0.001388736767694354) * q + 0.04166664555668831) * q - 0.5
    even = even * q + 1.0
    k = k - quarters
    turned = tl.where((k & 1) != 0, odd, even)  # cos(a + k pi/2): cos a, -sin a, -cos a, sin a
    return tl.where(((k + 1) & 2) != 0, -turned, turned)
