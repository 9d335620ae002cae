"""Any ZeRO level on any number of ranks trains as the reference does (design invariant 1).

Batches have unequal documents, masked shares from none to all that differ between ranks and microbatches, a
number of microbatches that changes from step to step, and gradients that are clipped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.engine.reference import ReferenceEngine
from tests.runs.engine_parts import (
    LSTM,
    STEPS,
    assemble,
    local_boxes,
    make_config,
    make_model,
    microbatches,
    sample,
    train,
)
from tests.runs.parity import worst
from tests.runs.worlds import run_world

pytestmark = pytest.mark.runs

Case = dict[str, Any]
FP32 = 1e-5
"""Largest relative difference of a step's loss and gradient norm in fp32 (design invariant 1)."""
SGD = {"kind": "sgd", "lr": 0.1}
MUON = {"kind": "muon"}


def zero(level: int, offload: str = "none") -> Case:
    return {"engine": "zero", "zero": level, "offload": offload}


def plain(
    name: str,
    level: int,
    *,
    steps: int = STEPS,
    offload: str = "none",
    recompute: str = "none",
    **config: Any,
) -> Case:
    layout = {**zero(level, offload), "recompute": recompute}
    return {"name": name, "run": "plain", "steps": steps, "config": {"layout": layout, **config}}


def resumed(name: str, source: str, layout: Case | None, steps: tuple[int, int], **config: Any) -> Case:
    return {
        "name": name,
        "run": "resume",
        "from": source,
        "steps": steps,
        "config": {"layout": layout, **config},
    }


TWO: list[Case] = [
    *(plain(f"fp32-{z}", z) for z in range(4)),
    *(plain(f"bf16-{z}", z, steps=6, precision="bf16") for z in range(4)),
    *(plain(f"fp16-{z}", z, steps=3, precision="fp16") for z in range(4)),
    *(plain(f"offload-{z}", z, steps=4, offload="optimizer") for z in (1, 2, 3)),
    plain("offload-bf16-2", 2, steps=4, offload="optimizer", precision="bf16"),
    *(plain(f"sgd-{z}", z, steps=5, optim=SGD) for z in (1, 3)),
    *(plain(f"lstm-{z}", z, steps=8, model=LSTM, optim=SGD) for z in range(3)),
    plain("muon-0", 0, steps=8, optim=MUON),
    *(plain(f"recompute-{z}", z, steps=2, recompute="full") for z in (2, 3)),
    *({"name": f"nan-{z}", "run": "nan", "config": {"layout": zero(z)}} for z in range(4)),
    *(
        {"name": f"nan-bf16-{z}", "run": "nan", "config": {"layout": zero(z), "precision": "bf16"}}
        for z in (1, 2)
    ),
    *(
        {"name": f"nan-fp16-{z}", "run": "nan", "config": {"layout": zero(z), "precision": "fp16"}}
        for z in (0, 2)
    ),
    {**plain("as-built-3", 3, steps=2), "as_built": True},
    {**plain("as-built-bf16-3", 3, steps=2, precision="bf16"), "as_built": True},
    {"name": "planted", "run": "mean_of_means", "steps": 3, "config": {"layout": zero(2)}},
    *(plain(f"first-{z}", z, steps=3) for z in range(4)),
    *(resumed(f"second-{z}", f"first-{z}", zero(z), (3, 6)) for z in range(4)),
    plain("first-bf16-1", 1, steps=3, precision="bf16"),
    resumed("second-bf16-1", "first-bf16-1", zero(1), (3, 6), precision="bf16"),
    plain("whole-bf16-1", 1, steps=6, precision="bf16"),
    resumed("hop-reference", "first-2", None, (3, 5)),
    resumed("hop-3", "hop-reference", zero(3), (5, 8)),
    resumed("hop-0", "hop-3", zero(0), (8, 10)),
]
ONE = [plain(f"fp32-{z}", z) for z in range(4)]
FOUR = [*(plain(f"fp32-{z}", z) for z in range(4)), plain("lstm-1", 1, steps=4, model=LSTM, optim=SGD)]


def start(cases: list[Case], world: int, folder: Path) -> Callable[[str], Case]:
    """Run all cases in one world; the outcome of each by name."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    ranks = run_world(["-m", "tests.runs.zero_worker", str(path), str(folder)], world, timeout=150)
    for rank in ranks[1:]:
        assert rank.stdout == "", f"DeepSpeed's noise on rank {rank.rank}: {rank.stdout[:500]}"
    assert [line.split()[0] for line in ranks[0].stdout.splitlines()] == [c["name"] for c in cases]
    assert all(rank.stderr == "" for rank in ranks), f"DeepSpeed's noise: {ranks[0].stderr[:500]}"
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return start(ONE, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return start(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return start(FOUR, 4, tmp_path_factory.mktemp("four"))


@functools.cache
def reference(steps: int, skipped: int | None = None, **config: Any) -> Case:
    """The same run in one process with the reference engine; keyword values are JSON."""
    made = make_config(**{key: json.loads(value) for key, value in config.items()})
    engine = ReferenceEngine(make_model(made), made)
    found: Case = {"start": assemble(local_boxes(engine)), "loss": [], "norm": []}
    for step in range(steps):
        if step != skipped:
            one_step = train(engine, range(step, step + 1))
            found["loss"] += one_step["loss"]
            found["norm"] += one_step["norm"]
    found["tensors"] = assemble(local_boxes(engine))
    found["eval"] = [engine.evaluate([sample(n)]) for n in range(4)]
    return found


def movement_error(found: Case, expected: Case) -> float:
    """Largest |w - w_ref| / |w_ref - w_start| of a weight tensor: the wrong share of what was learned."""
    errors = [
        (found["tensors"][k] - w).norm() / (w - expected["start"][k]).norm()
        for k, w in expected["tensors"].items()
        if k.startswith("master/")
    ]
    return float(torch.stack(errors).max())


def check_same(found: Case, expected: Case, bound: float = FP32) -> None:
    """Loss and norm of every step, all logical tensors' names, final weights, held-out loss."""
    assert worst(found["loss"], expected["loss"]) <= bound
    assert worst(found["norm"], expected["norm"]) <= bound
    assert found["tensors"].keys() == expected["tensors"].keys()
    # Adam divides by the root of the second moment, which magnifies rounding where gradients are small.
    assert movement_error(found, expected) <= 30 * bound
    for key, weight in expected["tensors"].items():
        if bound == FP32 and key.startswith("master/"):
            assert (found["tensors"][key] - weight).norm() <= FP32 * weight.norm(), key


@pytest.mark.parametrize("level", range(4))
def test_fp32_on_one_process(one: Callable[[str], Case], level: int) -> None:
    check_same(one(f"fp32-{level}"), reference(STEPS))


@pytest.mark.parametrize("level", range(4))
def test_fp32_on_two_processes(two: Callable[[str], Case], level: int) -> None:
    found, expected = two(f"fp32-{level}"), reference(STEPS)
    check_same(found, expected)
    assert found["nll"] == pytest.approx(sum(expected["eval"][:2]), rel=FP32)
    assert min(expected["norm"]) > 0.5, "clipping must be active"


@pytest.mark.parametrize("level", range(4))
def test_fp32_on_four_processes(four: Callable[[str], Case], level: int) -> None:
    found, expected = four(f"fp32-{level}"), reference(STEPS)
    check_same(found, expected)
    assert found["nll"] == pytest.approx(sum(expected["eval"]), rel=FP32)


@pytest.mark.parametrize(("name", "twin"), [("as-built-3", "fp32-3"), ("as-built-bf16-3", "bf16-3")])
def test_partitioning_while_building_is_bitwise_partitioning_afterwards(
    two: Callable[[str], Case], name: str, twin: str
) -> None:
    assert two(name)["loss"] == two(twin)["loss"][:2]
    assert two(name)["norm"] == two(twin)["norm"][:2]


def test_the_check_fails_on_a_mean_of_means(two: Callable[[str], Case]) -> None:
    planted, expected = two("planted"), reference(STEPS)
    assert worst(planted["norm"], expected["norm"][:3]) > 1000 * FP32


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize(("precision", "ulp"), [("bf16", 2.0**-8), ("fp16", 2.0**-11)])
def test_sixteen_bits(two: Callable[[str], Case], precision: str, ulp: float, level: int) -> None:
    found = two(f"{precision}-{level}")
    expected = reference(len(found["loss"]), precision=json.dumps(precision))
    # All start from the same 16-bit weights, and gradients are summed in fp32: the first step is an fp32 one.
    assert worst(found["loss"][:1], expected["loss"][:1]) <= FP32
    assert worst(found["norm"][:1], expected["norm"][:1]) <= FP32
    # Later, a master weight on a rounding boundary may round the other way: one ulp of the weight. If all did,
    # independently, the loss would move by about |gradient * weight| ulp <= |gradient| max |weight| ulp.
    weight = max(float(w.abs().max()) for k, w in expected["tensors"].items() if k.startswith("master/"))
    moved = [abs(a - b) for a, b in zip(found["loss"], expected["loss"], strict=True)]
    assert all(m <= n * weight * ulp for m, n in zip(moved, expected["norm"], strict=True))
    assert worst(found["norm"], expected["norm"]) <= ulp
    assert movement_error(found, expected) <= 8 * ulp


def test_the_sixteen_bit_bound_fails_on_a_shuffled_gradient() -> None:
    config = make_config(precision="bf16")
    engine = ReferenceEngine(make_model(config), config)
    for record, weight in zip(engine.records, engine.weights, strict=True):
        if record.name == "layers.0.self_attn.k_proj.weight":
            weight.register_hook(lambda g: g.flip(0))
    found: Case = train(engine, range(6))
    found["tensors"] = assemble(local_boxes(engine))
    assert movement_error(found, reference(6, precision=json.dumps("bf16"))) > 8 * 2.0**-8


@pytest.mark.parametrize("level", [1, 2, 3])
def test_offloaded_optimizer(two: Callable[[str], Case], level: int) -> None:
    check_same(two(f"offload-{level}"), reference(4))


def test_offloaded_optimizer_in_bf16_is_bitwise_that_on_the_device(two: Callable[[str], Case]) -> None:
    assert two("offload-bf16-2")["loss"] == two("bf16-2")["loss"][:4]


@pytest.mark.parametrize("level", [2, 3])
def test_recomputed_activations(two: Callable[[str], Case], level: int) -> None:
    check_same(two(f"recompute-{level}"), reference(2))


@pytest.mark.parametrize("level", [1, 3])
def test_sgd(two: Callable[[str], Case], level: int) -> None:
    check_same(two(f"sgd-{level}"), reference(5, optim=json.dumps(SGD)))


@pytest.mark.parametrize("level", range(3))
def test_lstm_with_dropout(two: Callable[[str], Case], level: int) -> None:
    check_same(two(f"lstm-{level}"), reference(8, model=json.dumps(LSTM), optim=json.dumps(SGD)))


def test_lstm_on_four_processes(four: Callable[[str], Case]) -> None:
    check_same(four("lstm-1"), reference(4, model=json.dumps(LSTM), optim=json.dumps(SGD)))


def test_muon(two: Callable[[str], Case]) -> None:
    # Newton-Schulz runs in bf16, so that the last bit of a gradient may move an update by 2^-8 of it.
    check_same(two("muon-0"), reference(8, optim=json.dumps(MUON)), bound=2.0**-8)


@pytest.mark.parametrize("level", range(4))
def test_a_nan_on_one_rank_is_skipped_on_all(two: Callable[[str], Case], level: int) -> None:
    found = two(f"nan-{level}")
    assert found["skipped"] == [True, True]
    assert found["unchanged"], "a skipped step must change nothing, not one bit"
    assert [extra["updates"] for extra in found["extra"]] == [2, 2]
    expected = reference(6, skipped=2)
    assert worst(found["loss"], expected["loss"][2:]) <= FP32
    assert worst(found["norm"], expected["norm"][2:]) <= FP32
    assert movement_error(found, expected) <= 30 * FP32


@pytest.mark.parametrize("name", ["nan-bf16-1", "nan-bf16-2", "nan-fp16-0", "nan-fp16-2"])
def test_a_nan_in_sixteen_bits(two: Callable[[str], Case], name: str) -> None:
    found = two(name)
    assert found["skipped"] == [True, True]
    assert found["unchanged"]
    if "fp16" in name:
        scalers = [extra["loss_scaler"] for extra in found["extra"]]
        assert [s["scale"] for s in scalers] == [2.0**16, 2.0**16], "the first overflow uses up hysteresis"
        assert [s["hysteresis"] for s in scalers] == [2, 1]


@pytest.mark.parametrize("level", range(4))
def test_going_on_from_a_checkpoint_in_the_same_layout_is_bitwise(
    two: Callable[[str], Case], level: int
) -> None:
    whole, first, second = two(f"fp32-{level}"), two(f"first-{level}"), two(f"second-{level}")
    assert second["same"], "what was loaded comes out again"
    assert first["loss"] + second["loss"] == whole["loss"][:6]
    assert first["norm"] + second["norm"] == whole["norm"][:6]


def test_going_on_in_bf16_is_bitwise(two: Callable[[str], Case]) -> None:
    whole, second = two("whole-bf16-1"), two("second-bf16-1")
    assert second["same"]
    assert second["loss"] == whole["loss"][3:]
    assert all(torch.equal(second["tensors"][k], v) for k, v in whole["tensors"].items())


def test_going_on_in_another_layout(two: Callable[[str], Case]) -> None:
    """ZeRO-2 on two ranks, one process, ZeRO-3 on two ranks, ZeRO-0 on two ranks: one curve."""
    parts = [two(name) for name in ("first-2", "hop-reference", "hop-3", "hop-0")]
    assert all(part["same"] for part in parts[1:])
    assert parts[-1]["extra"]["updates"] == 10
    expected = reference(10)
    assert worst([x for part in parts for x in part["loss"]], expected["loss"]) <= FP32
    assert worst([x for part in parts for x in part["norm"]], expected["norm"]) <= FP32
    assert movement_error(parts[-1], expected) <= 30 * FP32


def test_batches_are_as_unequal_as_the_docstring_says() -> None:
    counts = [b.counted() for b in microbatches(7)[0]]
    assert 0 in counts
    assert max(counts) == 24
    assert len({len(microbatches(s)[0]) for s in range(STEPS)}) == 2
