"""The doctor finds planted faults, and says of sound machines that they are sound."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from bigtrain import machine_checks
from bigtrain.configfile import find_config, load
from bigtrain.doctor import lines, merged
from bigtrain.machine_checks import Finding, Subject, checkpoint_bytes, examine
from bigtrain.network_checks import Measured, clock_finding, rows, uneven
from bigtrain.place import Place
from bigtrain.plan.quantities import gibibytes
from tests.runs.worlds import run_world

ALONE = Place(0, 1, 0, 1, "single")
EIGHT = Place(0, 16, 0, 8, "torchrun")


def bad(found: Iterable[Finding]) -> dict[str, Finding]:
    """By name, those that are bad."""
    return {finding.name: finding for finding in found if finding.level == "bad"}


# ---- one machine


def test_a_check_that_fails_hides_no_other() -> None:
    def broken_check(subject: Subject) -> Iterator[Finding]:
        raise OSError("no such thing")
        yield

    def sound(subject: Subject) -> Iterator[Finding]:
        yield Finding("ok", "b", "fine")

    found = examine([broken_check, sound], Subject(ALONE))
    assert found == [
        Finding("note", "broken check", "could not be checked: OSError: no such thing"),
        Finding("ok", "b", "fine"),
    ]


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        found = bad(machine_checks.limits(Subject(EIGHT)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found["open files"].text == f"512 at most (hard limit {hard}), 1088 may be needed"
    assert "ulimit -n 65536" in found["open files"].do


def test_a_container_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = machine_checks.shutil._ntuple_diskusage(2**26, 0, 2**26)  # type: ignore[attr-defined]
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: usage)
    assert "0.06 GiB free, for 8 ranks" in bad(machine_checks.limits(Subject(EIGHT)))["/dev/shm"].text
    assert "/dev/shm" not in bad(machine_checks.limits(Subject(ALONE)))


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("NCCL_P2P_DISABLE", "1", True),
        ("NCCL_P2P_DISABLE", "0", False),
        ("NCCL_DEBUG", "TRACE", True),
        ("NCCL_DEBUG", "WARN", False),
        ("NCCL_SOCKET_IFNAME", "lo", True),
        ("NCCL_SOCKET_IFNAME", "eth0", False),
        ("BIGTRAIN_HANG_SECONDS", "0", True),
        ("OMP_NUM_THREADS", "4096", True),
        ("OMP_NUM_THREADS", "1", False),
    ],
)
def test_variables_that_hurt(name: str, value: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (*machine_checks._HARMFUL, "OMP_NUM_THREADS"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    found = list(machine_checks.environment(Subject(EIGHT)))
    assert [f.level for f in found] == ["bad" if wrong else "ok"]
    if wrong:
        assert found[0].text.startswith(f"{name}={value}")


SMI = """\
0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 41, 1980, 1980, 0, Not Active, Not Active
1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 70000, 42, 1980, 1980, 3, Not Active, Not Active
2, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 91, 990, 1980, 0, Active, Active
3, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 50, 345, 1980, [N/A], Active, Not Active
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an nvidia-smi on the path."""

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_sick_gpus(smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    smi(f"cat <<'EOF'\n{SMI}EOF")
    found = list(machine_checks.gpus(Subject(ALONE)))
    assert found[0].text.startswith("4 x NVIDIA H100 80GB HBM3 81559 MiB, driver 550.54.15")
    told = [(f.name, f.text) for f in found if f.level == "bad"]
    assert told == [
        ("GPU 1", "3 uncorrected memory errors"),
        ("GPU 1", "70000 of 81559 MiB are in use"),
        ("GPU 2", "91 C, slowed down by heat"),
        ("GPU 3", "slowed down by the hardware: 345 of 1980 MHz"),
    ]


def test_a_broken_driver(smi: Callable[[str], None]) -> None:
    smi("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18")
    found = bad(machine_checks.gpus(Subject(ALONE)))["GPUs"]
    assert found.text == "nvidia-smi failed: Failed to initialize NVML: Driver/library version mismatch"


@pytest.mark.skipif(sys.platform != "linux", reason="hides the GPUs of a Linux torch")
def test_gpus_that_torch_cannot_use(smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    smi(f"cat <<'EOF'\n{SMI}EOF")
    assert "torch can use none" in bad(machine_checks.gpus(Subject(ALONE)))["GPUs"].text


# ---- disks


def test_a_disk_is_timed_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "PROBE_MIB", 4)
    (found,) = machine_checks.timed("run folder", tmp_path)
    assert re.search(r"writes [\d,]+ MB/s, reads [\d,]+ MB/s \(4 MiB\)", found.text)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine_checks, "SLOW_DISK_MB_S", 1e9)
    (slow,) = machine_checks.timed("run folder", tmp_path)
    assert slow.level == "bad"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    config = load(find_config("quickstart"), [])
    found = bad(machine_checks.disks(Subject(ALONE, config, tiny_disk / "runs" / "mine")))
    assert found["run folder"].text == f"{tiny_disk}: cannot be written: No space left on device"
    assert list(tiny_disk.iterdir()) == []
    kept = config.checkpoint.keep_last
    needed = gibibytes((kept + 1) * checkpoint_bytes(config))
    assert found["free space"].text.endswith(f"; {kept} + 1 checkpoints take {needed}")


def test_no_data(tmp_path: Path) -> None:
    config = load(find_config("quickstart"), [f"data.path={tmp_path / 'nothing'}"])
    assert "no dataset is there" in bad(machine_checks.disks(Subject(ALONE, config)))["data"].text


def test_the_size_of_a_checkpoint_is_that_of_a_real_one() -> None:
    config = load(find_config("quickstart"), [])
    from bigtrain.model.build import build_model

    count = sum(p.numel() for p in build_model(config.model, device="meta").parameters())
    assert checkpoint_bytes(config) == 12 * count


# ---- several machines


def test_what_differs_between_machines() -> None:
    hosts = {
        f"h{i}": [
            Finding("ok", "torch", "2.13.0" if i else "2.12.0"),
            Finding("ok", "memory", f"{i} GiB free"),
            Finding("ok", "python", "3.11.7"),
            *([Finding("bad", "open files", "512", "ulimit")] if i in (1, 2) else []),
        ]
        for i in range(4)
    }
    found = merged(hosts)
    assert [(f.level, f.name, f.text) for f in found] == [
        ("bad", "torch", "2.12.0 (on h0)"),
        ("bad", "torch", "2.13.0 (on h1, h2, h3)"),
        ("ok", "memory", "0 GiB free (on h0, one of 4)"),
        ("ok", "python", "3.11.7"),
        ("bad", "open files", "512 (on h1, h2)"),
    ]


def test_a_slow_group_among_many() -> None:
    groups = [((2 * g, 2 * g + 1), [1e-5, 0.1 if g != 3 else 0.25]) for g in range(5) for _ in range(2)]
    (found,) = uneven("data", "all-reduce", groups)
    assert found.text == "data: all-reduce of ranks 6-7 takes 2.5 x that of other groups"
    assert not list(uneven("data", "all-reduce", groups[:4])), "of two groups nobody knows which is right"


def test_a_wrong_clock() -> None:
    rounds = [[100.0 + i, 100.001 + i, 107.5 + i] for i in range(3)]
    found = clock_finding(rounds, ["a", "b", "c"])
    assert found.level == "bad"
    assert "the clock of c" in found.text
    assert "+7.499 s" in found.text
    assert clock_finding([[1.0, 1.01]], ["a", "b"]).level == "ok"


def test_eighty_columns() -> None:
    table = list(
        rows(
            [Measured("pipeline", 16384, "send to next", (1e-1, 1e-1, 9.9, 9.9), (1024, 65536, 2**20, 2**26))]
        )
    )
    long = Finding("bad", "environment", "word " * 60, "do " * 60)
    text = list(lines([long, *[Finding("bad", "GPU", str(i), "x") for i in range(20)]], table))
    assert max(len(line) for line in text) <= 80
    assert text[-1] == "21 problems: see BAD above"
    assert any("GPU             ... and 12 more" in line for line in text)


# ---- the verb


@pytest.mark.runs
def test_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigtrain", "doctor", "quickstart", "--run-dir", str(tmp_path / "run")]
    env = {**os.environ, "NCCL_DEBUG": "TRACE", "COLUMNS": "80"}
    done = subprocess.run(
        [*command, "--set", f"data.path={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
    )
    assert done.returncode == 1, done.stderr
    assert "BAD  environment     NCCL_DEBUG=TRACE" in done.stdout
    assert "BAD  data" in done.stdout
    assert re.search(r"ok   run folder .*writes", done.stdout.replace("\n" + " " * 21, " "))
    assert not (tmp_path / "run").exists(), "it looks, and leaves nothing"


@pytest.mark.runs
def test_two_ranks_along_an_axis(tmp_path: Path) -> None:
    arguments = ["-m", "bigtrain", "doctor", "quickstart", "--run-dir", str(tmp_path)]
    arguments += ["--set", "layout.pipeline=2", "--set", f"data.path={tmp_path}"]
    first, second = run_world(arguments, 2, check=False, grace=20)
    assert (first.code, second.code) == (1, 1), "the data are missing, on which all agree"
    assert second.stdout == ""
    assert "2 ranks (gloo) on 1 machine, layout: pipeline 2" in first.stdout
    assert re.search(
        r"pipeline +2  send to next +[\d,]+ us +[\d,]+ us +[\d.e+-]+ GB/s +[\d.e+-]+ GB/s", first.stdout
    )


@pytest.mark.runs
def test_a_layout_that_cannot_be_is_told_with_the_rest(tmp_path: Path) -> None:
    arguments = [
        "-m",
        "bigtrain",
        "doctor",
        "quickstart",
        "--run-dir",
        str(tmp_path),
        "--set",
        "layout.context=4",
    ]
    first, _ = run_world(arguments, 2, check=False, grace=20)
    assert first.code == 1, first.stderr
    assert "BAD  layout" in first.stdout
    assert re.search(r"data +2  all-reduce", first.stdout), "the ranks are measured all the same"
