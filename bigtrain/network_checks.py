"""How fast ranks talk along each axis of a layout, which group is slower than others, how far clocks differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from bigtrain.grid import AXES
from bigtrain.heartbeat import Pulse
from bigtrain.machine_checks import Finding
from bigtrain.mesh import Axis, Mesh
from bigtrain.rollcall import ranks_named

SIZES = (2**10, 2**16, 2**20, 2**26)
"""Bytes a message: the smallest tells the latency, the largest the bandwidth."""
_REPEATS = 5
"""The median of so many counts, after one that does not."""
_UNEVEN = 1.5
"""A group is slow that takes so many times the median of the axis's groups."""
_CLOCK = 1.0
"""Seconds that clocks may differ: more, and logs and checkpoints' times cannot be put in order."""


@dataclass(frozen=True)
class Measured:
    """One operation on one axis."""

    axis: str
    size: int
    """Ranks of a group."""
    what: str
    seconds: tuple[float, ...]
    """For each of SIZES; of the slowest group."""
    bytes_moved: tuple[float, ...]
    """That each rank sends."""


def measure(mesh: Mesh, pulse: Pulse) -> tuple[list[Measured], list[Finding]]:
    """Every axis with more than one rank (collective). The table, and groups that are slower than others."""
    table: list[Measured] = []
    findings: list[Finding] = []
    for name in AXES:
        axis = mesh.axes[name]
        if axis.size == 1:
            continue
        for what, act, share in _operations(axis, mesh):
            pulse.mark(f"measuring {name} {what}")
            mine = [_timed(act, size, mesh) for size in SIZES]
            groups = cast(list[tuple[tuple[int, ...], list[float]]], mesh.gather((axis.ranks, mine)))
            worst = tuple(max(seconds[i] for _, seconds in groups) for i in range(len(SIZES)))
            table.append(Measured(name, axis.size, what, worst, tuple(share * size for size in SIZES)))
            findings += uneven(name, what, groups)
    return table, findings


def _operations(axis: Axis, mesh: Mesh) -> Iterator[tuple[str, Callable[[int], None], float]]:
    """(name, what does it with so many bytes, share of the bytes that each rank sends) for an axis."""
    n, device = axis.size, mesh.device

    def all_reduce(size: int) -> None:
        dist.all_reduce(_buffer(size, device), group=axis.group)

    def all_gather(size: int) -> None:
        part = _buffer(max(size // n, 4), device)
        parts = [torch.empty_like(part) for _ in range(n)]
        dist.all_gather(parts, part, group=axis.group)

    def to_the_next(size: int) -> None:
        """Even stages send to the next ones, then odd ones do."""
        buffer, group = _buffer(size, device), mesh.axes["down"].group
        for turn in (0, 1):
            if axis.rank % 2 == turn and axis.rank + 1 < n:
                dist.send(buffer, axis.ranks[axis.rank + 1], group=group)
            elif axis.rank % 2 != turn and axis.rank > 0:
                dist.recv(buffer, axis.ranks[axis.rank - 1], group=group)

    if axis.name == "pipeline":
        yield "send to next", to_the_next, 1.0
        return
    # A ring sends each byte twice for a sum, once for a gathering: the "bus bandwidth" of nccl-tests.
    yield "all-reduce", all_reduce, 2 * (n - 1) / n
    yield "all-gather", all_gather, (n - 1) / n


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size // 4, dtype=torch.float32, device=device)


def _timed(act: Callable[[int], None], size: int, mesh: Mesh) -> float:
    """Median seconds of an operation on this rank, all groups at it at the same time."""
    times = []
    for _ in range(_REPEATS + 1):
        mesh.barrier()
        began = time.perf_counter()
        act(size)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def uneven(
    axis: str, what: str, groups: Sequence[tuple[tuple[int, ...], Sequence[float]]]
) -> Iterator[Finding]:
    """Groups of an axis that take much longer than the others for the largest message: [(ranks, seconds)] by rank."""
    of_group: dict[tuple[int, ...], float] = {}
    for ranks, seconds in groups:
        of_group[ranks] = max(seconds[-1], of_group.get(ranks, 0.0))
    usual = statistics.median(of_group.values())
    for ranks, longest in sorted(of_group.items()):
        if len(of_group) > 2 and longest > _UNEVEN * usual:
            ratio = longest / usual
            text = f"{axis}: {what} of {ranks_named(ranks)} takes {ratio:.1f} x that of other groups"
            yield Finding("bad", "network", text, "look at the cables, links and GPUs of their machines")


def rows(table: Sequence[Measured]) -> Iterator[str]:
    """The table, 80 columns wide: time for small messages, bandwidth for large ones."""
    if not table:
        return
    yield f"{'axis':<9}{'ranks':>6}  {'what':<13}" + "".join(f"{_size(size):>12}" for size in SIZES)
    for m in table:
        cells = [
            f"{seconds * 1e6:,.0f} us" if size < 2**20 else f"{moved / seconds / 1e9:.3g} GB/s"
            for size, seconds, moved in zip(SIZES, m.seconds, m.bytes_moved, strict=True)
        ]
        yield f"{m.axis:<9}{m.size:>6}  {m.what:<13}" + "".join(f"{cell:>12}" for cell in cells)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


def clocks(mesh: Mesh, hosts: Sequence[str]) -> Finding | None:
    """How far the machines' clocks differ (collective); None on one machine. `hosts` by rank."""
    if len(set(hosts)) == 1:
        return None
    rounds = []
    for _ in range(_REPEATS):
        mesh.barrier()
        rounds.append(cast(list[float], mesh.gather(time.time())))
    return clock_finding(rounds, hosts)


def clock_finding(rounds: Sequence[Sequence[float]], hosts: Sequence[str]) -> Finding:
    """From several readings of all ranks' clocks at about the same time."""
    offsets = {
        host: statistics.median(times[rank] - statistics.median(times) for times in rounds)
        for rank, host in reversed(list(enumerate(hosts)))
    }
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    text = f"the clock of {worst} differs most from the others' median, by {offsets[worst]:+.3f} s"
    if abs(offsets[worst]) > _CLOCK:
        return Finding("bad", "clocks", text, "start chrony or ntpd there")
    return Finding("ok", "clocks", text)
