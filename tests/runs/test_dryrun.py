"""The dry run against the real thing: the same ranks with real tensors over gloo, equal to the byte."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from bigtrain.plan.dryrun import _run
from tests.runs.dryrun_worker import config_of, facts
from tests.runs.worlds import run_world

pytestmark = [pytest.mark.runs, pytest.mark.timeout(900)]

Case = dict[str, Any]


def case(
    precision: str = "fp32", *, tied: bool = True, counts: tuple[int, ...] = (3, 2), **layout: Any
) -> Case:
    told = " ".join(f"{key} {value}" for key, value in layout.items())
    return {
        "name": f"{told} {precision}" + ("" if tied else " untied"),
        "precision": precision,
        "tied": tied,
        "counts": counts,
        "layout": layout,
    }


TWO = [
    case(zero=0),
    case("bf16", zero=0, recompute="full"),
    case(zero=1),
    case("bf16", zero=1),
    case("bf16", zero=2, recompute="selective"),
    case("bf16", zero=3, counts=(2, 2, 3)),
    case(tensor=2, zero=0, sequence=False, recompute="selective", tied=False),
    case("bf16", tensor=2, zero=1, recompute="full"),
    case("bf16", pipeline=2, zero=0),
    case(pipeline=2, zero=1, schedule="gpipe", recompute="full"),
    case("bf16", context=2, zero=2),
    case(context=2, zero=0, context_by="ulysses", recompute="full", tied=False),
]
FOUR = [
    case("bf16", tensor=2, pipeline=2, zero=1, schedule="interleaved", chunks=2, counts=(4, 3)),
    # In fp32 gloo's thread may still hold a summed gradient, which autograd then copies: one run more, one run less.
    case(
        "bf16",
        tensor=2,
        pipeline=2,
        zero=0,
        schedule="zbv",
        chunks=2,
        sequence=False,
        tied=False,
        counts=(4, 3),
    ),
    case("bf16", tensor=2, zero=3, recompute="full", counts=(2, 2, 3)),
    case("bf16", pipeline=4, zero=0, tied=False, counts=(3, 5)),
    case("bf16", tensor=2, context=2, zero=2),
    case("fp16", context=2, zero=1, context_by="ulysses"),
]


MORE = pytest.mark.skipif(
    "BIGTRAIN_DRYRUN_PROOF" not in os.environ, reason="takes minutes more: BIGTRAIN_DRYRUN_PROOF=1 runs it"
)
QUICK = [c for c in TWO if c["precision"] == "bf16"]
WORLDS = [
    pytest.param((2, QUICK), id="2 ranks"),
    pytest.param((2, [c for c in TWO if c not in QUICK]), id="2 ranks, fp32", marks=MORE),
    pytest.param((4, FOUR), id="4 ranks", marks=MORE),
]


@pytest.fixture(scope="module", params=WORLDS)
def world(request: Any, tmp_path_factory: Any) -> tuple[list[Case], list[list[dict[str, Any]]]]:
    """The cases of a world and what each of its ranks measured."""
    size, cases = request.param
    folder: Path = tmp_path_factory.mktemp("dryrun")
    given = folder / "cases.json"
    given.write_text(json.dumps(cases))
    run_world(["-W", "ignore", "-m", "tests.runs.dryrun_worker", str(given), str(folder)], size, timeout=300)
    return cases, [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def test_every_byte_of_every_rank_is_that_of_the_real_run(world: Any) -> None:
    """Memory and its kinds at the peak, the tensors held there, operations, collectives: no difference at all."""
    cases, measured = world
    different = []
    for number, c in enumerate(cases):
        for rank, found in enumerate(measured):
            real = found[number]
            dry = facts(_run(config_of(c), len(measured), rank, c["counts"], as_gpu=False))
            different += [f"{c['name']}, rank {rank}: {key}" for key in real if dry[key] != real[key]]
    assert not different, "\n".join(different)
