"""What operators say they hold and send within themselves, against what their bodies do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from bigtrain_kernels import attention, linear_cross_entropy, norm
from bigtrain_kernels.checks import INTERPRETED
from bigtrain_kernels.workspace import gathers, workspace
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_iter
from triton.runtime.interpreter import GridExecutor

from bigtrain.mesh import Mesh
from bigtrain.place import Place
from bigtrain.plan.storages import Storages
from bigtrain.plan.traffic import Traffic

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="launches are left out, which only the interpreter can"
)


@pytest.fixture(autouse=True)
def _nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter copies what it is given; without a launch all memory is the bodies' own."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)


def held(body: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the body of an operator holds at most, besides its arguments and results."""
    storages = Storages(block=1)
    with storages:
        for x in tree_iter(args):
            if isinstance(x, torch.Tensor):
                storages.follow(x)
        before = storages.live
        results = body._init_fn(*args)
        kept = storages.live - before
    assert kept >= sum(r.numel() * r.element_size() for r in tree_iter(results))
    return storages.peak - before - kept


def loss_arguments(
    T: int, V: int, C: int, dtype: torch.dtype, budget: int, group: str, vocabulary: int
) -> Any:
    hidden, weight = torch.randn(T, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(0, vocabulary, (T,))
    numbers = (-100, 0.0, 0.0, 0.0, 0, vocabulary, group, False, budget)
    return hidden, weight, None, targets, torch.ones(T), *numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_loss(dtype: torch.dtype, gradients: bool) -> None:
    args = (*loss_arguments(300, 1000, 32, dtype, 1 << 18, "", 1000), gradients)
    said = workspace(torch.ops.bigtrain.linear_cross_entropy, args)
    assert held(linear_cross_entropy._linear_cross_entropy, args) == pytest.approx(said, rel=0.02)
    assert gathers(torch.ops.bigtrain.linear_cross_entropy, args) == []


@pytest.mark.parametrize(("tokens", "chunks"), [(100, 1), (300, 3)])
def test_the_loss_of_a_cut_vocabulary(tokens: int, chunks: int) -> None:
    """Two chunks' logits at a time, and a gather for each chunk."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        args = (*loss_arguments(tokens, 500, 32, torch.bfloat16, 1 << 17, name, 1000), True)
        op = torch.ops.bigtrain.linear_cross_entropy
        traffic = Traffic(Mesh(Place(0, 2, 0, 2, "test"), torch.device("cpu")))
        traffic.calls._axis = lambda ranks: "tensor"  # type: ignore[method-assign]
        with traffic:
            found = held(linear_cross_entropy._linear_cross_entropy, args)
        assert found == pytest.approx(workspace(op, args), rel=0.02)
        assert [s.size for s in traffic.seen] == gathers(op, args)
        assert len(traffic.seen) == chunks
    finally:
        dist.destroy_process_group()


def test_norms() -> None:
    x, weight = torch.randn(64, 96), torch.randn(96)
    args = (x, None, x, weight, torch.randn(64), torch.rand(64), True)
    said = workspace(torch.ops.bigtrain.norm_backward, args)
    assert held(norm._norm_backward, args) == pytest.approx(said, rel=0.3), "sums are a few rows more"


def test_attention() -> None:
    q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
    lse = torch.randn(1, 4, 64)
    args = (q, lse, q, k, k, q, lse, None, None, 0.25, -1, 0, 0.0)
    said = workspace(torch.ops.bigtrain.attention_backward, args)
    assert held(attention.attention_gradients, args) == said


def test_others_hold_nothing() -> None:
    assert workspace(torch.ops.bigtrain.norm, (torch.ones(2, 2),)) == 0
