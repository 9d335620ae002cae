"""`bigtrain top` and `bigtrain report` on the directories of real runs, and the logs that they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs.conftest import Tiny
from tests.test_report import Page

pytestmark = pytest.mark.runs


def log_of(run: Path, attempt: int, rank: int) -> str:
    return (run / "logs" / f"{attempt:04d}" / f"rank_{rank}.log").read_text()


def test_a_run_that_is_done(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    shown = tiny("top", str(whole), "--once")
    assert shown.code == 0, shown.err
    for text in (
        " done ",
        "step 30 / 30",
        "100.0%",
        "steps 20  25  30",
        "done after step 30",
        "held out",
        "▇",
    ):
        assert text in shown.out, shown.out
    written = tiny("report", str(whole), "--out", str(tmp_path / "out"))
    assert written.code == 0, written.err
    page = Page((tmp_path / "out" / "index.html").read_text())
    for text in ("tiny done", "steps 30 of 30", "checkpoint of step 30 saved", "the longest document has"):
        assert text in page.text, text
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(page.ids)


def test_a_run_that_failed_on_two_ranks_and_went_on(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    failed = tiny.train(run, "optim.lr=1e30", "optim.clip=0", "train.max_skipped=3", processes=2)
    assert failed.code != 0
    for rank in (0, 1):
        log = log_of(run, 1, rank)
        assert f"attempt 1, rank {rank} of 2: process " in log
        assert "ERROR bigtrain.recorder: failed after step" in log
        assert "Traceback" in log
    shown = tiny("top", str(run), "--once")
    assert " failed " in shown.out
    assert "steps skipped (not finite, or a spike)" in shown.out
    reason = json.loads((run / "outcome.json").read_text())["reason"]
    again = tiny.train(run, "train.steps=6")
    assert again.code == 0, again.err
    ended = json.loads((run / "provenance.json").read_text())["attempts"][0]["ended"]
    assert (ended["state"], ended["reason"]) == ("failed", reason)
    written = tiny("report", str(run))
    assert written.code == 0, written.err
    page = Page((run / "report" / "index.html").read_text())
    for text in (
        "the run begins with 2 ranks",
        "failed after step",
        "attempt 2 goes on",
        "changed: train.steps",
        "done",
    ):
        assert text in page.text, text
