"""The layouts that parity is shown for: the whole grid of axes, and a small set in which every pair occurs.

Every case gets one of four models in turn, so that grouped and single kv heads, qk-norm, biases, learned positions,
windows, and a vocabulary and ffn width that no tensor size divides meet all axes.
"""

from __future__ import annotations

import itertools
from typing import Any

from tests.runs.engine_parts import SEQUENCES, S

Case = dict[str, Any]

FACTORS: dict[str, tuple[Any, ...]] = {
    "world": (2, 4, 8),
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "context": (1, 2),
    "zero": (0, 1, 2, 3),
    "schedule": ("1f1b", "gpipe", "interleaved", "interleaved-zb", "zbv"),
    "sequence": (True, False),
    "context_by": ("gather", "ulysses"),
    "recompute": ("none", "selective", "full"),
    "tied": (True, False),
    "model": ("llama", "gpt", "mqa", "window"),
}

_COMMON: dict[str, Any] = {"width": 32, "heads": 8, "max_length": S}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"vocab_size": 96, "kv_heads": 2, "ffn_width": 40, "qk_norm": True},
    "gpt": _COMMON
    | {
        "vocab_size": 97,
        "ffn_width": 42,
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu",
        "bias": True,
    },
    "mqa": _COMMON | {"vocab_size": 101, "kv_heads": 1, "ffn_width": 43, "qkv_bias": True},
    "window": _COMMON | {"vocab_size": 96, "kv_heads": 4, "ffn_width": 48, "sliding_window": 7},
}


def legal(c: Case) -> bool:
    """Whether the product offers this combination, and it is not another one written differently."""
    model_ranks = c["tensor"] * c["pipeline"] * c["context"]
    return (
        c["world"] % model_ranks == 0
        and (c["pipeline"] > 1 or c["schedule"] == "1f1b")
        and (c["tensor"] > 1 or c["sequence"])
        and (c["context"] > 1 or c["context_by"] == "gather")
        and not (c["zero"] == 3 and c["pipeline"] > 1)
    )


def grid() -> list[Case]:
    """Every legal combination of the axes; recomputation, tying and the model take turns."""
    turns = itertools.cycle(itertools.product(FACTORS["recompute"], FACTORS["tied"], FACTORS["model"]))
    names = [name for name in FACTORS if name not in ("recompute", "tied", "model")]
    found = []
    for values in itertools.product(*(FACTORS[name] for name in names)):
        c = dict(zip(names, values, strict=True))
        if legal(c):
            # 7 and 24 share no factor: every turn meets every axis.
            turn = next(itertools.islice(turns, 6, None))
            found.append(c | dict(zip(("recompute", "tied", "model"), turn, strict=True)))
    return found


def pairs(c: Case) -> set[tuple[Any, ...]]:
    """Every two settings that occur together; the data axis counts, the number of processes does not."""
    settings = {k: v for k, v in c.items() if k != "world"} | {"data": data_of(c)}
    return set(itertools.combinations(settings.items(), 2))


def data_of(c: Case) -> int:
    """Ranks on the data axis."""
    return int(c["world"] // (c["tensor"] * c["pipeline"] * c["context"]))


def pairwise(cases: list[Case]) -> list[Case]:
    """A small selection in which every pair of settings that occurs in `cases` occurs, cheap worlds first."""
    cost = {2: 1.0, 4: 3.0, 8: 12.0}  # measured: processes on two cores
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda c: len(pairs(c) & missing) / cost[c["world"]])
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name_of(c: Case) -> str:
    """A readable name, unique in the grid."""
    parts = [f"d{data_of(c)}", f"z{c['zero']}"]
    if c["tensor"] > 1:
        parts.append(f"t{c['tensor']}" + ("s" if c["sequence"] else ""))
    if c["pipeline"] > 1:
        parts.append(f"p{c['pipeline']}-{c['schedule']}")
    if c["context"] > 1:
        parts.append(f"c{c['context']}{c['context_by'][0]}")
    return "-".join([*parts, c["model"], c["recompute"], "tied" if c["tied"] else "untied"])


def run_of(c: Case, *, steps: int, **more: Any) -> Case:
    """The case as `layout_worker` takes it."""
    layout = {name: c[name] for name in FACTORS if name not in ("world", "tied", "model")}
    layout["chunks"] = 2 if c["schedule"] not in ("1f1b", "gpipe") else 1
    layers = max(4, c["pipeline"] * layout["chunks"])
    model = MODELS[c["model"]] | {"tied": c["tied"], "layers": layers}
    sequences = [n * max(1, data_of(c) // 4) for n in SEQUENCES]
    return {
        "name": name_of(c),
        "steps": steps,
        "sequences": sequences,
        "held_out": 2 * data_of(c),
        "config": {"model": model, "layout": layout, **more},
    }
