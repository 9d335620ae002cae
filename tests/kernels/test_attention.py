"""Fused attention against the definition in float64: forward, backward, every option, odd shapes, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bigtrain_kernels import reference
from bigtrain_kernels.attention import attention, attention_gradients
from bigtrain_kernels.attention_api import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from bigtrain_kernels.attention_cost import attention_bytes, pairs
from bigtrain_kernels.attention_path import choose
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def never() -> str:
    """A GPU is asked only where the answer matters."""
    raise AssertionError("asked")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cu(lengths: list[int]) -> list[int]:
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return total


def made(
    queries: list[int], keys: list[int], H: int, K: int, D: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v and the gradients of out and lse, of normal numbers."""
    g = torch.Generator().manual_seed(seed)
    T, N = sum(queries), sum(keys)
    shapes = [(T, H, D), (N, K, D), (N, K, D), (T, H, D)]
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes] + [
        torch.randn(H, T, generator=g).to(DEVICE)
    ]


def results(
    run: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor,
    *more: Any,
) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *more)]
    out, lse = run(*leaves)
    seen = torch.isfinite(lse)
    (out * do.to(out.dtype)).sum().add((lse.masked_fill(~seen, 0) * dlse).sum()).backward()
    named = dict(zip(("dq", "dk", "dv", "dsinks"), (x.grad for x in leaves), strict=False))
    return {"out": out.detach(), "lse": lse.detach().masked_fill(~seen, -1e4), **named}


def compare(
    queries: list[int],
    keys: list[int],
    H: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: bool = False,
) -> None:
    """No further from float64 than twice what the same formula in torch and `dtype` is, and roundings in fp32."""
    parts = made(queries, keys, H, K, D, dtype)
    more = [torch.linspace(-1, 2, H, device=DEVICE)] if sinks else []
    right = 0 if causal else window[1]
    options = {"scale": D**-0.5, "left": window[0], "right": right, "softcap": softcap}

    def plain(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
        return reference.attention(q, k, v, cu(queries), cu(keys), **options, sinks=sinks)  # type: ignore[arg-type]

    def fused(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
        ends = (torch.tensor(cu(x), dtype=torch.int32, device=DEVICE) for x in (queries, keys))
        return flash_attn_varlen_func(
            q, k, v, *ends, max(queries, default=0), max(keys, default=0), causal=causal, window_size=window,
            softcap=softcap, sinks=sinks, return_lse=True,
        )  # fmt: skip

    exact = results(plain, *(x.double() for x in parts), *(x.double() for x in more))
    torchs = results(plain, *parts, *more)
    ours = results(fused, *parts, *more)
    eps = torch.finfo(torch.float32).eps
    for name, wanted in exact.items():
        assert not ours[name].isnan().any(), name
        if not wanted.numel():
            continue
        # What fp32 cannot help: scores, and lse, are taken in units of log2(e) and back. In ds = p (dp - delta) two
        # sums of D products, each of about 1, may cancel: with one key in sight they do, and torch's ds is 0.
        size = float(wanted[wanted > -1e3].abs().max().clamp(min=1.0))
        if name in ("dq", "dk"):
            size += D * options["scale"] * float(max(x.abs().max() for x in parts[:2]))
        allowed = 2 * (torchs[name] - wanted).abs().max() + 2 * eps * size
        error = (ours[name] - wanted).abs().max()
        assert error <= allowed, f"{name}: {float(error):.2e}, allowed {float(allowed):.2e}"
        assert ours[name].dtype == (torch.float32 if name in ("lse", "dsinks") else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("H", "K", "D", "causal"), [(2, 2, 32, True), (4, 2, 64, False), (3, 1, 80, True), (2, 1, 128, True)]
)
def test_one_sequence(H: int, K: int, D: int, causal: bool, dtype: torch.dtype) -> None:
    compare([65], [65], H, K, D, dtype, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_odd_lengths_and_empty_ones(causal: bool) -> None:
    compare([1, 0, 37, 64, 33], [1, 0, 37, 64, 33], 2, 1, 32, torch.float32, causal=causal)


@pytest.mark.parametrize("window", [(0, -1), (5, -1), (40, 0), (7, 9), (-1, 3), (100, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window: tuple[int, int], causal: bool) -> None:
    compare([70, 20], [70, 20], 2, 2, 32, torch.float32, causal=causal, window=window)


def test_more_keys_than_queries_and_the_other_way() -> None:
    """The second: its first rows see no key, and give zeros, no NaN."""
    compare([5, 40], [69, 41], 2, 1, 32, torch.float32, causal=True)
    compare([69, 33, 6], [5, 33, 0], 2, 1, 32, torch.float32, causal=True)
    compare([69, 6], [5, 0], 2, 1, 32, torch.bfloat16)
    compare([50], [70], 2, 1, 32, torch.float32, causal=True, window=(11, -1))


def test_softcap_and_sinks() -> None:
    compare([50], [50], 2, 1, 32, torch.float32, causal=True, softcap=1.5)
    compare([50, 9], [50, 9], 4, 2, 32, torch.float32, causal=True, sinks=True)
    compare([40, 5], [3, 0], 4, 2, 32, torch.bfloat16, causal=True, sinks=True, softcap=2.0, window=(9, -1))


def test_the_largest_head() -> None:
    compare([40], [40], 1, 1, 256, torch.float32, causal=True)


def test_sequences_of_one_length_as_torch_does() -> None:
    q, k, v = (torch.randn(2, n, h, 32, device=DEVICE) for n, h in ((33, 4), (33, 2), (33, 2)))
    wanted = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=True), wanted.transpose(1, 2))
    out, lse = flash_attn_func(q, k, v, return_lse=True, softmax_scale=0.3)
    assert out.shape == q.shape
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, 2)) * 0.3
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize(("S", "N"), [(33, 33), (20, 33), (33, 20)])
def test_in_place_of_torchs_own(S: int, N: int) -> None:
    """Aligned at the start, as torch's; heads before tokens in memory, so the strides of this layout too."""
    parts = [torch.randn(2, h, n, 32, device=DEVICE, requires_grad=True) for h, n in ((4, S), (2, N), (2, N))]
    for causal in (True, False):
        found, wanted = (
            f(*parts, is_causal=causal, enable_gqa=True, scale=0.2)
            for f in (scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(found, wanted)
        grad = torch.randn_like(wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found, parts, grad), torch.autograd.grad(wanted, parts, grad)
        )
    with pytest.raises(ValueError, match="enable_gqa is False, and key has 2 heads where query has 4"):
        scaled_dot_product_attention(*parts)
    with pytest.raises(ValueError, match="attn_mask is given"):
        scaled_dot_product_attention(*parts, attn_mask=torch.ones(S, N))  # type: ignore[arg-type]


def test_parts_of_the_keys_merge_by_their_log_sum_exp() -> None:
    """What ring attention does: two halves of the keys, each with its lse, are the whole; gradients too."""
    q, k, v, do, _ = made([40], [64], 2, 1, 32, torch.float32)
    for x in (q, k, v):
        x.requires_grad_()

    def part(k: torch.Tensor, v: torch.Tensor) -> Any:
        return flash_attn_func(q[None], k[None], v[None], return_lse=True)

    whole = part(k, v)[0]
    wanted = torch.autograd.grad((whole * do).sum(), (q, k, v))
    (o1, l1), (o2, l2) = part(k[:30], v[:30]), part(k[30:], v[30:])
    share = torch.sigmoid(l1 - l2).transpose(1, 2)[..., None]
    merged = share * o1 + (1 - share) * o2
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(torch.autograd.grad((merged * do).sum(), (q, k, v)), wanted)


def test_any_strides_also_of_the_gradient() -> None:
    q, k, v = (
        torch.randn(33, 64, 2, device=DEVICE).transpose(1, 2) for _ in range(3)
    )  # D is not the last in memory
    wide = torch.randn(33, 2, 3, 64, device=DEVICE)
    for parts in ((q, k, v), wide.unbind(2)):
        leaves = [x.detach().requires_grad_() for x in parts]
        copies = [x.detach().contiguous().requires_grad_() for x in parts]
        for given in (leaves, copies):
            flash_attn_func(*(x[None] for x in given), causal=True).sum().backward()  # a gradient of stride 0
        for a, b in zip(leaves, copies, strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_the_same_bits_every_time() -> None:
    parts = made([70, 31], [70, 31], 4, 2, 64, torch.bfloat16)
    ends = torch.tensor([0, 70, 101], dtype=torch.int32, device=DEVICE)

    def run(q: Any, k: Any, v: Any) -> Any:
        return flash_attn_varlen_func(q, k, v, ends, ends, 70, 70, causal=True, return_lse=True)

    one, two = results(run, *parts), results(run, *parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_recomputed_and_compiled() -> None:
    q, k, v, do, _ = made([33], [33], 2, 1, 32, torch.float32)
    leaves = [x[None].requires_grad_() for x in (q, k, v)]

    def run(*parts: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(*(x * 1.5 for x in parts), causal=True)  # type: ignore[no-any-return]

    wanted = torch.autograd.grad((run(*leaves) * do).sum(), leaves)
    again = checkpoint(run, *leaves, use_reentrant=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted, torch.autograd.grad((again * do).sum(), leaves), strict=True)
    )
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad((compiled(*leaves) * do).sum(), leaves)
    torch.testing.assert_close(found, wanted)


def test_the_operators_follow_torchs_rules() -> None:
    q, k, v, do, _ = made([20, 13], [20, 13], 2, 1, 32, torch.float32)
    ends = torch.tensor([0, 20, 33], dtype=torch.int32, device=DEVICE)
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    dense = [x[None].requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention, (*dense, ends, ends, sinks, 0.2, -1, 0, 0.0))
    torch.library.opcheck(attention, (*dense, None, None, None, 0.2, 3, 0, 0.0))
    with torch.no_grad():
        out, lse = attention(*dense, ends, ends, sinks, 0.2, -1, 0, 0.0)
        expanded = do[:1, :1, :1].expand(1, 33, 2, 32)
        for grad in (do[None], expanded):
            torch.library.opcheck(
                attention_gradients, (grad, lse, *dense, out, lse, ends, ends, 0.2, -1, 0, 0.0)
            )


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """A tensor of 2^31 + some elements, of which only the pages in use exist: rows far apart, by their stride."""
    S, stride = 40, 2**31 // 39
    stride += -stride % 16
    wide = torch.empty(S * stride + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (1, S, 2, 32), (1, stride, 32, 1)
    )
    plain = torch.randn(1, S, 2, 32).to(DEVICE, torch.bfloat16)
    wide.copy_(plain)
    assert wide.stride(1) * (S - 1) >= 2**31
    grads = []
    for x in (wide, plain):
        x.requires_grad_()
        out = flash_attn_func(x, x, x, causal=True)
        grads.append((out, *torch.autograd.grad(out.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_operations_are_counted() -> None:
    """4 D operations forward for each pair of a query and a key that see each other, 10 D backward."""
    assert pairs(4, 4, -1, 0) == 10
    assert pairs(2, 4, -1, 0) == 3 + 4
    assert pairs(4, 2, -1, 0) == 0 + 0 + 1 + 2
    assert pairs(5, 5, 1, 0) == 1 + 2 * 4
    tensors = 2 * (33 * 2 * 32 + 33 * 1 * 32) * 2  # q, out, k, v in 16 bits
    assert attention_bytes((1, 33, 2, 32), (1, 33, 1, 32)) == tensors + 4 * 33 * 2
    assert attention_bytes((1, 33, 2, 32), (1, 33, 1, 32), backward=True) == 2 * tensors + 4 * 33 * 2
    q, k, v, _, _ = made([20, 13], [20, 13], 2, 1, 32, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 20, 33], dtype=torch.int32, device=DEVICE)
    seen = pairs(20, 20, -1, 0) + pairs(13, 13, -1, 0)
    with FlopCounterMode(display=False) as counter:
        flash_attn_varlen_func(*leaves, ends, ends, 20, 20, causal=True).sum().backward()
    assert counter.get_total_flops() == 14 * 32 * 2 * seen
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(*(x[None] for x in leaves), window_size=(3, 0))
    assert counter.get_total_flops() == 4 * 32 * 2 * pairs(33, 33, 3, 0)


def test_a_gradient_of_minus_infinity_does_no_harm() -> None:
    """Rows that see no key have lse -inf; what a caller computes with it may have NaN for a gradient."""
    q, k, v, do, _ = made([9], [5], 2, 1, 32, torch.float32)
    leaves = [x[None].requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*leaves, causal=True, return_lse=True)
    assert (lse[:, :, :4] == -torch.inf).all()
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    dlse = torch.zeros_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    found = torch.autograd.grad((out, lse), leaves, (do[None], dlse))
    assert all(x.isfinite().all() for x in found)
    assert torch.equal(found[0][:, :4], torch.zeros_like(found[0][:, :4]))


@pytest.mark.parametrize(
    ("changed", "path", "why"),
    [
        ({}, "hopper", "passed their test"),
        ({"wanted": "portable"}, "portable", "asked for"),
        ({"capability": (10, 0)}, "portable", "10.0, not 9.0"),
        ({"capability": (8, 0), "wanted": "hopper"}, "portable", "8.0, not 9.0"),
        ({"dim": 96}, "portable", "heads of 96"),
        ({"softcap": 3.0}, "portable", "softcap"),
        ({"dtype": torch.float32}, "portable", "float32"),
        ({"fault": lambda: "dq: 0.3 apart"}, "portable", "failed their test, report it: dq: 0.3 apart"),
        ({"fault": never, "wanted": "hopper"}, "hopper", "asked for"),
        ({"fault": never, "wanted": "portable"}, "portable", "asked for"),
        ({"fault": never, "dim": 32}, "portable", "heads of 32"),
    ],
)
def test_the_kernels_for_hopper_are_taken_there(changed: dict[str, Any], path: str, why: str) -> None:
    usual = {"wanted": "auto", "capability": (9, 0), "dim": 128, "dtype": torch.bfloat16, "softcap": 0.0}
    found, reason = choose(**{**usual, "fault": lambda: "", **changed})
    assert found == path
    assert why in reason
    with pytest.raises(ValueError, match="BIGTRAIN_ATTENTION is 'fast'"):
        choose(**{**usual, "wanted": "fast", "fault": lambda: ""})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (33, 3, 32)}, "k has 3 heads, which do not divide q's 4"),
        ({"k": (33, 2, 16)}, "k has head dim 16, q has 32"),
        ({"v": (32, 2, 32)}, r"v has shape \(32, 2, 32\), k has \(33, 2, 32\)"),
        ({"q": (33, 4, 257), "k": (33, 2, 257), "v": (33, 2, 257)}, "q has head dim 257, expected 1 to 256"),
        ({"q": (33, 128)}, r"q has shape \(33, 128\), expected 3 dimensions"),
        ({"ends": [0, 20, 32]}, "cu_seqlens_q ends at 32, but q has 33 tokens"),
        ({"ends": [1, 33]}, "cu_seqlens_q starts at 1, expected 0"),
        ({"ends": [0, 40, 20, 33]}, r"cu_seqlens_q decreases: \[0, 40, 20, 33\]"),
        ({"longest": 10}, "max_seqlen_q is 10, but a document has 20 tokens"),
        ({"window": (-2, 0)}, r"window_size is \(-2, 0\)"),
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0, expected more than 0"),
        ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes are given"),
        ({"softcap": -1.0}, "softcap is -1.0, expected 0 or more"),
        ({"dtype": torch.float64}, "q is torch.float64, expected bfloat16 or float16"),
        ({"ends_dtype": torch.int64}, "cu_seqlens_q is torch.int64, expected int32"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\), expected \(4,\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (33, 4, 32), "k": (33, 2, 32), "v": (33, 2, 32)}
    q, k, v = (
        torch.zeros(change.get(name, shape), dtype=change.get("dtype", torch.float32), device=DEVICE)
        for name, shape in shapes.items()
    )
    ends = torch.tensor(change.get("ends", [0, 20, 33]), dtype=change.get("ends_dtype", torch.int32))
    longest = change.get("longest", 20)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, window_size=change.get("window", (-1, -1)),
            softcap=change.get("softcap", 0.0), sinks=change.get("sinks"),
            **{x: change[x] for x in ("dropout_p", "softmax_scale", "alibi_slopes") if x in change},
        )  # fmt: skip
