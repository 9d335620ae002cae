"""GPUs and networks by name: hardware.toml, and the user's own file of the same form."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bigtrain.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    memory_gib: float
    """GiB that torch can allocate."""
    peak_tflops: Mapping[str, float]
    """Dense TFLOP/s by precision."""
    bandwidth_gb_s: float
    """Memory, GB/s."""
    link_gb_s: float
    """To the other cards of the node, GB/s in one direction."""
    per_node: int
    clock: float = 1.0
    """Sustained share of the peak where the power is limited below the data sheet's."""

    def flops(self, precision: str) -> float:
        """FLOP/s of matrix products; of a precision that it does not have, of the next wider one."""
        for name in (precision, "bf16", "fp16", "fp32"):
            if name in self.peak_tflops:
                return self.peak_tflops[name] * 1e12 * self.clock
        raise UserError("has no peak_tflops", where=self.name, do="give bf16, fp16 or fp32")


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    gb_s: float
    """GB/s of a node in one direction."""
    latency_us: float
    """Microseconds of one message."""
    rails: bool = True
    """Whether cards of the same place in their nodes have paths of their own, so that collectives do not collide."""


@dataclass(frozen=True)
class Cluster:
    """So many cards of a kind."""

    gpu: Gpu
    gpus: int
    per_node: int
    network: Network

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.per_node)


_USUAL = {
    "a100-40gb": "hdr200x8",
    "a100-80gb": "hdr200x8",
    "v100-32gb": "ethernet100",
    "l40s": "ethernet100",
    "a10g": "ethernet100",
    "rtx4090": "ethernet100",
}
"""Where the default, ndr400x8, is not what such machines come with."""
_SHORT = {"a100": "a100-80gb", "h100": "h100-80gb", "v100": "v100-32gb", "4090": "rtx4090"}


def find_gpu(name: str, extra: Path | None = None) -> Gpu:
    """A card by name, as on the data sheet or as the driver says it ("NVIDIA H100 80GB HBM3").

    Raises UserError listing the known ones.
    """
    known = _table(extra)["gpu"]
    wanted = _key(name)
    found = _SHORT.get(wanted, wanted)
    if found not in known:  # as a driver says it
        words = [key for key in (*known, *_SHORT) if {*key.split("-")} <= {*wanted.split("-")}]
        found = max(words, key=len, default="")
        found = _SHORT.get(found, found)
    if found not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no GPU {name!r} is known",
            where="--gpu",
            do=f"{hint}Known: {', '.join(sorted(known))}; describe others in a file for --hardware",
        )
    row = {key: value for key, value in known[found].items() if key != "source"}
    return Gpu(found, **row)


def cluster_of(gpu: str, gpus: int, network: str | None = None, extra: Path | None = None) -> Cluster:
    """A cluster of so many cards. Raises UserError for an unknown card or network, or no cards."""
    card = find_gpu(gpu, extra)
    if gpus < 1:
        raise UserError(f"{gpus} GPUs train nothing", where="--gpus", do="give 1 or more")
    known = _table(extra)["network"]
    wanted = _key(network) if network else _USUAL.get(card.name, "ndr400x8")
    if wanted not in known:
        raise UserError(
            f"no network {network!r} is known",
            where="--network",
            do=f"known: {', '.join(sorted(known))}; describe others in a file for --hardware",
        )
    row = {key: value for key, value in known[wanted].items() if key != "source"}
    return Cluster(card, gpus, card.per_node, Network(wanted, **row))


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace("_", "-")


@functools.cache
def _table(extra: Path | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Both tables; what the user's file has counts first. Raises UserError when that is not of the right form."""
    text = resources.files("bigtrain.plan").joinpath("hardware.toml").read_text()
    table = tomllib.loads(text)
    if extra is None:
        return table
    try:
        own = tomllib.loads(extra.read_text())
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror}", where=str(extra)) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"is not TOML: {e}", where=str(extra)) from e
    if problems := [*_problems(own)]:
        raise UserError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}\n  " + "\n  ".join(problems),
            where=str(extra),
            do="see bigtrain/plan/hardware.toml for the form",
        )
    return {
        kind: table[kind] | {_key(k): v for k, v in own.get(kind, {}).items()} for kind in ("gpu", "network")
    }


_FIELDS = {
    "gpu": ("memory_gib", "peak_tflops", "bandwidth_gb_s", "link_gb_s", "per_node"),
    "network": ("gb_s", "latency_us"),
}


def _problems(own: Mapping[str, Any]) -> list[str]:
    """What is wrong with a user's file."""
    found = [f"unknown section [{kind}]" for kind in own if kind not in _FIELDS]
    for kind, fields in _FIELDS.items():
        for name, row in own.get(kind, {}).items():
            where = f"[{kind}.{name}]"
            found += [f"{where} needs {field}" for field in fields if field not in row]
            found += [
                f"{where} has no place for {key}"
                for key in row
                if key not in (*fields, "source", "clock", "rails")
            ]
            for key, value in row.items():
                numbers = list(value.values()) if isinstance(value, dict) else [value]
                if key != "source" and not all(isinstance(n, int | float) and n > 0 for n in numbers):
                    found.append(f"{where} {key}: {value!r} is not above 0")
    return found
