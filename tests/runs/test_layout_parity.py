"""Any layout, same curve: every pair of axis settings against the single process, and every check against an error.

The whole grid, 20 steps each, runs by `make parity`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import planted
from tests.runs.layout_cases import MODELS, grid, name_of, pairs, pairwise, run_of
from tests.runs.parity import BOUNDS, REPLICAS, Case, differences, excess, reference, run_cases

pytestmark = pytest.mark.timeout(900)
STEPS = {2: 20, 4: 8, 8: 4}
"""More processes than cores are slow; `make parity` takes 20 everywhere."""
CHOSEN = pairwise(grid())
ULP = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_pair_of_settings_gives_the_curve_of_one_process(world: int, tmp_path: Path) -> None:
    cases = [run_of(c, steps=STEPS[world]) for c in CHOSEN if c["world"] == world]
    found = run_cases(cases, world, tmp_path, timeout=600)
    failed = {c["name"]: excess(differences(found[c["name"]], reference(c))) for c in cases}
    assert not {name: errors for name, errors in failed.items() if errors}


def test_the_chosen_cases_hold_every_pair_of_the_grid() -> None:
    assert set().union(*map(pairs, grid())) == set().union(*map(pairs, CHOSEN))
    assert len({name_of(c) for c in grid()}) == len(grid())


def special(name: str, *, steps: int = 8, **changed: Any) -> Case:
    """A llama of four layers in a layout of its own."""
    layout = changed.pop("layout")
    model = MODELS["llama"] | {"layers": 4, "tied": True} | changed.pop("model", {})
    case = {"name": name, "steps": steps, "sequences": [4, 8], "held_out": 4}
    return case | {"config": {"model": model, "layout": layout}} | changed


ODD = {"sequences": [3, 5, 2, 7], "held_out": 3}
TWO = [
    special("odd-1f1b", layout={"pipeline": 2}, **ODD),
    special("odd-gpipe", layout={"pipeline": 2, "schedule": "gpipe", "zero": 0}, **ODD),
    special("odd-interleaved", layout={"pipeline": 2, "schedule": "interleaved", "chunks": 2}, **ODD),
    special("odd-zb", layout={"pipeline": 2, "schedule": "interleaved-zb", "chunks": 2, "zero": 0}, **ODD),
    special("odd-zbv", layout={"pipeline": 2, "schedule": "zbv", "chunks": 2}, **ODD),
    special("uneven", layout={"pipeline": 2, "split": [3, 1]}),
    special("head-only", layout={"pipeline": 2, "split": [4, 0], "zero": 0}),
    special("uneven-v", layout={"pipeline": 2, "schedule": "zbv", "chunks": 2, "split": [0, 2, 1, 1]}),
    special("masked-context", layout={"context": 2}, model={"objective": "masked"}),
    special("masked-tensor", layout={"tensor": 2}, model={"objective": "masked", "tied": False}),
    special("masked-data", layout={"zero": 2}, model={"objective": "masked"}),
    special("reference-kernels", layout={"context": 2, "kernels": "reference"}),
    special("reference-kernels-t", layout={"tensor": 2, "kernels": "reference", "zero": 0}),
    special("offload", layout={"tensor": 2, "offload": "optimizer"}),
    special("offload-pipeline", layout={"pipeline": 2, "offload": "optimizer"}),
]


def test_odd_microbatches_uneven_splits_and_other_models(tmp_path: Path) -> None:
    found = run_cases(TWO, 2, tmp_path, timeout=300)
    failed = {c["name"]: excess(differences(found[c["name"]], reference(c))) for c in TWO}
    assert not {name: errors for name, errors in failed.items() if errors}


SHORT = {"steps": 2, "sequences": [2], "held_out": 1}  # the interpreter takes seconds a layer
TRITON = [
    special(f"triton-{name}", layout={**layout, "kernels": "triton"}, model={"layers": 2}, **SHORT)
    for name, layout in {
        "tensor": {"tensor": 2},
        "tensor-plain-3": {"tensor": 2, "sequence": False, "zero": 3},
        "context": {"context": 2, "zero": 0},
        "ulysses": {"context": 2, "context_by": "ulysses"},
        "pipeline": {"pipeline": 2, "recompute": "full"},
    }.items()
]
TRITON[0]["config"]["model"] |= {"norm": "layernorm", "bias": True, "sliding_window": 7, "vocab_size": 97}


def test_our_kernels_in_parallel_layouts(tmp_path: Path) -> None:
    """In Triton's interpreter, against torch's operations in one process."""
    found = run_cases(TRITON, 2, tmp_path, timeout=600)
    failed = {c["name"]: excess(differences(found[c["name"]], reference(c))) for c in TRITON}
    assert not {name: errors for name, errors in failed.items() if errors}


SIXTEEN = [
    special(f"{precision}-{name}", steps=6, layout=layout)
    | {"config": special("", layout=layout)["config"] | {"precision": precision}}
    for name, precision, layout in [
        ("pipeline", "bf16", {"pipeline": 2, "zero": 1}),
        ("pipeline-0", "bf16", {"pipeline": 2, "zero": 0}),
        ("pipeline-2-offload", "bf16", {"pipeline": 2, "zero": 2, "offload": "optimizer"}),
        ("zbv", "fp16", {"pipeline": 2, "schedule": "zbv", "chunks": 2, "zero": 1}),
        ("zbv-0", "bf16", {"pipeline": 2, "schedule": "zbv", "chunks": 2, "zero": 0}),
        ("zb-0", "fp16", {"pipeline": 2, "schedule": "interleaved-zb", "chunks": 2, "zero": 0}),
        ("tensor", "bf16", {"tensor": 2, "zero": 1}),
        ("tensor-3", "bf16", {"tensor": 2, "zero": 3}),
        ("tensor-plain", "fp16", {"tensor": 2, "zero": 2, "sequence": False}),
        ("context", "bf16", {"context": 2, "zero": 0}),
        ("ulysses", "fp16", {"context": 2, "context_by": "ulysses", "zero": 2}),
    ]
]


def rounding(case: Case) -> dict[str, float]:
    """Bounds in 16 bits, from the roundings that a layout makes in other places than one process does.

    Every rounding moves a number by at most half an ulp; ranks round the sum of two parts where one process rounds
    once, and recompute nothing alike. On its way through L layers and back a number is rounded about R = 40 L times
    (19 operations forward, as many back), independently: sqrt(2 R) half-ulps between the two runs. A parameter's
    gradient adds contributions of both signs, which leaves about twice that relative to what remains. Adam moves an
    element by its gradient's sign at first: the share of elements whose gradient is below that noise is about the
    noise itself, each may go 2 learning rates wrong, so the learned part by 2 sqrt(noise). The loss is a mean over
    many tokens and moves by less than an ulp of itself. Something shuffled is off by about 1 in both.
    """
    ulp = ULP[case["config"]["precision"]]
    noise = 2 * (2 * 40 * case["config"]["model"]["layers"]) ** 0.5 * ulp / 2
    return {
        "start": 0.0,
        "loss": ulp / 4,
        "norm": ulp,
        "gradients": noise,
        "learned": 2 * noise**0.5,
        "held out": ulp / 4,
        "replicas apart": REPLICAS,
    }


def test_sixteen_bits(tmp_path: Path) -> None:
    found = run_cases(SIXTEEN, 2, tmp_path, timeout=300)
    failed = {c["name"]: excess(differences(found[c["name"]], reference(c)), rounding(c)) for c in SIXTEEN}
    assert not {name: errors for name, errors in failed.items() if errors}


PLANTED = {
    "shuffled shard": (
        {"tensor": 2, "zero": 0},
        {"loss", "norm", "gradients", "learned", "weights", "held out"},
    ),
    "missing sum of norms": ({"tensor": 2, "zero": 0}, {"norm", "gradients", "learned", "replicas apart"}),
    "missing all-reduce": (
        {"tensor": 2, "zero": 0, "sequence": False},
        {"norm", "gradients", "replicas apart"},
    ),
    "double-counted norms": ({"tensor": 2, "zero": 0}, {"norm"}),
    "off-by-one stage boundary": ({"pipeline": 2, "zero": 0}, {"loss", "norm", "gradients", "learned"}),
}


def test_every_check_fails_on_the_error_it_is_there_for(tmp_path: Path) -> None:
    cases = [
        special(error, steps=10, layout=layout, model={"tied": False}, plant=error)
        for error, (layout, _) in PLANTED.items()
    ]
    shuffled = SIXTEEN[4] | {"name": "shuffled gradient", "steps": 4, "plant": "shuffled gradient"}
    found = run_cases([*cases, shuffled], 2, tmp_path, timeout=200)
    for case in cases:
        failing = excess(differences(found[case["name"]], reference(case)))
        assert failing.keys() >= PLANTED[case["name"]][1], case["name"]
        assert all(failing[key] > 10 * BOUNDS[key] for key in PLANTED[case["name"]][1]), case["name"]
    failing = excess(differences(found["shuffled gradient"], reference(shuffled)), rounding(shuffled))
    assert {"norm", "gradients", "learned"} <= failing.keys()
    assert set(PLANTED) | {"shuffled gradient"} == set(planted.NAMES)
