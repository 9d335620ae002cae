"""Two hosts: their cable is cut while they train, and made whole again; one of them dies, and comes back."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Tiny, losses_of
from tests.runs.hosts import missing, two_hosts
from tests.runs.supervised import World, kill_tree

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


def test_fewer_hosts_and_more_again(tiny: Tiny, tmp_path: Path) -> None:
    """A host dies: the other goes on alone, and with it again when it is back; the same curve."""
    if reason := missing():
        pytest.skip(reason)
    settings = (*SETTINGS[:2], "train.steps=400")
    whole = tmp_path / "whole"
    assert tiny.train(whole, *settings, processes=2).code == 0
    run = tmp_path / "run"
    with two_hosts() as hosts, World(hosts, tmp_path, tiny.config, run, settings, HANG, "1:2") as world:
        world.until("step 12 of both", lambda: world.last()[0] >= 12)
        world.down.add(1)
        kill_tree(world.launchers[1].pid)
        killed = world.attempts()
        world.until("an attempt of one host", lambda: world.attempts() > killed)
        alone = world.last()[0]
        world.until("steps of one host", lambda: world.last()[0] >= alone + 8)
        assert world.state() == ""
        world.down.clear()
        world.until("an attempt of both", lambda: world.attempts() > killed + 1)
        world.until("the end of the run", lambda: world.state() == "done", 600)
    attempts = json.loads((run / "provenance.json").read_text())["attempts"]
    assert [attempt["world"] for attempt in attempts] == [2, 1, 2]
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-5)
