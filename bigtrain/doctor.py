"""`bigtrain doctor`: is this machine, is this cluster, fit for the run? Says what is wrong and what to do about it."""

from __future__ import annotations

import argparse
import contextlib
import socket
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.errors import BigtrainError
from bigtrain.grid import Grid, grid_of
from bigtrain.heartbeat import Pulse
from bigtrain.lastwords import lost_connection
from bigtrain.machine_checks import CHECKS, Finding, Subject, examine
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.network_checks import clocks, measure, rows
from bigtrain.place import Place, discover
from bigtrain.rollcall import code_digest
from bigtrain.watchdog import Watchdog

_WIDTH = 80
_PATIENCE = 120.0
"""Seconds without progress that mean a hang, three times as many at the start: the watchdog then names the rank."""
_LISTED = 8
"""Machines with a problem of one kind that are shown."""
_MARKS = {"ok": "ok ", "note": "-  ", "bad": "BAD"}


def doctor_command(args: argparse.Namespace) -> int:
    """Run the verb; exit code 1 when something is bad, on every rank."""
    place = discover()
    findings: list[Finding] = []
    config = _config(args, place) if args.config else None
    grid = None
    if config is not None:
        try:
            grid = grid_of(config, place.world)
        except BigtrainError as e:  # the machine may be sound all the same
            findings.append(
                Finding("bad", "layout", e.what.replace("\n", " "), "change [layout], or the ranks")
            )
    facts = {"code": code_digest()}
    with contextlib.ExitStack() as stack:
        dog = Watchdog(seconds=_PATIENCE, gather=0)
        stack.callback(dog.close)
        mesh = rendezvous(grid or Grid(data=place.world), place=place, facts=facts, timeout_minutes=args.wait)
        stack.callback(mesh.close)
        dog.watch(mesh)
        stack.callback(dog.leave)
        return int(_doctor(mesh, findings, config, args, dog.pulse))


def _config(args: argparse.Namespace, place: Place) -> Config:
    """The config, with the layout that these ranks would choose if it says "auto"."""

    def choose_layout(config: Config) -> Config:
        from bigtrain.plan.auto import choose

        return choose(config, place, Path(args.run_dir or f"runs/{config.name}"))[0]

    return load(find_config(args.config), args.overrides, auto=choose_layout)


def _doctor(
    mesh: Mesh, findings: list[Finding], config: Config | None, args: argparse.Namespace, pulse: Pulse
) -> bool:
    """Examine, tell, and whether something is bad (the same answer on every rank)."""
    run = Path(args.run_dir or (f"runs/{config.name}" if config else "."))
    here: list[Finding] = []
    if mesh.place.local_rank == 0:  # once a machine
        here = examine(CHECKS, Subject(mesh.place, config, run))
    told = cast(list[tuple[str, list[Finding]]], mesh.gather((socket.gethostname(), here)))
    hosts = [host for host, _ in told]
    by_host = {host: found for host, found in told if found}
    findings = findings + merged(by_host)
    network: list[str] = []
    if mesh.world > 1:
        try:
            table, slow = measure(mesh, pulse)
            findings += slow
            network = list(rows(table))
            findings += [clock] if (clock := clocks(mesh, hosts)) is not None else []
        except (RuntimeError, ValueError) as e:
            findings.append(_broken(e, mesh))
    bad = [finding for finding in findings if finding.level == "bad"]
    if mesh.first:
        backend = {"cuda": "NCCL", "cpu": "gloo"}[mesh.device.type]
        ranks = f"{mesh.world} rank{'s' * (mesh.world != 1)} ({backend})" if mesh.world > 1 else "1 process"
        machines = f"{len(set(hosts))} machine{'s' * (len(set(hosts)) != 1)}"
        print(f"bigtrain doctor: {ranks} on {machines}, layout: {mesh.grid}\n")
        print("\n".join(lines(findings, network)), flush=True)
    return bool(bad)


def _broken(error: Exception, mesh: Mesh) -> Finding:
    """That the ranks met, and then could not talk."""
    lost = lost_connection(error, mesh.store, mesh.rank)
    text = lost.what if lost else f"{type(error).__name__}: {error}".partition("\n")[0]
    do = "look at the network that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names, and at the other ranks' output"
    return Finding("bad", "network", f"the ranks met, but could not talk: {text}", do)


def merged(by_host: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Findings of all machines: what is the same everywhere once, what is wrong with its machines.

    Packages that differ between machines are bad.
    """
    order = list(dict.fromkeys(finding.name for found in by_host.values() for finding in found))
    hosts: dict[Finding, list[str]] = {}
    for host, found in by_host.items():
        for finding in found:
            hosts.setdefault(finding, []).append(host)
    merged: list[Finding] = []
    sound: set[str] = set()
    for finding, where in hosts.items():
        alike = len(where) == len(by_host)
        if not alike and finding.level != "bad" and finding.name not in _ALIKE:
            if finding.name not in sound:  # numbers differ a little from machine to machine: one is enough
                text = f"{finding.text} (on {where[0]}, one of {len(by_host)})"
                merged.append(Finding(finding.level, finding.name, text))
                sound.add(finding.name)
            continue
        if alike:
            merged.append(finding)
            continue
        named = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        changed = asdict(finding) | {"text": f"{finding.text} (on {named})"}
        if finding.name in _ALIKE:
            changed |= {"level": "bad", "do": "install the same version on every machine"}
        merged.append(Finding(**cast(Any, changed)))
    return sorted(merged, key=lambda f: order.index(f.name))


_ALIKE = ("python", "torch", "deepspeed", "triton", "numpy", "sentencepiece", "safetensors")


def lines(findings: Sequence[Finding], network: Sequence[str]) -> Iterator[str]:
    """What is printed: the findings, the network's table, and how many are bad."""
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.name] = counts.get(finding.name, 0) + 1
        if counts[finding.name] <= _LISTED or finding.name in ("environment", "network"):
            yield from _shown(finding)
    for name, count in counts.items():
        if count > _LISTED and name not in ("environment", "network"):
            yield f"     {name:<15} ... and {count - _LISTED} more"
    if network:
        yield ""
        yield from network
    bad = sum(finding.level == "bad" for finding in findings)
    yield ""
    yield "everything looks sound" if not bad else f"{bad} problem{'s' * (bad != 1)}: see BAD above"


def _shown(finding: Finding) -> Iterator[str]:
    """One finding, wrapped."""
    indent = " " * 21
    start = f"{_MARKS[finding.level]}  {finding.name:<15} "
    yield from textwrap.wrap(
        finding.text, _WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False
    )
    if finding.do:
        yield from textwrap.wrap(
            f"-> {finding.do}", _WIDTH, initial_indent=indent, subsequent_indent=indent + "   "
        )
