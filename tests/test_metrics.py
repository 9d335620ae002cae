"""Records and where they go: complete, valid JSON, cut back on resume, never in the way of training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigtrain.budget import Progress
from bigtrain.config import LogConfig
from bigtrain.engine.protocol import StepResult
from bigtrain.errors import UserError
from bigtrain.heldout import HeldOut
from bigtrain.metrics import (
    EvalRecord,
    Meter,
    Record,
    StepRecord,
    cut_back,
    peak_flops,
    read_records,
    recent_losses,
    to_json,
)
from bigtrain.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, check_sinks, open_sinks

CPU = torch.device("cpu")


def meter(*, peak: float | None = None) -> Meter:
    return Meter(devices=2, tokens=0, tokens_per_epoch=8000, flops_per_token=6e6, peak_flops=peak, device=CPU)


def result(loss: float, skipped: bool = False) -> StepResult:
    return StepResult(loss=loss, grad_norm=1.5, skipped=skipped, loss_scale=1.0)


def steps(count: int) -> list[StepRecord]:
    m = meter()
    return [m.step(Progress(s, 4 * s, 400 * s), result(5.0 / s), 1e-3, 0.5) for s in range(1, count + 1)]


def test_a_record_counts_tokens_and_speed() -> None:
    m = meter(peak=1e12)
    m.tokens = 400  # resumed after a step
    record = m.step(Progress(step=2, samples=8, tokens=800), result(3.0), lr=1e-3, seconds=0.5)
    assert record.tokens_per_second == pytest.approx(800)
    assert record.tokens_per_second_per_device == pytest.approx(400)
    assert record.epochs == pytest.approx(0.1)
    assert record.mfu == pytest.approx(400 * 6e6 / 1e12)
    assert meter().step(Progress(1, 4, 400), result(3.0), 1e-3, 0.5).mfu is None, "no peak, no MFU"
    assert 10e6 < record.memory_bytes < 100e9


def test_loss_z_compares_with_the_window_before() -> None:
    m = meter()
    losses = [2.0 + 0.1 * (-1) ** s for s in range(20)]
    records = [m.step(Progress(s, s, s), result(loss), 1e-3, 1.0) for s, loss in enumerate(losses)]
    assert [r.loss_z for r in records[:16]] == [None] * 16, "too few to compare with"
    assert records[16].loss_z == pytest.approx(1.0)
    assert m.step(Progress(20, 1, 1), result(3.0), 1e-3, 1.0).loss_z == pytest.approx(10.0, rel=0.1)
    broken = m.step(Progress(21, 1, 1), result(math.nan, skipped=True), 1e-3, 1.0)
    assert broken.loss_z is None
    assert all(math.isfinite(loss) for loss in m.recent), "one NaN must not blind the window"


def test_json_is_strict_even_when_the_loss_is_not_finite() -> None:
    record = meter().step(Progress(1, 1, 1), result(math.nan, skipped=True), 1e-3, 1.0)
    line = to_json(replace(record, grad_norm=math.inf))
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["kind"] == "step"
    assert (read["loss"], read["grad_norm"], read["skipped"]) == (None, None, True)
    assert line.endswith("}\n")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA A10G", None), ("NVIDIA A10", 125), ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 5090", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_are_known_or_admitted_unknown(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Six steps and an evaluation after the third."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for record in steps(6):
        sink.write(record)
        if record.step == 3:
            sink.write(EvalRecord(3, 2.0, math.exp(2.0), 0.9, 100, time.time()))
    sink.close()
    return path


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3, 3]), (6, None), (99, None)])
def test_cut_back_to_the_resumed_step(written: Path, step: int, kept: list[int] | None) -> None:
    before = written.read_bytes()
    count = cut_back(written, step)
    assert count == len(list(read_records(written)))
    if kept is None:
        assert written.read_bytes() == before
    else:
        assert [r["step"] for r in read_records(written)] == kept
        assert before.startswith(written.read_bytes()), "what is kept is not rewritten"


def test_a_torn_line_is_cut_and_never_read(written: Path) -> None:
    whole = written.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) - len(lines[-1]), len(whole), 3):  # a kill tears the last line anywhere
        written.write_bytes(whole[:size])
        assert [r["step"] for r in read_records(written)] == [1, 2, 3, 3, 4, 5]
        assert cut_back(written, 100) == 6
        assert written.read_bytes() == b"".join(lines[:-1])
        sink = JsonlSink(written)
        sink.write(steps(6)[-1])
        sink.close()
        assert [r["step"] for r in read_records(written)] == [1, 2, 3, 3, 4, 5, 6]


def test_cut_back_without_a_file(tmp_path: Path) -> None:
    assert cut_back(tmp_path / "none.jsonl", 5) == 0
    assert list(read_records(tmp_path / "none.jsonl")) == []


def test_the_window_goes_on_after_a_resume(written: Path) -> None:
    assert list(recent_losses(read_records(written))) == pytest.approx([5 / s for s in range(1, 7)])


def test_a_killed_process_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal; from pathlib import Path\n"
        "from tests.test_metrics import JsonlSink, steps\n"
        f"sink = JsonlSink(Path({str(path)!r}))\n"
        "for r in steps(50): sink.write(r)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False)
    assert [r["step"] for r in read_records(path)] == list(range(1, 51))


class Broken:
    """A sink whose server is gone."""

    def __init__(self) -> None:
        self.asked = 0

    def write(self, record: Record) -> None:
        self.asked += 1
        raise ConnectionError("no route to host")

    flush = close = lambda self: None


def test_a_failing_sink_is_left_out_with_one_warning(tmp_path: Path) -> None:
    said: list[str] = []
    broken = Broken()
    file = JsonlSink(tmp_path / "metrics.jsonl")
    parts: list[Sink] = [broken, file]
    sinks = Sinks(parts, said.append)
    for record in steps(5):
        sinks.write(record)
    sinks.close()
    assert broken.asked == 1
    assert said == ["Broken failed and is left out from now on: ConnectionError: no route to host"]
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_metrics_of_others() -> None:
    said: list[str] = []
    sinks = Sinks([JsonlSink(Path("/dev/full"), said.append)], said.append)
    for record in steps(3):
        sinks.write(record)
    assert len(said) == 1
    assert "No space left" in said[0]
    assert "wait in memory" in said[0]
    sinks.close()
    assert "failed" in said[1], "lines that were never written are not passed over"


def test_lines_that_a_full_disk_does_not_take_come_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import resource, signal; from pathlib import Path\n"
        "from tests.test_metrics import JsonlSink, steps\n"
        f"sink = JsonlSink(Path({str(path)!r}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "every = steps(50)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"  # tears a line
        "for r in every[:49]: sink.write(r)\n"
        "sink.flush()\n"
        f"assert Path({str(path)!r}).stat().st_size == 1000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "sink.write(every[49])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_records(path)] == list(range(1, 51))


def events(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            yield name, event.step, event.value


def test_tensorboard_gets_every_number_and_hides_what_is_made_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, 0)
    for record in steps(5):
        first.write(record)
    first.close()
    time.sleep(1.1)  # event files are named by the second
    again = TensorBoardSink(tmp_path, 3)  # resumed from a checkpoint of step 3
    for record in steps(6)[3:]:
        again.write(replace(record, loss=record.loss + 1))
    again.write(EvalRecord(6, 2.0, 7.4, 0.9, 100, time.time()))
    again.close()
    found = list(events(tmp_path))
    losses = {step: value for name, step, value in found if name == "train/loss"}
    assert losses == pytest.approx({1: 5, 2: 2.5, 3: 5 / 3, 4: 2.25, 5: 2.0, 6: 5 / 6 + 1})
    assert [step for name, step, _ in found if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert ("eval/bits_per_byte", 6) in {(name, step) for name, step, _ in found}


def test_tensorboard_is_imported_after_the_first_step(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from bigtrain.sinks import TensorBoardSink\n"
        f"sink = TensorBoardSink(Path({str(tmp_path)!r}), 0)\n"
        "assert 'tensorboard' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "from tests.test_metrics import steps, time\n"
        "began = time.monotonic(); sink.write(steps(1)[0]); print(time.monotonic() - began)\n"
        "sink.close(); assert 'tensorboard' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2, "a record is queued, not written"


def test_tensorboard_that_cannot_write_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    said: list[str] = []
    sinks = Sinks([TensorBoardSink(tmp_path / "taken", 0)], said.append)
    for record in steps(3):
        sinks.write(record)
        time.sleep(0.01)
    sinks.close()
    assert len(said) == 1
    assert "TensorBoardSink failed" in said[0]


def test_wandb_without_its_package_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"bigtrain\[wandb\]"):
            check_sinks(LogConfig(tensorboard=False, wandb="p"))
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
        sinks = open_sinks(LogConfig(tensorboard=False, wandb="p"), tmp_path, "n", step=0, warn=pytest.fail)
        for record in steps(3):
            sinks.write(record)
        sinks.close()
        assert (tmp_path / "wandb_id").read_text()


def test_a_wandb_that_cannot_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    said: list[str] = []
    sinks = open_sinks(LogConfig(tensorboard=False, wandb="p"), tmp_path, "n", step=0, warn=said.append)
    sinks.write(next(iter(steps(1))))
    sinks.close()
    assert len(said) == 1
    assert "no network" in said[0]


def test_evaluations_are_records_too() -> None:
    record = meter().evaluation(Progress(7, 1, 1), HeldOut(2.0, math.exp(2.0), 0.9, 100, 300))
    assert json.loads(to_json(record)).items() >= {"kind": "eval", "step": 7, "bits_per_byte": 0.9}.items()
