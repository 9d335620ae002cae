"""benchmarks/kernels.py without a GPU: the checks of its cases, the timing, the aims, the JSON and the chart."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels as module
from benchmarks.kernel_cases import losses, small
from benchmarks.kernel_cases.case import KernelCase

CASES = {case.name.rsplit(" ", 1)[0]: case for case in [*small.CASES, *losses.CASES]}
"""One of each kind."""


def pause(seconds: float) -> None:
    time.sleep(seconds)


def made(error: float = 0.5) -> KernelCase:
    """Ours takes 2 ms, a peer 6, and another does not work."""

    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    def prepare(seed: int) -> dict[str, module.Run]:
        return {"bigtrain": lambda: pause(0.002), "slow": lambda: pause(0.006), "broken": broken}

    aims = {"slow": 2.0, "broken": 1.1, "ceiling": 0.9}
    return KernelCase("a case", 4_000_000, "GB/s", prepare, lambda seed: error, aims)


@pytest.mark.parametrize("name", CASES)
def test_ours_is_right_where_it_is_timed(name: str) -> None:
    assert 0 < CASES[name].check(7) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="events of the CPU")
def test_a_case_is_measured_judged_told_and_drawn(tmp_path: Path) -> None:
    row = module.run_case(made(), 5, module.on_cpu, 4.0, 1)
    assert row["right"]
    assert row["failed"] == {"broken": "RuntimeError: no such kernel"}
    ours, slow = (row["implementations"][name] for name in ("bigtrain", "slow"))
    assert 2 <= ours["ms"] < slow["ms"]
    assert ours["ms_10_90"][0] <= ours["ms"] <= ours["ms_10_90"][1]
    assert ours["GB/s"] == pytest.approx(4_000_000 / ours["ms"] * 1e-6, abs=0.06)  # rounded to a tenth
    faster, broken, ceiling = row["aims"]
    assert faster["reached"] == pytest.approx(slow["ms"] / ours["ms"], rel=1e-2)
    assert faster["met"] == (faster["reached"] >= 2)
    assert (broken["reached"], broken["met"]) == (None, False)
    assert ceiling["reached"] == pytest.approx(ours["share_of_ceiling"], abs=1e-3)
    words = module.told(row)
    assert "aim 1.1 times as fast as broken: not measured here   NOT REACHED" in words
    assert "WRONG" in module.told(module.run_case(made(1.5), 1, module.on_cpu, 4.0, 1))
    limits = module.ceilings(module.on_cpu, size=64, copied=1 << 16)
    assert all(value > 0 for value in limits.values())
    report: dict[str, Any] = {"machine": "a CPU", "date": "today", "ceilings": limits, "cases": [row]}
    json.dumps(report)
    module.draw(report, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 5000


def test_what_cannot_be_run_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (["smal"], "no group 'smal': there are attention, losses, small"),
        (["--only", "softmax"], "no case has 'softmax' in its name"),
        (["small"], "there is no GPU here"),
    ):
        if torch.cuda.is_available() and arguments == ["small"]:
            continue
        monkeypatch.setattr("sys.argv", ["kernels", *arguments])
        with pytest.raises(SystemExit):
            module.main()
        assert message in capsys.readouterr().err
