"""Attention: rows of one length, windows, and packed documents, against what torch has.

Peers: SDPA pinned to FlashAttention-2 and to cuDNN, FlexAttention compiled, torch.nn.attention.varlen. Keys of grouped
heads go in as they are wherever a peer takes them. Of packed documents the peers' own preparation counts: Flex builds
its block mask, cuDNN gets padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bigtrain_kernels import attention_backward, attention_forward, reference
from bigtrain_kernels.attention_api import flash_attn_func, flash_attn_varlen_func
from bigtrain_kernels.attention_cost import pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.kernel_cases.case import DEVICE, KernelCase, Run, compiled, installed, poison, runs_of

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def hopper() -> bool:
    return DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9


def sdpa(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """(B, S, H, D), in and out."""
    with sdpa_kernel([backend]):
        parts = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True).transpose(1, 2)


def rows(
    B: int,
    S: int,
    H: int,
    K: int,
    D: int,
    part: str,
    *,
    causal: bool = True,
    window: int = 0,
    aims: Any = None,
) -> KernelCase:
    """Sequences of one length. `window`: how many keys a token sees, itself included."""
    left = window - 1 if window else -1

    def prepare(seed: int) -> dict[str, Run]:
        g = torch.Generator(DEVICE).manual_seed(seed)
        shapes = [(B, S, n, D) for n in (H, K, K)]
        parts = [torch.randn(s, generator=g, device=DEVICE, dtype=torch.bfloat16) for s in shapes]
        ours = partial(flash_attn_func, causal=causal, window_size=(left, -1))
        found: dict[str, Attend] = {"bigtrain": ours}
        found |= paths(left, 0 if causal else -1)
        if not window:
            for name, backend in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ):
                found[f"sdpa-{name}"] = partial(sdpa, backend, causal=causal)
        if causal:
            mask = create_block_mask(
                lambda b, h, m, n: (m >= n) & (m - n <= left) if window else m >= n,
                None,
                None,
                S,
                S,
                device=DEVICE,
            )
            found["flex"] = lambda q, k, v: compiled(flex_attention)(
                *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True
            ).transpose(1, 2)
        return runs_of(found, parts, part)

    work = (
        B * H * D * pairs(S, S, left, 0 if causal else -1) * {"forward": 4, "backward": 10, "both": 14}[part]
    )
    words = "causal" if causal else "full"
    name = f"attention {part} {words} B{B} S{S} H{H}/{K} D{D}" + (f" window {window}" if window else "")
    check = partial(error, [333, 200], H, K, D, left, 0 if causal else -1)
    return KernelCase(name, work, "TFLOP/s", prepare, check, aims or {})


class By(torch.autograd.Function):
    """Attention by given modules, whichever are taken by default."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, first: Any, second: Any, numbers: dict[str, Any]
    ) -> torch.Tensor:
        out, lse = first(q, k, v, None, None, None, **numbers)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.numbers = second, {"softcap": 0.0, **numbers}
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        given = (grad, torch.zeros_like(lse), q, k, v, out, lse, None, None)
        found = attention_backward.backward(*given, **ctx.numbers, kernels=ctx.kernels)
        return *found[:3], None, None, None


def paths(left: int, right: int) -> dict[str, Attend]:
    """Our portable kernels, and on Hopper those in Gluon, each by themselves."""

    def by(first: Any, second: Any) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            numbers = {"scale": q.shape[-1] ** -0.5, "left": left, "right": right}
            return By.apply(q, k, v, first, second, numbers)  # type: ignore[no-any-return, no-untyped-call]

        return attend

    found = {"bigtrain-portable": by(partial(attention_forward.forward, softcap=0.0), attention_backward)}
    if hopper():
        from bigtrain_kernels import attention_hopper, attention_hopper_backward

        found["bigtrain-hopper"] = by(attention_hopper.forward, attention_hopper_backward)
    return found


def lengths_of(total: int, mean: int, seed: int = 0) -> list[int]:
    """Lognormal lengths of documents, as web text has them, that fill `total` tokens."""
    g = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while sum(found) < total:
        length = int(
            torch.empty(1).log_normal_(0.0, 1.0, generator=g) * mean / 1.6487
        )  # e^0.5, the mean of it
        found.append(max(1, min(length, total - sum(found))))
    return found


def documents(total: int, mean: int, H: int, K: int, D: int, part: str, aims: Any = None) -> KernelCase:
    """Causal attention within packed documents."""
    lengths = lengths_of(total, mean)
    longest = max(lengths)

    def prepare(seed: int) -> dict[str, Run]:
        g = torch.Generator(DEVICE).manual_seed(seed)
        parts = [
            torch.randn(total, n, D, generator=g, device=DEVICE, dtype=torch.bfloat16) for n in (H, K, K)
        ]
        sizes = torch.tensor(lengths, device=DEVICE)
        cu = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=DEVICE), sizes)
        place = torch.arange(total, device=DEVICE) - cu[owner]

        def flex_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = compiled(create_block_mask)(
                lambda b, h, m, n: (m >= n) & (owner[m] == owner[n]), None, None, total, total, device=DEVICE
            )
            parts = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(flex_attention)(*parts, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            wide = (
                x.new_zeros(len(lengths), longest, *x.shape[1:]).index_put((owner, place), x)
                for x in (q, k, v)
            )
            return sdpa(SDPBackend.CUDNN_ATTENTION, *wide, causal=True)[owner, place]

        found: dict[str, Attend] = {
            "bigtrain": lambda q, k, v: flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, causal=True
            ),
            "flex": flex_documents,
            "cudnn-padded": padded,
        }
        if installed("torch.nn.attention.varlen"):
            found["torch-varlen"] = partial(varlen, cu, longest)
        return runs_of(found, parts, part)

    work = H * D * sum(pairs(n, n, -1, 0) for n in lengths) * {"forward": 4, "backward": 10, "both": 14}[part]
    name = f"attention {part} packed T{total} mean {mean} H{H}/{K} D{D}"
    return KernelCase(
        name, work, "TFLOP/s", prepare, partial(error, [129, 0, 1, 300], H, K, D, -1, 0), aims or {}
    )


def varlen(cu: torch.Tensor, longest: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's own, whose arguments changed: 2.11 takes is_causal and as many key heads as query heads."""
    from torch.nn.attention.varlen import varlen_attn

    f: Any = varlen_attn
    names = f.__code__.co_varnames if hasattr(f, "__code__") else ()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out: torch.Tensor = f(q, k, v, cu, cu, longest, longest, **options)
    return out


def error(lengths: list[int], H: int, K: int, D: int, left: int, right: int, seed: int) -> float:
    """The largest error of output and gradients, over twice what the same formula in torch and bf16 has."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    if DEVICE == "cpu":  # the interpreter is slow
        lengths, H, K = [n // 4 for n in lengths], H // K, 1
    T = sum(lengths)
    parts = [torch.randn(T, n, D, generator=g, device=DEVICE, dtype=torch.bfloat16) for n in (H, K, K, H)]
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).tolist()
    cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    numbers: Any = {"scale": D**-0.5, "left": left, "right": right}

    def plain(kind: torch.dtype) -> list[torch.Tensor]:
        q, k, v, grad = (x.to(kind) for x in parts)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = reference.attention(*leaves, ends, ends, **numbers)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    poison(DEVICE)
    dense = [x[None] for x in parts]
    out, lse = attention_forward.forward(*dense[:3], cu, cu, None, **numbers, softcap=0.0)
    given = (dense[3], torch.zeros_like(lse), *dense[:3], out, lse, cu, cu)
    grads = attention_backward.backward(*given, **numbers, softcap=0.0)
    kinds = [[out[0], *(x[0] for x in grads[:3])]]
    if hopper() and D in (64, 128):
        from bigtrain_kernels import attention_hopper, attention_hopper_backward

        poison(DEVICE)
        fast, _ = attention_hopper.forward(*dense[:3], cu, cu, None, **numbers)
        grads = attention_backward.backward(*given, **numbers, softcap=0.0, kernels=attention_hopper_backward)
        kinds.append([fast[0], *(x[0] for x in grads[:3])])
    worst = 0.0
    exact, rough = plain(torch.float64), plain(torch.bfloat16)
    for ours in kinds:
        for found, wanted, torchs in zip(ours, exact, rough, strict=True):
            allowed = 2 * (torchs - wanted).abs().max() + 1e-5
            difference = float((found - wanted).abs().max() / allowed)
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


CASES = [
    rows(2, 8192, 32, 8, 128, "forward", aims={"sdpa-flash": 1.15, "sdpa-cudnn": 0.90}),
    rows(2, 8192, 32, 8, 128, "backward", aims={"sdpa-flash": 1.0, "sdpa-cudnn": 0.85}),
    rows(8, 2048, 32, 8, 128, "forward"),
    rows(8, 2048, 32, 8, 128, "backward"),
    rows(2, 8192, 32, 8, 128, "forward", causal=False),
    rows(2, 8192, 32, 8, 64, "forward"),
    rows(2, 8192, 32, 8, 64, "backward"),
    rows(1, 16384, 32, 8, 128, "both", window=1024),
    documents(32768, 1500, 32, 8, 128, "forward"),
    documents(
        32768, 1500, 32, 8, 128, "both", aims=dict.fromkeys(("torch-varlen", "flex", "cudnn-padded"), 1.4)
    ),
]
