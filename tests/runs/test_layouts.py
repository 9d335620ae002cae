"""Whole runs through the command line in every kind of layout: the curve, the records, resuming in another layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import Tiny, losses_of, steps_of
from tests.runs.worlds import Finished, run_world

FP32 = 1e-5
SHORT = ("train.steps=12", "checkpoint.every_steps=4", "train.eval_every=6")


def evaluations(run: Path) -> list[float]:
    """The held-out loss of every evaluation, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "eval"]


def worst(one: list[float], two: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = tiny.train(run, *SHORT)
    assert done.code == 0, done.err
    return run


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ["layout.tensor=2"]),
        (2, ["layout.pipeline=2", "layout.zero=2"]),
        (2, ["layout.context=2", "layout.zero=0"]),
        (4, ["layout.tensor=2", "layout.pipeline=2"]),
    ],
)
def test_losses_norms_and_evaluations_are_those_of_one_process(
    tiny: Tiny, alone: Path, tmp_path: Path, processes: int, layout: list[str]
) -> None:
    done = tiny.train(tmp_path / "run", *SHORT, *layout, processes=processes)
    assert done.code == 0, done.err
    found, expected = steps_of(tmp_path / "run"), steps_of(alone)
    assert found.keys() == expected.keys() == set(range(1, 13))
    for key in ("loss", "grad_norm"):
        assert worst([r[key] for r in found.values()], [r[key] for r in expected.values()]) <= FP32
    assert [r["tokens"] for r in found.values()] == [r["tokens"] for r in expected.values()]
    assert worst(evaluations(tmp_path / "run"), evaluations(alone)) <= FP32
    if "layout.zero=2" in layout:
        assert "ZeRO 2 works as ZeRO 1 here" in done.out
    if processes == 2 and "layout.tensor=2" in layout:
        wrote = tiny("generate", str(tmp_path / "run"), "--prompt", "def", "--max-new-tokens", "5")
        assert wrote.code == 0, wrote.err


def test_a_checkpoint_carries_across_layouts(tiny: Tiny, alone: Path, tmp_path: Path) -> None:
    """Tensor 2 to step 4, pipeline 2 to step 8, one process (with the layout still in its config) to step 12."""
    run = tmp_path / "run"
    # The schedule is of 12 steps in all parts; each is stopped by the checkpoint that the next one takes up.
    for steps, layout, processes in [
        (4, "layout.tensor=2", 2),
        (8, "layout.pipeline=2", 2),
        (12, "layout.tensor=2", 1),
    ]:
        settings = [*SHORT[1:], f"train.steps={steps}", "optim.schedule=constant", layout]
        done = tiny.train(run, *settings, processes=processes)
        assert done.code == 0, done.err
    assert "the axes of [layout] are not used" in done.out
    whole = tmp_path / "whole"
    assert tiny.train(whole, *SHORT, "optim.schedule=constant").code == 0
    assert worst(losses_of(run), losses_of(whole)) <= FP32


def test_the_same_layout_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    layout = ["layout.tensor=2", "layout.pipeline=2", "optim.schedule=constant", "train.eval_every=0"]
    for steps in (4, 8):
        assert tiny.train(tmp_path / "run", f"train.steps={steps}", *layout, processes=4).code == 0
    assert tiny.train(tmp_path / "whole", "train.steps=8", *layout, processes=4).code == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def start(
    tiny: Tiny, run: Path, world: int, settings: list[str], *, before: str = "", **env: str
) -> list[Finished]:
    """`bigtrain train` in `world` processes; `before` is code that every rank runs first (`rank` is known)."""
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ["train", str(tiny.config), "--run-dir", str(run), *sets]
    code = (
        "import os, sys\nrank = int(os.environ['RANK'])\n"
        f"arguments = {arguments!r}\n{before}\nfrom bigtrain.cli import main\nsys.exit(main(arguments))"
    )
    return run_world(["-c", code], world, check=False, timeout=120, env=env, grace=60)


REFUSED: list[tuple[int, list[str], list[str]]] = [
    (3, ["layout.tensor=2"], ["does not divide 3 ranks", "start 2 or 4 ranks"]),
    (2, ["layout.pipeline=4"], ["layout.pipeline", "only 2 layers", "pipeline = 2"]),
    (2, ["layout.tensor=3"], ["layout.tensor", "4 heads", "nearest that works: 2"]),
    (2, ["layout.context=2", "data.sequence_length=30"], ["data.sequence_length", "nearest that works"]),
    (2, ["layout.pipeline=2", "layout.zero=3"], ["layout.zero", "zero = 1"]),
    (2, ["layout.tensor=3", "layout.pipeline=4", "layout.zero=3"], ["3 problems"]),
    (2, ["layout.expert=2"], ["layout.expert", "no experts"]),
]


@pytest.mark.parametrize(("world", "settings", "words"), REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(
    tiny: Tiny, tmp_path: Path, world: int, settings: list[str], words: list[str]
) -> None:
    for rank in start(tiny, tmp_path / "run", world, settings):
        assert rank.code == 2, rank.stderr
        assert "Traceback" not in rank.stderr
        assert all(word in rank.stderr for word in words), rank.stderr
    assert not (tmp_path / "run").exists()


FAILING: dict[str, tuple[str, dict[int, Any], list[str]]] = {
    "another config": (
        "arguments += ['--set', 'optim.lr=0.5'] if rank == 1 else []",
        {0: 2, 1: 2},
        ["rank 1", "optim.lr", "same command"],
    ),
    "dead before it came": ("if rank == 1: os._exit(3)", {0: 1, 1: 3}, ["rank 1", "did not come"]),
    "fails alone while building": (
        "if rank == 1:\n"
        "    import bigtrain.train\n"
        "    from bigtrain.errors import UserError\n"
        "    def planted(*_): raise UserError('planted')\n"
        "    bigtrain.train.held_out_of = planted",
        {0: 1, 1: 2},
        ["rank 1", "planted"],
    ),
    "killed while training": (
        "if rank == 1:\n"
        "    import signal, bigtrain.trainer\n"
        "    step = bigtrain.trainer.Trainer._step\n"
        "    def killed(self, *a):\n"
        "        if self.progress.step == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        step(self, *a)\n"
        "    bigtrain.trainer.Trainer._step = killed",
        {0: 1, 1: -9},
        ["another rank"],
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_rank_that_differs_or_dies_is_named_in_bounded_time(tiny: Tiny, tmp_path: Path, name: str) -> None:
    before, codes, words = FAILING[name]
    ranks = start(tiny, tmp_path / "run", 2, ["layout.tensor=2"], before=before, BIGTRAIN_MEET_MINUTES="0.1")
    for rank, code in codes.items():
        if ranks[rank].code is None:
            pytest.fail(f"rank {rank} had to be stopped: {ranks[rank].stderr[-500:]}")
        assert ranks[rank].code == code, ranks[rank].stderr
        assert "Traceback" not in ranks[rank].stderr
    said = ranks[0].stderr
    assert all(word in said for word in words), said
