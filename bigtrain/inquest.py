"""Who is to blame when a run stands still: reports of the ranks in, one sentence out. Pure; `watchdog` gathers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigtrain.rollcall import ranks_named

LISTED = 4
"""Ranks that a verdict tells about one by one; it counts the rest."""
LONG = 60.0
"""Seconds without progress that make a rank suspect when another's connections broke by a time-out."""


@dataclass(frozen=True)
class Report:
    """What a living rank says of itself."""

    rank: int
    host: str
    step: int
    phase: str
    idle: float
    """Seconds that it was awake since its main thread last got on."""
    limit: float
    """Seconds that it may be so, now."""
    where: str
    waits: bool
    """Whether it waits for other ranks."""
    collective: str
    fails: bool = False
    """Its main thread has lost its connections, and asks why."""


@dataclass(frozen=True)
class Silent:
    """A rank that answers nothing."""

    rank: int
    host: str
    step: int
    phase: str
    process: str
    """What another rank on its machine sees of its process; "" when none is there."""


def judge(reports: Sequence[Report], silent: Sequence[Silent]) -> str:
    """The cause, in one or two sentences. "" when some rank gets on: then nothing hangs, and the others wait rightly.

    Silent ranks are blamed first, then those that do not wait for others, then those that are behind.
    """
    if silent:
        stands = f"; the others stand in step {max(r.step for r in reports)}" if reports else ""
        return _silence(silent) + stands
    lost = [r for r in reports if r.fails]
    stuck = [r for r in reports if not r.fails]
    guilty = [r for r in stuck if not r.waits and (not lost or r.idle > LONG)]
    if lost and not guilty:
        return f"{ranks_named([r.rank for r in lost])} lost connections, though every rank lives: {lost[0].where}"
    if not lost and any(r.idle < r.limit / 2 for r in reports):
        return ""
    if guilty:
        return _told(guilty, "does not get on", "do not get on")
    behind = _behind(stuck)
    if behind:
        return _told(behind, "waits elsewhere than the others", "wait elsewhere than the others")
    return "all ranks wait for each other: " + _lines(stuck)


def _silence(silent: Sequence[Silent]) -> str:
    """The sentence about ranks that do not answer; those of one host together."""
    hosts: dict[tuple[str, str], list[Silent]] = {}
    for one in silent:
        hosts.setdefault((one.host, one.process), []).append(one)
    parts = []
    for (host, process), ranks in list(hosts.items())[:LISTED]:
        first = ranks[0]
        verb = "does not answer" if len(ranks) == 1 else "do not answer"
        why = process or "killed, frozen or cut off"
        parts.append(
            f"{ranks_named([r.rank for r in ranks])} on {host} {verb} ({why}), last heard of in "
            f"step {first.step}, {first.phase}"
        )
    if len(hosts) > LISTED:
        parts.append(f"and {len(hosts) - LISTED} more hosts")
    return "; ".join(parts)


def _behind(reports: Sequence[Report]) -> list[Report]:
    """Those in an earlier step than the latest, or in another collective than most."""
    latest = max(r.step for r in reports)
    if any(r.step < latest for r in reports):
        return [r for r in reports if r.step < latest]
    counts: dict[str, int] = {}
    for r in reports:
        counts[r.collective] = counts.get(r.collective, 0) + 1
    most = max(counts, key=lambda c: counts[c])
    return [r for r in reports if r.collective != most] if 2 * counts[most] > len(reports) else []


def _told(reports: Sequence[Report], one: str, many: str) -> str:
    verb = one if len(reports) == 1 else many
    return f"{ranks_named([r.rank for r in reports])} {verb}: " + _lines(reports)


def _lines(reports: Sequence[Report]) -> str:
    parts = [f"rank {r.rank} on {r.host} {doing(r)}" for r in reports[:LISTED]]
    if len(reports) > LISTED:
        parts.append(f"and {len(reports) - LISTED} more")
    return "; ".join(parts)


def doing(report: Report) -> str:
    """ "in step 41, training, for 12 s: no collective: sleep, called by f at bigtrain/x.py:3"."""
    since = f"for {report.idle:.0f} s in step {report.step}, {report.phase}"
    if report.waits and report.collective:
        return f"{since}: in {report.collective} ({report.where})"
    if report.waits:
        return f"{since}: waits for others in {report.where}"
    return f"{since}: in no collective, but in {report.where}"


def process_state(stat: Mapping[str, str] | None) -> str:
    """What /proc says of a process (fields "state" and so on; None: it is gone), in words for a verdict."""
    if stat is None or stat.get("state") in ("Z", "X"):
        return "its process is gone: killed, perhaps by out of memory"
    match stat.get("state"):
        case "T" | "t":
            return "its process is stopped, by SIGSTOP or a debugger"
        case "D":
            return "its process waits for a disk, a network file system or a driver"
        case _:
            return "its process lives, but its Python does not run"
