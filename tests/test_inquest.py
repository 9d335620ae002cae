"""Verdicts on a run that stands still."""

from __future__ import annotations

from dataclasses import replace

from bigtrain.inquest import Report, Silent, judge, process_state

WAITS = Report(0, "a", 7, "training", 700.0, 600.0, "f at bigtrain/x.py:3", True, "all_reduce number 12, [4]")


def ranks(*changed: Report, world: int = 4) -> list[Report]:
    """All ranks wait in the same collective but for those given."""
    known = {r.rank: r for r in changed}
    return [known.get(rank, replace(WAITS, rank=rank)) for rank in range(world)]


def test_silent_ranks_come_first_those_of_a_host_together() -> None:
    gone = process_state(None)
    silent = [
        Silent(2, "b", 6, "training", gone),
        Silent(3, "b", 6, "training", gone),
        Silent(9, "c", 0, "starting", ""),
    ]
    said = judge(ranks(replace(WAITS, rank=1, waits=False)), silent)
    assert said == (
        "ranks 2-3 on b do not answer (its process is gone: killed, perhaps by out of memory), last heard of "
        "in step 6, "
        "training; rank 9 on c does not answer (killed, frozen or cut off), last heard of in step 0, starting; "
        "the others stand in step 7"
    )


def test_who_does_not_wait_is_what_the_others_wait_for() -> None:
    said = judge(
        ranks(replace(WAITS, rank=2, host="b", waits=False, where="sleep, called by g at y.py:1")), []
    )
    assert said == (
        "rank 2 does not get on: rank 2 on b for 700 s in step 7, training: in no collective, but in sleep, "
        "called by g at y.py:1"
    )


def test_who_is_a_step_behind_or_in_another_collective() -> None:
    assert judge(ranks(replace(WAITS, rank=1, step=6)), []).startswith(
        "rank 1 waits elsewhere than the others: "
    )
    other = judge(ranks(replace(WAITS, rank=3, collective="all_gather number 12, [4]")), [])
    assert other.startswith(
        "rank 3 waits elsewhere than the others: rank 3 on a for 700 s in step 7, training: in all_g"
    )


def test_nobody_to_blame_alone() -> None:
    halves = ranks(*(replace(WAITS, rank=r, collective="recv") for r in (0, 1)))
    assert judge(halves, []).startswith("all ranks wait for each other: rank 0 on a for 700 s")


def test_the_others_wait_rightly_for_a_rank_that_gets_on() -> None:
    assert judge(ranks(replace(WAITS, rank=2, waits=False, idle=3.0)), []) == ""


def test_broken_connections_without_a_death() -> None:
    lost = [replace(r, fails=True, where="Connection reset by peer", idle=0.1) for r in ranks()[:2]]
    busy = [replace(r, idle=0.1, waits=False) for r in ranks()[2:]]
    said = judge([*lost, *busy], [])
    assert said == "ranks 0-1 lost connections, though every rank lives: Connection reset by peer"
    hung = replace(busy[0], idle=1800.0)
    assert judge([*lost, hung, busy[1]], []).startswith("rank 2 does not get on"), "a time-out has a cause"


def test_what_proc_says_of_a_process() -> None:
    assert "gone" in process_state(None)
    assert "gone" in process_state({"state": "Z"})
    assert "SIGSTOP" in process_state({"state": "T"})
    assert "disk" in process_state({"state": "D"})
    assert "lives" in process_state({"state": "S"})
