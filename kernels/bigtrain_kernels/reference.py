"""The definitions, in plain PyTorch and any precision: what every kernel of this package is compared with."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: list[int],
    cu_k: list[int],
    *,
    scale: float,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Document by document with whole score matrices; see attention.flash_attn_varlen_func."""
    H, group = q.shape[1], q.shape[1] // k.shape[1]
    out = []
    lses = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        M, N = q1 - q0, k1 - k0
        kk, vv = (x[k0:k1].repeat_interleave(group, 1) for x in (k, v))
        s = torch.einsum("mhd,nhd->hmn", q[q0:q1], kk) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        position = torch.arange(M, device=q.device)[:, None] + N - M
        n = torch.arange(N, device=q.device)
        seen = torch.ones(M, N, dtype=torch.bool, device=q.device)
        if right >= 0:
            seen &= n - position <= right
        if left >= 0:
            seen &= position - n <= left
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(H, M, 1)], -1)
            vv = torch.cat([vv, vv.new_zeros(1, *vv.shape[1:])])
        lse = s.logsumexp(-1) if s.shape[-1] else s.new_full((H, M), -torch.inf)
        p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        out.append(torch.einsum("hmn,nhd->mhd", p, vv))
        lses.append(lse)
    return torch.cat(out), torch.cat(lses, 1)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Loss by token (T,) of whole logits (T, V); see cross_entropy.cross_entropy."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != ignore_index
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets.where(counted, 0)[:, None]).squeeze(1)
    eps = label_smoothing
    loss = (1 - eps) * (lse - picked) + eps * (lse - logits.mean(-1)) + z_loss * lse.square()
    return loss.where(counted, 0.0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) x weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) x weight + bias over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up."""
    return gate * torch.sigmoid(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + D/2) of x (T, H, D) turned by its angle; cos and sin (T, D/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def adamw(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parameter and both moments after update number `step`, counted from 1; see adamw.adamw_."""
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient.square()
    size = (second / (1 - betas[1] ** step)).sqrt() + eps
    return parameter * (1 - lr * weight_decay) - lr * first / (1 - betas[0] ** step) / size, first, second
