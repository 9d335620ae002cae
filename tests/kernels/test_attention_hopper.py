"""The kernels in Gluon, run by hopper_machine.py: right in any order of events, and what that machine would notice."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bigtrain_kernels import attention_backward, attention_forward, reference
from bigtrain_kernels.attention_probe import allowed, differences, remembered

from tests.kernels.hopper_machine import DeadlockError, HazardError, schedule, source

PARTS = ("attention_hopper_tiles", "attention_hopper", "attention_hopper_backward")
DOCUMENTS = [
    ([256], [256]),
    ([1], [1]),
    ([129, 0, 1, 200], [129, 0, 1, 200]),
    ([5, 300, 64, 40], [400, 100, 0, 41]),
]
WINDOWS = [(-1, -1), (-1, 0), (100, 0), (0, 0), (7, 300), (40, -1)]


@pytest.fixture(scope="module")
def hopper() -> tuple[Any, Any]:
    return source(*PARTS[:2]), source(PARTS[0], PARTS[2])


def made(
    queries: list[int], keys: list[int], H: int, K: int, D: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(len(queries) + D)
    shapes = [(1, sum(queries), H, D), *[(1, sum(keys), K, D)] * 2, (1, sum(queries), H, D)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), DOCUMENTS)
def test_no_further_from_float64_than_torch(
    hopper: tuple[Any, Any], queries: list[int], keys: list[int], window: tuple[int, int], D: int
) -> None:
    """Twice the error of the same formula in torch and bf16, and roundings in fp32, as for the portable kernels."""
    H, K = 4, 2
    q, k, v, grad = made(queries, keys, H, K, D, torch.bfloat16)
    cus = starts(queries), starts(keys)
    options: dict[str, Any] = {"scale": D**-0.5, "left": window[0], "right": window[1]}
    sinks = torch.linspace(-1, 2, H) if window[0] == 100 else None

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x[0].to(dtype).requires_grad_() for x in (q, k, v)]
        ends = [cu.tolist() for cu in cus]
        sink = None if sinks is None else sinks.to(dtype)
        out, lse = reference.attention(*leaves, *ends, **options, sinks=sink)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad[0].to(dtype)), lse.detach()]

    exact, rough = plain(torch.float64), plain(torch.bfloat16)
    with schedule(D + window[0]):
        out, lse = hopper[0].forward(q, k, v, *cus, sinks, **options)
        given = (grad, torch.zeros_like(lse), q, k, v, out, lse, *cus)
        dq, dk, dv, _ = attention_backward.backward(*given, **options, softcap=0.0, kernels=hopper[1])
    for name, found, wanted, torchs in zip(
        ("out", "dq", "dk", "dv"), (out, dq, dk, dv), exact, rough, strict=False
    ):
        limit = 2 * (torchs - wanted).abs().max() + 1e-5
        assert (found[0] - wanted).abs().max() <= limit, name
    torch.testing.assert_close(lse[0].double(), exact[-1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events_gives_the_same_bits(hopper: tuple[Any, Any], seed: int) -> None:
    q, k, v, grad = made([300, 90], [300, 90], 2, 1, 64, torch.float16)
    cu = starts([300, 90])
    options: dict[str, Any] = {"scale": 0.1, "left": 150, "right": 0}

    def run() -> list[torch.Tensor]:
        out, lse = hopper[0].forward(q, k, v, cu, cu, None, **options)
        given = (grad, torch.zeros_like(lse), q, k, v, out, lse, cu, cu)
        return [
            out,
            lse,
            *attention_backward.backward(*given, **options, softcap=0.0, kernels=hopper[1])[:3],
        ]

    first = run()
    with schedule(seed + 1):
        for found, wanted in zip(run(), first, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("D", [64, 128])
def test_rows_of_one_length_and_strides(hopper: tuple[Any, Any], D: int) -> None:
    g = torch.Generator().manual_seed(1)
    q, grad = (torch.randn(2, 200, 4, D, generator=g).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, 2, 270, D, generator=g).bfloat16().transpose(1, 2) for _ in range(2))
    options: dict[str, Any] = {"scale": 0.1, "left": -1, "right": 0}
    out, lse = attention_forward.forward(q, k, v, None, None, None, **options, softcap=0.0)
    found, found_lse = hopper[0].forward(q, k, v, None, None, None, **options)
    unit = allowed(torch.bfloat16)
    assert (found.float() - out.float()).norm() <= unit * out.float().norm()
    torch.testing.assert_close(found_lse, lse, atol=2e-5, rtol=1e-5)
    given = (grad, torch.randn(lse.shape, generator=g), q, k, v, out, lse, None, None)
    ours, theirs = (
        attention_backward.backward(*given, **options, softcap=0.0, kernels=kernels)
        for kernels in (hopper[1], None)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).norm() <= unit * b.float().norm()


EITHER = (HazardError, DeadlockError)
FAULTS = [
    # Keys are freed before the product that reads them was waited for.
    (1, "        s = warpgroup_mma_wait(1, deps=[s])\n        sync()\n", "        sync()\n", HazardError),
    # A group forgets to say that it has read the values.
    (1, "mbarrier.arrive(v_empty.index(before), count=1)", "pass", DeadlockError),
    # Both groups' arrivals are counted as one.
    (1, "mbarrier.init(k_empty.index(i), count=2)", "mbarrier.init(k_empty.index(i), count=1)", EITHER),
    # The producer does not wait for a free buffer.
    (1, "        mbarrier.wait(k_empty.index(stage), turn ^ 1)\n", "", HazardError),
    # The wrong phase of a barrier.
    (2, "((i // STAGES) & 1) ^ 1)", "(i // STAGES) & 1)", DeadlockError),
    # Terms are announced before they are written, and nobody waits for the loads.
    (2, "mbarrier.init(q_full.index(i), count=2)", "mbarrier.init(q_full.index(i), count=1)", HazardError),
    (2, "        mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)\n", "", HazardError),
    # Queries are freed while products read them.
    (
        2,
        "        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])\n        sync()\n",
        "        sync()\n",
        HazardError,
    ),
    # A result is used before it is there.
    (2, "        dp = warpgroup_mma_wait(1, deps=[dp])\n", "", HazardError),
]


@pytest.mark.parametrize(("part", "right", "wrong", "error"), FAULTS)
def test_the_machine_notices(tmp_path: Path, part: int, right: str, wrong: str, error: Any) -> None:
    texts = {name: Path(reference.__file__).with_name(f"{name}.py").read_text() for name in PARTS}
    assert right in texts[PARTS[part]]
    texts[PARTS[part]] = texts[PARTS[part]].replace(right, wrong)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    module = source(PARTS[0], PARTS[part], folder=tmp_path)
    q, k, v, grad = made([700], [700], 1, 1, 64, torch.bfloat16)
    lse = torch.zeros(1, 1, 700)
    given = (q, k, v, grad, lse, lse, None, None, attention_backward.Numbers(0.1, -1, -1, 0.0))

    def run_often() -> None:
        for seed in range(40):
            with schedule(seed):
                if part == 1:
                    module.forward(q, k, v, None, None, None, scale=0.1, left=-1, right=-1)
                else:
                    module.queries_gradient(*given)
                    module.keys_gradient(*given)

    with pytest.raises(error):
        run_often()


def test_an_address_outside_is_noticed(hopper: tuple[Any, Any]) -> None:
    q, k, v, _ = made([100], [100], 1, 1, 64, torch.bfloat16)
    kernel, short = hopper[0].attention_forward_hopper, torch.zeros(10)
    parts = [hopper[0].descriptor(x, 64) for x in (q, k, v)]
    numbers = (0, 100, 100, 1, 1, 1, -1, -1, 0.1)
    constants = {"PACKED": False, "LEFT": False, "RIGHT": False, "SINK": False}
    with pytest.raises(HazardError, match="outside of a tensor of 10 elements"):
        kernel[(1,)](*parts, q, *[short] * 5, *numbers, G=1, D=64, BN=64, STAGES=2, **constants)


def test_the_probe_compares_with_the_portable_kernels(hopper: tuple[Any, Any]) -> None:
    found = list(differences(*hopper, 64, torch.bfloat16, torch.device("cpu")))
    assert len(found) == 15
    assert all(error <= allowed(torch.bfloat16) for _, error in found), found

    class Wrong:
        queries_gradient = staticmethod(lambda *a: 1.05 * hopper[1].queries_gradient(*a))
        keys_gradient = staticmethod(hopper[1].keys_gradient)

    wrong: Any = Wrong
    found = list(islice(differences(hopper[0], wrong, 64, torch.bfloat16, torch.device("cpu")), 5))
    assert {name.split()[0] for name, error in found if error > allowed(torch.bfloat16)} == {"dq"}


def test_the_probe_is_a_process_with_a_limit_and_remembered(tmp_path: Path) -> None:
    def says(code: str, file: str, seconds: float = 60) -> str:
        return remembered(tmp_path / "new" / file, [sys.executable, "-c", code], seconds)

    assert says("import time; time.sleep(60)", "a", 0.5) == "they did not end within 0.5 s"
    assert says("raise SystemExit('no memory')", "a") == "their test failed: no memory"
    assert says("print('warning'); print('right')", "a") == ""
    assert says("print('dq: 0.3 apart')", "a") == ""  # remembered: the process does not run again
    assert says("print('dq: 0.3 apart')", "b") == "dq: 0.3 apart"
    assert says("print('right')", "b") == "dq: 0.3 apart"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "b"]
