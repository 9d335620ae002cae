"""Cross-entropy of rows of logits in Triton: a row a program, the gradient in place of the logits if wanted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sums(
    LOGITS, TARGETS, PEAK, TOTAL, PICKED, SUM, stride, V, first, softcap,
    BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """What a row's loss needs of its V logits, which are those from `first` on of the whole vocabulary.

    PEAK: the largest; TOTAL: sum of exp(logit - PEAK); PICKED: the target's logit, 0 if it is elsewhere; SUM: of all,
    for label smoothing. fp32 (fp64 of fp64), in a fixed order. A NaN among the logits reaches TOTAL.
    """
    E: tl.constexpr = TOTAL.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x0 = LOGITS + row * stride
    target = tl.load(TARGETS + row) - first
    peak = tl.full([BLOCK], float("-inf"), E)
    total = tl.zeros([BLOCK], E)
    plain = tl.zeros([BLOCK], E)
    picked = tl.zeros([BLOCK], E)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(x0 + v, mask=v < V, other=float("-inf")).to(E)
        if CAP:
            x = tl.where(v < V, softcap * (1 - 2 / (1 + tl.exp(2 * x / softcap))), float("-inf"))
        new = tl.maximum(peak, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        plain += tl.where(v < V, x, 0.0)
        picked += tl.where((v == target) & (v < V), x, 0.0)  # another rank may have the target
        peak = new
    most = tl.max(peak, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    tl.store(PEAK + row, most)
    tl.store(TOTAL + row, tl.sum(total * tl.exp(peak - base), 0))
    tl.store(PICKED + row, tl.sum(picked, 0))
    tl.store(SUM + row, tl.sum(plain, 0))


@triton.jit
def gradient(
    LOGITS, TARGETS, LSE, WEIGHT, OUT, stride, out_stride, V, first, vocabulary, softcap, smoothing, z_loss,
    BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """A row of OUT, which may be LOGITS: WEIGHT x the gradient of its loss; WEIGHT 0: nothing counts.

    loss = (1 - e) (lse - logit[target]) + e (lse - mean of logits) + z lse^2, with e `smoothing` and z `z_loss`; its
    gradient by logit v is p_v (1 + 2 z lse) - e / vocabulary - (1 - e) [v = target].
    """
    row = tl.program_id(0).to(tl.int64)
    x0 = LOGITS + row * stride
    out = OUT + row * out_stride
    target = tl.load(TARGETS + row) - first
    lse = tl.load(LSE + row)
    weight = tl.load(WEIGHT + row)
    scale = 1 + 2 * z_loss * lse
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(x0 + v, mask=v < V, other=0.0).to(LSE.dtype.element_ty)
        slope = 1.0
        if CAP:
            share = 1 - 2 / (1 + tl.exp(2 * x / softcap))
            x = softcap * share
            slope = 1 - share * share
        g = tl.exp(x - lse) * scale - smoothing / vocabulary
        g = tl.where(v == target, g - (1 - smoothing), g)
        g = tl.where(weight == 0, 0.0, g * slope * weight)  # 0 also where an ignored row is not finite
        tl.store(out + v, g.to(OUT.dtype.element_ty), mask=v < V)
