"""Whole runs through the command line in every kind of layout: the curve, the records, resuming in another layout."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError
from bigtrain.train import join
from tests.runs.conftest import Tiny, losses_of, steps_of
from tests.runs.parity import worst
from tests.runs.test_train import weights_of
from tests.runs.worlds import ROOT, Finished, run_world

pytestmark = pytest.mark.runs

FP32 = 1e-5
SHORT = ("train.steps=12", "checkpoint.every_steps=3", "checkpoint.keep_last=4", "train.eval_every=6")
ZBV = ("layout.pipeline=2", "layout.schedule=zbv", "layout.chunks=2")
CORNER = ("layout.tensor=2", "layout.pipeline=2", "layout.zero=1")


def assert_the_same_run(run: Path, expected: Path) -> None:
    """Every step and evaluation of `expected` is in `run` once, with the same samples and, to 1e-5, numbers."""
    found, wanted = steps_of(run), steps_of(expected)
    assert list(found) == list(wanted) == list(range(1, 13)), "in order, none twice"
    for key in ("loss", "grad_norm"):
        assert worst([r[key] for r in found.values()], [r[key] for r in wanted.values()]) <= FP32, key
    for key in ("tokens", "samples", "lr"):
        assert [r[key] for r in found.values()] == [r[key] for r in wanted.values()], key
    mine, theirs = evaluations(run), evaluations(expected)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == [0, 6, 12]
    assert worst([r["loss"] for r in mine], [r["loss"] for r in theirs]) <= FP32
    assert kinds(run) == kinds(expected)


def records(run: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The records of held-out evaluations."""
    return [r for r in records(run) if r["kind"] == "eval"]


def kinds(run: Path) -> Counter[str]:
    """How many records of each kind there are."""
    return Counter(r["kind"] for r in records(run))


def back_to(step: int, run: Path, copy: Path | None = None) -> Path:
    """The run (or a copy of it) as if it had been killed after saving `step`: newer checkpoints are gone."""
    if copy is not None:
        shutil.copytree(run, copy)
    run = copy or run
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    assert (run / "checkpoints" / f"step_{step:08d}").is_dir()
    return run


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = tiny.train(run, *SHORT)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def corner(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in four processes, tensor x pipeline."""
    run = tmp_path_factory.mktemp("corner") / "run"
    done = tiny.train(run, *SHORT, *CORNER, processes=4)
    assert done.code == 0, done.err
    return run


# ---- the same curve


def test_tensor_ranks_train_what_one_process_does_and_the_verbs_read_it(
    tiny: Tiny, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = tiny.train(run, *SHORT, "layout.tensor=2", processes=2)
    assert done.code == 0, done.err
    assert_the_same_run(run, alone)
    figures = tiny("evaluate", str(run), "--sequences", "8", "--json")
    assert figures.code == 0, figures.err
    assert json.loads(figures.out)["loss"] == pytest.approx(evaluations(run)[-1]["loss"], rel=FP32)
    greedy = ("--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0")
    wrote, expected = (tiny("generate", str(r), *greedy) for r in (run, alone))
    assert wrote.code == 0, wrote.err
    assert wrote.out == expected.out


@pytest.mark.parametrize(
    "layout", [["layout.pipeline=2", "layout.zero=2"], ["layout.context=2", "layout.zero=0"]]
)
def test_two_ranks_train_what_one_process_does(
    tiny: Tiny, alone: Path, tmp_path: Path, layout: list[str]
) -> None:
    done = tiny.train(tmp_path / "run", *SHORT, *layout, processes=2)
    assert done.code == 0, done.err
    assert_the_same_run(tmp_path / "run", alone)
    assert ("ZeRO 2 works as ZeRO 1 here" in done.out) == ("layout.zero=2" in layout)


def test_a_pipeline_in_pieces_trains_what_one_process_does(tiny: Tiny, tmp_path: Path) -> None:
    """zbv with two pieces a rank needs four layers; one process runs the same config."""
    runs = {1: tmp_path / "alone", 2: tmp_path / "zbv"}
    for processes, run in runs.items():
        done = tiny.train(run, *SHORT, *ZBV, "model.layers=4", processes=processes)
        assert done.code == 0, done.err
    assert_the_same_run(runs[2], runs[1])


def test_four_ranks_train_what_one_process_does(alone: Path, corner: Path) -> None:
    assert_the_same_run(corner, alone)


# ---- checkpoints


def test_a_checkpoint_carries_across_layouts(tiny: Tiny, alone: Path, tmp_path: Path) -> None:
    """One process to step 3, tensor 2 to 6, pipeline 2 to 9, one process (its config says tensor 2) to 12."""
    run = back_to(3, alone, tmp_path / "run")
    for step, layout, processes in (
        (3, "layout.tensor=2", 2),
        (6, "layout.pipeline=2", 2),
        (9, "layout.tensor=2", 1),
    ):
        back_to(step, run)
        done = tiny.train(run, *SHORT, layout, processes=processes)
        assert done.code == 0, done.err
        assert f"resumed from step_{step:08d}" in done.out
        assert_the_same_run(run, alone)
    assert "the axes of [layout] are not used" in done.out


def test_the_same_layout_goes_on_bit_for_bit(tiny: Tiny, corner: Path, tmp_path: Path) -> None:
    run = back_to(6, corner, tmp_path / "run")
    done = tiny.train(run, *SHORT, *CORNER, processes=4)
    assert done.code == 0, done.err
    assert "resumed from step_00000006" in done.out
    assert losses_of(run) == losses_of(corner)
    for key in ("grad_norm", "lr"):
        assert [r[key] for r in steps_of(run).values()] == [r[key] for r in steps_of(corner).values()]
    assert [r["loss"] for r in evaluations(run)] == [r["loss"] for r in evaluations(corner)]
    assert weights_of(run) == weights_of(corner)


# ---- what is refused


def start(
    tiny: Tiny, run: Path, world: int, settings: list[str], *, before: str = "", grace: float = 30, **env: str
) -> list[Finished]:
    """`bigtrain train` in `world` processes; `before` is code that every rank runs first (`rank` is known).

    A rank that goes on for more than `grace` seconds after another has failed is stopped: its code is None.
    """
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ["train", str(tiny.config), "--run-dir", str(run), *sets]
    code = (
        "import os, sys\nrank = int(os.environ['RANK'])\n"
        f"arguments = {arguments!r}\n{before}\nfrom bigtrain.cli import main\nsys.exit(main(arguments))"
    )
    return run_world(["-c", code], world, check=False, timeout=120, env=env, grace=grace)


REFUSED: list[tuple[int, list[str], list[str]]] = [
    (3, ["layout.tensor=2"], ["layout: ", "does not divide 3 ranks", "start 2 or 4 ranks"]),
    (
        3,
        ["layout.tensor=2", "optim.kind=muon", "data.sequence_length=31", "train.microbatch=1"],
        ["3 problems", "does not divide 3 ranks", "optim.kind", "layout.sequence"],
    ),
    (2, ["layout.context=2", "data.sequence_length=30"], ["data.sequence_length", "nearest that works: 32"]),
    (2, ["layout.pipeline=4"], ["layout.pipeline", "only 2 layers", "pipeline = 2"]),
    (2, ["layout.tensor=3"], ["layout.tensor", "4 heads", "nearest that works: 2"]),
    (2, ["layout.pipeline=2", "layout.zero=3"], ["layout.zero", "zero = 1"]),
    (
        2,
        ["layout.tensor=3", "layout.pipeline=4", "layout.zero=3"],
        ["3 problems", "layout.tensor", "layout.pipeline", "layout.zero"],
    ),
    (2, ["layout.expert=2"], ["layout.expert", "no experts"]),
]


@pytest.mark.parametrize(("world", "settings", "words"), REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(
    tiny: Tiny, tmp_path: Path, world: int, settings: list[str], words: list[str]
) -> None:
    # Nothing listens on port 9: a rank that tried to meet the others would end with 1 and say so.
    nowhere = {"MASTER_PORT": "9", "BIGTRAIN_MEET_MINUTES": "0.02"}
    ranks = start(tiny, tmp_path / "run", world, settings, **nowhere)
    assert [r.code for r in ranks] == [2] * world, ranks
    for rank in ranks:
        assert "Traceback" not in rank.stderr
        assert all(word in rank.stderr for word in words), rank.stderr
    assert len({r.stderr.partition("bigtrain train: ")[2] for r in ranks}) == 1, "all in the same words"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", ["soon", "nan", "0", "1e30"])
def test_a_time_to_meet_that_is_none_is_refused(minutes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(find_config("quickstart"), [])
    monkeypatch.setenv("BIGTRAIN_MEET_MINUTES", minutes)
    with pytest.raises(
        UserError, match=rf"BIGTRAIN_MEET_MINUTES: '{minutes}' is no number of minutes above 0"
    ):
        join(config)


# ---- ranks that differ or die


@dataclass(frozen=True)
class Failure:
    """Something that goes wrong on rank 1 (or on `who`), and what becomes of it."""

    before: str
    """Code that every rank runs first."""
    codes: list[int]
    """Exit code of each rank."""
    words: list[str]
    """What each rank that can still speak says."""
    silent: tuple[int, ...] = ()
    """Ranks that cannot."""
    env: dict[str, str] = field(default_factory=dict)


KILLED = """
import signal, bigtrain.trainer
step = bigtrain.trainer.Trainer._step
def killed(self, *arguments):
    if rank == {who} and self.progress.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *arguments)
bigtrain.trainer.Trainer._step = killed
"""
PLANTED = """
if rank == 1:
    import bigtrain.train
    from bigtrain.errors import UserError
    def planted(*_):
        raise UserError('planted', where='loader')
    bigtrain.train.loader_of = planted
"""

FAILURES = {
    "another config": Failure(
        "arguments += ['--set', 'optim.lr=0.5'] if rank == 1 else []",
        [2, 2],
        ["rank 1: optim.lr = 0.5 (rank 0: 0.003)", "the same command and the same config file"],
    ),
    "other code": Failure(
        "if rank == 1: sys.path.insert(0, os.environ['OTHER_CODE'])",
        [2, 2],
        ["rank 1: code = ", "install the same version of bigtrain on every machine"],
    ),
    "dead before it came": Failure(
        "if rank == 1: os._exit(3)",
        [1, 3],
        ["rank 1 of 2 did not come within 3 s"],
        silent=(1,),
        env={"BIGTRAIN_MEET_MINUTES": "0.05"},
    ),
    "fails alone while building": Failure(PLANTED, [1, 2], ["loader: planted"]),
    "killed while training": Failure(KILLED.format(who=1), [1, -9], ["rank 1 on ", "is gone"], silent=(1,)),
    "rank 0 killed while training": Failure(
        KILLED.format(who=0), [-9, 1], ["rank 0 on ", "is gone"], silent=(0,)
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_differs_or_dies_is_named_in_bounded_time(tiny: Tiny, tmp_path: Path, name: str) -> None:
    failure, run = FAILURES[name], tmp_path / "run"
    env = dict(failure.env)
    if name == "other code":
        env["OTHER_CODE"] = str(tmp_path / "other")
        shutil.copytree(ROOT / "bigtrain", tmp_path / "other" / "bigtrain")
        changed = tmp_path / "other" / "bigtrain" / "errors.py"
        changed.write_bytes(changed.read_bytes().replace(b"meets", b"meetz", 1))
    ranks = start(tiny, run, 2, ["layout.tensor=2"], before=failure.before, **env)
    assert [r.code for r in ranks] == failure.codes, ranks
    for rank in ranks:
        assert "Traceback" not in rank.stderr, rank.stderr
        if rank.rank not in failure.silent:
            assert all(word in rank.stderr for word in failure.words), rank.stderr
    if name == "fails alone while building":
        assert "stopped because of rank 1: loader: planted" in ranks[0].stderr
    if "training" not in name:
        assert not run.exists(), "nothing is created for a run that cannot start"
