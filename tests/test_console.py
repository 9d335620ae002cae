"""What people see: aligned lines of at most 120 characters on a log, a live line on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.console import WIDTH, Console, Startup, duration, short, step_line, summary
from bigtrain.metrics import EvalRecord, StepRecord, to_json

RECORD = StepRecord(
    step=1200, loss=3.2915, loss_z=0.12, grad_norm=1.234, lr=3e-4, tokens=4_915_200, samples=9600, epochs=0.123,
    seconds=0.36, tokens_per_second=1.234e6, tokens_per_second_per_device=154_250.0, mfu=0.412,
    memory_bytes=72 * 2**30, skipped=False, loss_scale=1.0, time=1e9,
)  # fmt: skip


def line(record: StepRecord, total: int = 100_000, devices: int = 8, seconds_left: float = 30_000) -> str:
    return step_line(record, total, devices=devices, unit="gpu", seconds_left=seconds_left)


def test_a_line_tells_everything_that_matters() -> None:
    assert line(RECORD) == (
        "  1200/100000  loss 3.2915 +0.1z  grad 1.2340  lr 3.0e-04  1.23M tok/s  154k/gpu"
        "  mfu 41.2%   72G  data 12.3%  eta 8h20m"
    )


def test_unknown_mfu_and_a_single_device_are_not_shown() -> None:
    shown = line(replace(RECORD, mfu=None, loss_z=None), devices=1)
    assert "mfu" not in shown
    assert "/gpu" not in shown
    assert shown.index("grad") == line(RECORD).index("grad"), "columns stay where they are"


def test_a_skipped_step_stands_out() -> None:
    shown = line(replace(RECORD, loss=math.nan, grad_norm=math.inf, loss_z=None, skipped=True))
    assert re.search(r"loss +nan .*grad +inf .*SKIPPED$", shown)


@given(
    step=st.integers(1, 10**7), loss=st.floats(0, 1e12), z=st.one_of(st.none(), st.floats(-1e6, 1e6)),
    grad=st.floats(0, 1e30), lr=st.floats(0, 10), speed=st.floats(0, 1e13), mfu=st.floats(0, 1),
    memory=st.integers(0, 2**43), epochs=st.floats(0, 1e4), left=st.floats(0, 1e9), devices=st.sampled_from([1, 8192]),
)  # fmt: skip
def test_no_line_is_longer_than_the_width(
    step: int, loss: float, z: float | None, grad: float, lr: float, speed: float, mfu: float,
    memory: int, epochs: float, left: float, devices: int,
) -> None:  # fmt: skip
    record = replace(
        RECORD, step=step, loss=loss, loss_z=z, grad_norm=grad, lr=lr, tokens_per_second=speed,
        tokens_per_second_per_device=speed / devices, mfu=mfu, memory_bytes=memory, epochs=epochs,
    )  # fmt: skip
    shown = line(record, total=10**7, devices=devices, seconds_left=left)
    assert len(shown) <= WIDTH
    for word in ("loss", "grad", "lr", "tok/s"):
        assert word in shown


@given(loss=st.floats(0.001, 99), grad=st.floats(0, 999), speed=st.floats(1, 9e8), epochs=st.floats(0, 9))
def test_columns_stand_under_each_other(loss: float, grad: float, speed: float, epochs: float) -> None:
    record = replace(
        RECORD, loss=loss, grad_norm=grad, tokens_per_second=speed, tokens_per_second_per_device=speed / 8,
        epochs=epochs,
    )  # fmt: skip
    words = ("loss", "grad", "lr", "tok/s", "/gpu", "mfu", "data", "eta")
    assert [line(record).index(w) for w in words] == [line(RECORD).index(w) for w in words]


def test_numbers_for_people() -> None:
    numbers = (7, 987.4, 12_345, 123_456, 999_999, 1.234e6, 2e12)
    assert [short(x) for x in numbers] == ["7", "987", "12.3k", "123k", "1.00M", "1.23M", "2.00T"]
    spans = (0.4, 59.6, 187, 7500, 200_000, math.inf)
    assert [duration(x) for x in spans] == ["0s", "1m00s", "3m07s", "2h05m", "2d07h", "?"]


def run(console: Console, steps: int) -> None:
    for step in range(1, steps + 1):
        console.step(replace(RECORD, step=step, tokens=1000 * step, tokens_per_second=500.0))
    console.evaluation(EvalRecord(steps, 3.0, math.exp(3.0), 1.1, 100, 0.0))
    console.saved(Path("runs/a/checkpoints/step_00000007"), 1.52, 0.021)
    console.close()


def test_a_log_gets_plain_lines() -> None:
    out = io.StringIO()
    console = Console(
        total_steps=7, tokens_total=9000, devices=1, device=torch.device("cpu"), every_steps=3, stream=out
    )
    run(console, 7)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    shown = text.splitlines()
    assert [row.split("/")[0] for row in shown[:5]] == ["1", "3", "6", "7", "7"]
    assert shown[0].endswith("eta 16s"), "8000 tokens left at 500 a second"
    assert shown[4] == "7/7  held out  loss 3.0000  perplexity 20.09  bits per byte 1.1000"
    assert shown[5] == "saved runs/a/checkpoints/step_00000007 in 1.5 s; training waited 0.02 s"


def test_rich_is_not_imported_without_a_terminal() -> None:
    program = (
        "import sys, torch; from bigtrain.console import Console\n"
        "Console(total_steps=7, tokens_total=1, devices=1, device=torch.device('cpu')).say('x')\n"
        "assert 'rich' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr


def test_a_terminal_gets_a_live_line_and_keeps_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    leader, follower = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:  # a terminal holds a few KB: unread, it would stop the writer
        with contextlib.suppress(OSError):  # Linux reports the closed other end as EIO
            while part := os.read(leader, 65536):
                shown.append(part)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(follower, "w") as stream:
        device = torch.device("cpu")
        run(Console(total_steps=40, tokens_total=40_000, devices=1, device=device, stream=stream), 40)
    watcher.join(timeout=10)
    os.close(leader)
    text = b"".join(shown).decode()
    assert "\x1b[" in text, "a terminal is drawn on"
    assert "━" in text or "╸" in text, "a bar"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "held out  loss 3.0000" in plain
    assert "40/40" in plain
    assert "\x1b[?25h" in text.rpartition("\x1b[?25l")[2], "the cursor is back"


def test_start_up_is_timed_from_the_birth_of_the_process() -> None:
    program = (
        "import time; from bigtrain.console import Startup\n"
        "s = Startup(); s.done('imports'); time.sleep(0.3); s.done('data'); print(s.line())\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    whole = time.monotonic() - began
    found = re.fullmatch(r"start-up (\S+) s: imports (\S+), data (\S+)\n", done.stdout)
    assert found is not None, done.stdout
    total, imports, data = map(float, found.groups())
    assert 0.2 < data < 0.6
    assert 0 <= imports <= whole
    assert total == pytest.approx(imports + data, abs=0.11)


def test_the_first_step_tells_the_start_up() -> None:
    out = io.StringIO()
    startup = Startup()
    startup.done("imports")
    console = Console(
        total_steps=2, tokens_total=1, devices=1, device=torch.device("cpu"), startup=startup, stream=out
    )
    run(console, 2)
    assert out.getvalue().count("start-up") == 1
    assert re.match(r"start-up .* imports \S+, first step ", out.getvalue())


def test_the_summary_fits_a_screen_and_says_what_changed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000100").mkdir(parents=True)
    with (tmp_path / "metrics.jsonl").open("w") as f:
        for step in range(1, 101):
            f.write(to_json(replace(RECORD, step=step, loss=9.0 - 0.06 * step, tokens=4096 * step)))
            if step in (50, 100):
                f.write(to_json(EvalRecord(step, 6.0, 400.0 / step, 200 / step, 100, 0.0)))
    (tmp_path / "outcome.json").write_text(
        json.dumps({"state": "preempted", "step": 100, "reason": "SIGTERM"})
    )
    shown = summary(tmp_path, "bigtrain train x")
    rows = shown.splitlines()
    assert len(rows) < 20
    assert rows[0] == "preempted (SIGTERM) at step 100: 409,600 tokens in 36s of training"
    assert "8.9400 -> 3.0000 nats a token" in shown
    assert "4.0000 -> 2.0000 bits per byte, perplexity 8.00 -> 4.00 (step 50 to 100)" in shown
    assert "MFU 41.2 %" in shown
    assert "step_00000100" in shown
    assert rows[-1] == "go on with      bigtrain train x"


def test_the_summary_of_a_run_that_never_began(tmp_path: Path) -> None:
    assert summary(tmp_path).startswith("not finished\neverything in")
