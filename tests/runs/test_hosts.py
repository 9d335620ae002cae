"""Two hosts whose cable is cut while they train: both notice, say so, and go on together when it is whole again."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Tiny, losses_of
from tests.runs.hosts import missing, two_hosts
from tests.runs.supervised import World

pytestmark = [pytest.mark.runs, pytest.mark.timeout(900)]

SETTINGS = ("layout.zero=0", "train.eval_every=0", "train.steps=60")
HANG = 20.0


def test_a_cut_link(tiny: Tiny, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    whole = tmp_path / "whole"
    assert tiny.train(whole, *SETTINGS, processes=2).code == 0
    run = tmp_path / "run"
    with two_hosts() as hosts, World(hosts, tmp_path, tiny.config, run, SETTINGS, HANG) as world:
        world.until("step 12", lambda: world.last()[0] >= 12)
        ranks = [Path(f"/proc/{pid}") for pid in world.ranks()]
        hosts.cut()
        cut = time.monotonic()
        try:
            # Silence counts after a fifth of HANG, and is looked at after as long again; the rest is leaving.
            world.until(
                "the end of both ranks", lambda: not any(rank.exists() for rank in ranks), 2 * HANG + 20
            )
        finally:
            print(f"both ranks ended {time.monotonic() - cut:.0f} s after the cut")
            hosts.mend()
        said = [(tmp_path / f"host{host}.log").read_text() for host in (0, 1)]
        world.until("the end of the run", lambda: world.state() == "done", 600)
    for text in said:
        assert "run failed" in text, text[-3000:]
        assert re.search(r"rank \d on host\d (does not answer|is cut off)", text.split("run failed")[1]), (
            text[-3000:]
        )
    assert losses_of(run) == losses_of(whole)
