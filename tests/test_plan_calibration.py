"""What measured runs correct: jobs of their shapes, others on their GPU, the search; and the file they are in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError
from bigtrain.plan.calibration import NEUTRAL, Calibration, Correction, Finding, Shape, read, save
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import Job, job_of
from bigtrain.plan.search import search

CONFIG = load(find_config("llama-8b"))
JOB, GPU = job_of(CONFIG, 64), cluster_of("h100", 64).gpu.name


def finding(job: Job, factor: float, *, gpu: str = GPU, offset: float = 0.0) -> Finding:
    return Finding('a "run"\nhere', gpu, Shape.of(job), factor, offset)


def test_runs_of_the_same_shapes_decide_then_those_of_the_gpu() -> None:
    wider = replace(JOB, tensor=8, microbatch=4)
    other = replace(JOB, software="Megatron-LM")
    known = Calibration(
        (
            finding(JOB, 1.1),
            finding(JOB, 1.3),
            finding(replace(JOB, data=2, zero=0, pipeline=4), 1.2),
            finding(wider, 2.0),
            finding(JOB, 5.0, gpu="a100-80gb"),
        )
    )
    assert known.correction(JOB, GPU) == (pytest.approx(1.2), 3, True), "depth and ranks do not matter"
    assert known.correction(wider, GPU) == (pytest.approx(2.0), 1, True)
    unmeasured = replace(JOB, microbatch=16)
    assert known.correction(unmeasured, GPU) == (pytest.approx((1.2 * 1.3) ** 0.5), 4, False)
    assert known.correction(other, GPU) == Correction(1.0, 0, False), "another framework says nothing"
    assert known.correction(JOB, "b200") == Correction(1.0, 0, False)
    assert NEUTRAL.correction(JOB, GPU) == Correction(1.0, 0, False)


@pytest.mark.parametrize(
    "change",
    [
        {"microbatch": 8},
        {"tensor": 8},
        {"context": 2},
        {"sequence_length": 1024},
        {"recompute": "none"},
        {"precision": "fp16"},
        {"kernels": not JOB.kernels},
        {"model": CONFIG.model.model_copy(update={"ffn_width": 1024})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_kernels_work_is_another_shape(change: dict[str, object]) -> None:
    assert Shape.of(replace(JOB, **change)) != Shape.of(JOB)  # type: ignore[arg-type]


def test_offsets_are_of_the_gpu() -> None:
    known = Calibration((finding(JOB, 1, offset=3e9), finding(JOB, 1, offset=5e9, gpu="b200")))
    assert [known.memory_offset(gpu) for gpu in (GPU, "b200", "h200")] == [3e9, 5e9, 0.0]


def test_the_search_goes_by_what_was_measured() -> None:
    cluster = cluster_of("h100", 64)
    best = search(CONFIG, cluster).best[0]
    slow = search(CONFIG, cluster, calibration=Calibration((finding(best.job, 3.0), finding(JOB, 1.0))))
    assert Shape.of(slow.best[0].job) != Shape.of(best.job), "its shapes take three times as long"
    everywhere = search(CONFIG, cluster, calibration=Calibration((finding(best.job, 3.0),)))
    assert everywhere.best[0].job == best.job, "one run says the same of all"
    assert everywhere.best[0].time.total == pytest.approx(3 * best.time.total)
    assert everywhere.best[0].time.mfu == pytest.approx(best.time.mfu / 3)


def test_recomputing_more_may_be_measured_to_be_faster() -> None:
    cluster = cluster_of("h100", 64)
    slow = search(CONFIG, cluster).best[0].job
    assert slow.recompute == "none"
    again = replace(slow, recompute="full")
    known = Calibration(
        (finding(slow, 3.0), finding(again, 0.5), *(finding(replace(JOB, tensor=8), 3.0),) * 9)
    )
    assert Shape.of(search(CONFIG, cluster, calibration=known).best[0].job) == Shape.of(again)


def test_the_search_knows_what_memory_was_missing() -> None:
    cluster = cluster_of("h100", 64)
    best = search(CONFIG, cluster).best[0]
    most = cluster.gpu.memory_gib * 2**30
    missing = most - best.bytes + 2**30
    found = search(CONFIG, cluster, calibration=Calibration((finding(best.job, 1.0, offset=missing),)))
    assert found.best
    assert all(layout.bytes <= most for layout in found.best)
    assert best.job not in [layout.job for layout in found.best]
    assert found.best[0].time.total > best.time.total


def test_reads_back_and_refuses_others(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    mine = Calibration((finding(JOB, 1.25, offset=-3e9), finding(replace(JOB, tensor=2), 0.5)))
    save(mine, file)
    assert read(file) == mine
    good = file.read_text()
    for old, new in [
        ("time_factor = 1.25", "time_factor = 0.0"),
        ("time_factor = 1.25", 'time_factor = "a"'),
        ("memory_offset = -3000000000.0", "memory_offset = nan"),
        ("tensor = 2", 'tensor = "2"'),
        ("tensor = 2", "tensor = true"),
        ("tensor = 2", ""),
        ("[[run]]", "[run"),
        (good, "x = 1"),
    ]:
        assert old in good
        file.write_text(good.replace(old, new, 1))
        with pytest.raises(UserError, match="calib"):
            read(file)
    with pytest.raises(UserError, match="cannot write"):
        save(mine, tmp_path / "no" / "such" / "folder.toml")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "none.toml")
