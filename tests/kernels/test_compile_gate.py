"""Every shipped kernel compiles for sm_90 without spilling, within shared memory, with the instructions it is for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.compile_gate import SHARED_BYTES, Build, Case, faults

HERE = Path(__file__).parent
GROUPS = sorted(path.stem.removeprefix("gate_") for path in HERE.glob("gate_*.py"))


def gate(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(HERE.parents[1] / part) for part in (".", "kernels"))
    command = [sys.executable, "-m", "tests.kernels.compile_gate", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert ran.stdout.strip(), ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_compile_for_hopper(group: str) -> None:
    table, words = gate(group, *(["--all"] if os.environ.get("BIGTRAIN_COMPILE_ALL") else []))
    assert table, f"gate_{group}.py has no case"
    assert all(row["kernels"] for row in table), words
    assert not [row for row in table if row["faults"]], words


def test_the_gate_sees_faults() -> None:
    good = Build("k", 128, 0, 1000, 4, "  HGMMA.64x64x16 R1, R2 ;\n  LDG.E.128 R4 ;")
    case = Case("a case", lambda: None, {"k": "HGMMA"})
    assert faults(case, [good]) == []
    spilling = Build("k", 255, 96, SHARED_BYTES + 1, 8, "  HMMA.16816 R1 ;\n  STL [R1] ;")
    assert faults(case, [spilling]) == [
        "k spills 96 bytes (255 registers, 8 warps)",
        f"k takes {SHARED_BYTES + 1} bytes of shared memory, more than {SHARED_BYTES}",
        "k has no HGMMA",
    ]
    assert faults(case, []) == ["k was not launched"]
    one = "  HGMMA.64x64x16 R1, R2 ;\n  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    serial = dataclasses.replace(good, sass=16 * one)
    assert faults(case, [serial]) == ["k waits for each of its 16 products (ptxas's C7512)"]
    assert faults(case, [dataclasses.replace(good, sass=16 * one.splitlines(True)[0] + one)]) == []
