"""What `top` and `report` know of a run: thinned curves, growing files, histories, logs, how a run stands."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.errors import UserError
from bigtrain.metrics import cut_back, to_json
from bigtrain.reporting.blocks import blocks, sensible_frame
from bigtrain.reporting.charts import abscissa, charts_of, compact, labels, ticks
from bigtrain.reporting.compare import differences, figures, layout
from bigtrain.reporting.events import events_of
from bigtrain.reporting.follow import Follower
from bigtrain.reporting.history import History
from bigtrain.reporting.logs import Logs
from bigtrain.reporting.thin import Thinned
from bigtrain.reporting.watched import Watched, check_run
from tests.watching_parts import START, evaluation, loss_at, make_run, record, skipped, write_log


def looked(path: Path, **options: Any) -> Watched:
    run = Watched(path, **options)
    run.look(attempts=9)
    return run


# Curves


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300), st.integers(1, 50))
def test_a_thinned_curve_keeps_means_and_extremes(values: list[float], batch: int) -> None:
    thin = Thinned(("step", "y"), most=16)
    steps, y = np.arange(1, len(values) + 1), np.array(values)
    for i in range(0, len(values), batch):
        part = slice(i, i + batch)
        thin.extend(steps[part], {"step": steps[part].astype(float), "y": y[part]})
    assert thin.width * 16 >= len(values)
    assert thin.width == 1 or thin.width * 8 < len(values), "no coarser than it must be"
    curve = thin.curve("y")
    for i, mean, low, high in zip(curve.bucket, curve.mean, curve.low, curve.high, strict=True):
        held = y[i * thin.width : (i + 1) * thin.width]
        assert (low, high) == (np.nanmin(held), np.nanmax(held))
        assert mean == pytest.approx(np.nanmean(held), abs=1e-6)
    assert thin.total("y") == (np.isfinite(y).sum(), pytest.approx(np.nansum(y), abs=1e-3))


def test_one_spike_in_a_hundred_thousand_steps_is_in_the_band() -> None:
    thin = Thinned(("step", "y"), most=400)
    steps = np.arange(1, 100_001)
    y = np.ones(100_000)
    y[77_776] = 50.0
    thin.extend(steps, {"step": steps.astype(float), "y": y})
    curve = thin.curve("y")
    assert len(curve.x) <= 400
    assert curve.high.max() == 50.0
    assert curve.x[curve.high.argmax()] == pytest.approx(77_777, abs=thin.width)
    assert (curve.mean < 2).all()


def test_cutting_forgets_what_came_after() -> None:
    thin = Thinned(("step",), most=16)
    steps = np.arange(1, 11)
    thin.extend(steps, {"step": steps.astype(float)})
    thin.cut(4)
    assert thin.curve("step").x.tolist() == [1, 2, 3, 4]


def test_round_ticks() -> None:
    assert ticks(0, 2000, 7) == [0, 500, 1000, 1500, 2000]
    assert ticks(3.1, 7.9, 6) == [4, 5, 6, 7]
    assert labels([0, 5000, 10_000]) == ["0", "5k", "10k"]
    assert labels(ticks(0, 0.002)) == ["0", "0.0005", "0.0010", "0.0015", "0.0020"]
    assert [compact(x) for x in (0, 0.25, 1500, 20_000, 4e-4)] == ["0", "0.25", "1500", "20k", "4e-4"]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_lie_in_the_frame_and_are_few(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_blocks_rise_with_the_values() -> None:
    assert blocks([0, 1, 2, 3, 4, 5, 6], 7) == ["▁▂▃▄▅▆▇"]
    assert blocks([1, 1], 4) == ["▁▁▁▁"]
    assert blocks([0, 7], 2, plain=True) == [".#"]
    assert blocks([], 3, height=2) == ["   ", "   "]
    assert blocks([0, 15], 2, height=2) == [" █", "▁█"]
    assert sensible_frame([11.0, *[3.0] * 50, 2.0]) == (2.0, 3.0), "the first fall is cut off"


# Files that grow


def test_lines_are_given_out_once_and_torn_ones_wait(tmp_path: Path) -> None:
    path = tmp_path / "f"
    follower = Follower(path)
    assert list(follower.batches()) == []
    path.write_bytes(b"one\ntwo\nthr")
    assert list(follower.batches()) == [[b"one\n", b"two\n"]]
    assert list(follower.batches()) == []
    # What was read is not read again: only the last line is compared.
    with path.open("r+b") as f:
        f.write(b"XXX\n")
        f.seek(0, os.SEEK_END)
        f.write(b"ee\nfour\n")
    assert not follower.rewound()
    assert list(follower.batches()) == [[b"three\n", b"four\n"]]


@pytest.mark.parametrize("tail", [b"", b"2 other\n", b"2 other, and longer\n3\n4\n"])
def test_a_file_that_was_cut_back_or_replaced_is_read_from_the_start(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1\n2 this\n")
    follower = Follower(path)
    assert len(next(follower.batches())) == 2
    path.write_bytes(b"1\n" + tail)
    assert follower.rewound()
    assert b"".join(b"".join(lines) for lines in follower.batches()) == b"1\n" + tail
    path.unlink()
    assert follower.rewound()
    assert list(follower.batches()) == []


# Histories


def test_a_history_tells_what_was_written(tmp_path: Path) -> None:
    history = looked(make_run(tmp_path / "run", skip=[7, 8])).history
    assert (history.step, history.skipped, list(history.skips)) == (60, 2, [7, 8])
    curve = history.steps.curve("loss")
    assert curve.x.tolist() == [s for s in range(1, 61) if s not in (7, 8)]
    assert curve.mean.tolist() == [loss_at(s) for s in range(1, 61) if s not in (7, 8)]
    assert [e.step for e in history.evaluations] == [0, 10, 20, 30, 40, 50, 60]
    assert history.held_out.curve("loss", "tokens").x.tolist() == [0, 640, 1280, 1920, 2560, 3200, 3840]
    best = history.best()
    assert best is not None
    assert best.step == 60
    assert history.final_loss() == pytest.approx(loss_at(60))
    assert history.steps.curve("loss", "hours").x[-1] == pytest.approx(60 * 2 / 3600)


def test_torn_and_foreign_lines_do_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    strange = [
        "not json", "[1]", '{"kind": "step"}', '{"kind": "step", "step": -3}', '{"kind": 3, "step": 1}', "[" * 5000,
        '{"kind": "step", "step": 1%s}' % ("0" * 400),
        '{"kind": "guard", "step": 2, "what": "something newer"}',
        '{"kind": "step", "step": 3, "loss": "x", "lr": [1], "grad_norm": 1%s, "seconds": {}}' % ("0" * 400),
        '{"kind": "eval", "step": 3, "loss": null}',
    ]  # fmt: skip
    lines = [to_json(record(1)), to_json(record(2)), *(line + "\n" for line in strange), to_json(record(4))]
    path.write_text("".join(lines) + to_json(record(5))[:40])
    history = History(path)
    assert history.read()
    assert (history.step, history.unreadable) == (4, 7)
    assert history.steps.curve("loss").x.tolist() == [1, 2, 4]
    assert [(e.step, e.loss) for e in history.evaluations] == [(3, None)]
    assert history.best() is None
    with path.open("a") as f:
        f.write(to_json(record(5))[40:])
    history.read()
    assert (history.step, history.unreadable) == (5, 7), "the torn line is read once it is whole"


def test_of_repeated_steps_the_last_count(tmp_path: Path) -> None:
    """Metrics that nobody cut back, as when files of two machines were joined."""
    first = [
        *(record(s, loss=9.0) for s in range(1, 21)),
        evaluation(20),
        *(skipped(s) for s in range(21, 26)),
    ]
    second = [*(record(s) for s in range(16, 31)), evaluation(30)]
    twice, once = tmp_path / "twice", tmp_path / "once"
    twice.write_text("".join(map(to_json, [*first, *second])))
    once.write_text("".join(map(to_json, [*first[:15], *second])))
    found, wanted = History(twice), History(once)
    found.read()
    wanted.read()
    assert found.repeated == 10
    assert found.steps.curve("loss").mean.tolist() == wanted.steps.curve("loss").mean.tolist()
    assert found.evaluations == wanted.evaluations
    assert (found.skipped, found.step) == (0, 30)


def test_attempts_are_told_apart_and_a_resume_is_followed_live(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=30, end="preempted", reason="SIGUSR1")
    live = looked(path)
    assert live.standing().word == "preempted"
    assert live.history.step == 30
    make_run(path, first=21, last=40, end=None)  # its last checkpoint was that of step 20
    make_run(path, first=36, last=60)
    live.look()
    fresh = looked(path)
    for run in (live, fresh):
        assert run.history.began == {1: 1, 2: 21, 3: 36}
        assert run.history.steps.curve("loss").mean.tolist() == [loss_at(s) for s in range(1, 61)]
        assert run.history.repeated == 0
    told = [(event.kind, event.text) for event in events_of(fresh) if event.kind in ("attempt", "end")]
    assert told == [
        ("attempt", "the run begins with 1 rank"),
        ("end", "preempted after step 30: SIGUSR1"),
        ("attempt", "attempt 2 goes on after step 20 with 1 rank"),
        ("end", "attempt 2 left no outcome: it was killed"),
        ("attempt", "attempt 3 goes on after step 35 with 1 rank"),
        ("end", "done after step 60"),
    ]


def test_reading_on_takes_the_new_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_json(record(s)) for s in range(1, 11)))
    history = History(path)
    assert history.read()
    assert not history.read()
    with path.open("a") as f:
        f.write(to_json(record(11)))
    assert history.read()
    assert history.steps.total("loss")[0] == 11
    cut_back(path, 5)
    assert history.read()
    assert (history.step, history.steps.total("loss")[0]) == (5, 5)


# Logs


def test_logs_of_all_ranks_are_merged(tmp_path: Path) -> None:
    stamp = "2026-11-25 01:55:0"
    for rank in range(3):
        write_log(
            tmp_path, 1, rank, f"{stamp}1,000 INFO bigtrain: attempt 1", f"{stamp}2,000 WARNING x.y: slow disk",
            "Traceback (most recent call last):",
        )  # fmt: skip
    write_log(tmp_path, 1, 2, f"{stamp}3,000 ERROR bigtrain.recorder: failed: no: space")
    write_log(tmp_path, 2, 0, f"{stamp}4,000 INFO bigtrain: attempt 2")
    found = Logs(tmp_path / "logs").read(attempts=5)
    assert [(line.level, line.text, line.attempt, line.rank, line.ranks) for line in found] == [
        ("INFO", "attempt 1", 1, 0, 1),
        ("WARNING", "slow disk", 1, 0, 3),
        ("ERROR", "failed: no: space", 1, 2, 1),
        ("INFO", "attempt 2", 2, 0, 1),
    ]
    assert [line.attempt for line in Logs(tmp_path / "logs").read()] == [2]


# How a run stands


def test_how_a_run_stands(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=20, end=None, evaluate_every=0)
    end = START + 2 * 20
    provenance = json.loads((path / "provenance.json").read_text())

    def at(now: float, **attempt: Any) -> tuple[str, str]:
        provenance["attempts"][-1].update(attempt)
        (path / "provenance.json").write_text(json.dumps(provenance))
        return tuple(looked(path).standing(now))

    assert at(end + 5, pid=os.getpid(), host=socket.gethostname()) == ("running", "")
    assert at(end + 59) == ("running", "")
    assert at(end + 187) == ("silent", "no news for 3m07s")
    word, text = at(end + 187, pid=2**22 + 1)
    assert word == "gone"
    assert "process 4194305 is gone and left no outcome" in text
    assert at(end + 187, host="elsewhere")[0] == "silent", "processes of other hosts cannot be seen"
    assert at(end + 100, started="2023-11-14T22:14:30+00:00") == ("starting", "for 1m10s")
    (path / "outcome.json").write_text('{"state": "failed", "step": 20, "reason": "disk full"}')
    assert at(end + 5) == ("failed", "disk full")


def test_an_empty_run_and_a_damaged_one(tmp_path: Path) -> None:
    run = looked(tmp_path)
    assert run.standing().word == "empty"
    assert (run.total_steps(), run.share_done(), run.seconds_left()) == (None, None, None)
    for name in ("config.toml", "provenance.json", "outcome.json"):
        (tmp_path / name).write_text("{ not = what it should be")
    assert looked(tmp_path).unreadable == ["config.toml", "provenance.json", "outcome.json"]


def test_the_total_follows_from_tokens_and_the_time_left_from_the_last_steps(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=20, settings=["train.steps=none", "train.tokens=6400"], end=None)
    run = looked(path)
    assert run.total_steps() == 100
    assert run.share_done() == 0.2
    assert run.seconds_left() == 160


def test_secrets_in_settings_are_not_shown(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", end="failed", reason="https://me:sesame@proxy/ refused")
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace('folder = ""', 'folder = "s3://me:sesame@store/run"'))
    run = looked(path)
    assert run.where_checkpoints == "s3://***@store/run"
    assert "sesame" not in str(run.settings) + run.standing().text


def test_what_is_no_run_is_said_with_the_runs_nearby(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", last=1)
    with pytest.raises(UserError, match=r"holds no run(?s:.)*runs there: .*runs/a") as caught:
        check_run(tmp_path / "runs")
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"is no run directory(?s:.)*runs/a"):
        check_run(tmp_path / "runs" / "typo")
    check_run(tmp_path / "runs" / "a")


# Comparing


def test_figures_and_differences(tmp_path: Path) -> None:
    a = looked(make_run(tmp_path / "a", skip=[3]))
    b = looked(
        make_run(tmp_path / "b", last=40, settings=["optim.lr=2e-3", "layout.tensor=2"], end="preempted")
    )
    assert figures(a)["best held-out loss"] == "2.1500 (step 60)"
    assert figures(a)["skipped steps"] == "1"
    assert figures(a)["MFU, median"] == "40.0%"
    assert figures(b)["steps"] == "40 of 60"
    assert dict(differences([a, b])) == {"optim.lr": ["-", "0.002"], "layout.tensor": ["1", "2"]}
    assert layout(b)["tensor"] == "2"


def test_runs_of_other_batches_are_drawn_over_tokens(tmp_path: Path) -> None:
    a = looked(make_run(tmp_path / "a"))
    assert abscissa([a]) == "step"
    b = looked(make_run(tmp_path / "b"))
    assert abscissa([a, b]) == "step"
    b.history.last["tokens"] *= 2
    assert abscissa([a, b]) == "tokens"
    (loss, *_) = charts_of([a, b], "tokens", ["a", "b"])
    assert loss.x_max == 60 * 64
    assert [line.label for line in loss.lines] == ["a: training", "a: held out", "b: training", "b: held out"]
