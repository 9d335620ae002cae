"""Cards and networks by name, and the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import UserError
from bigtrain.plan.hardware import cluster_of, find_gpu


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("h100", "h100-80gb"),
        ("H100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("a100", "a100-80gb"),
        ("mi300x", "mi300x"),
        ("GB200", "gb200"),
    ],
)
def test_a_card_by_the_names_that_people_and_drivers_use(said: str, name: str) -> None:
    assert find_gpu(said).name == name


def test_an_unknown_card_or_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"(?s)no GPU 'h1000'.*did you mean h100.*gb200.*--hardware"):
        find_gpu("h1000")
    with pytest.raises(UserError, match=r"(?s)no network 'token-ring'.*ndr400x8"):
        cluster_of("h100", 8, "token-ring")
    with pytest.raises(UserError, match="0 GPUs"):
        cluster_of("h100", 0)


def test_every_card_has_sane_numbers() -> None:
    for name in (
        "a100-40gb",
        "h100-80gb",
        "h200",
        "b200",
        "gb200",
        "mi300x",
        "l40s",
        "a10g",
        "rtx4090",
        "v100-32gb",
    ):
        gpu = find_gpu(name)
        assert 10 < gpu.memory_gib < 300
        assert 5e13 < gpu.flops("bf16") < 1e16, "v100 has fp16 only, and that is taken"
        assert gpu.flops("fp8") >= gpu.flops("bf16")
        assert gpu.flops("fp32") < gpu.flops("bf16")
    assert cluster_of("gb200", 72).nodes == 18
    assert cluster_of("h100", 9).nodes == 2


def test_the_users_own_file_adds_and_replaces(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        "[gpu.x1]\nmemory_gib = 50\npeak_tflops = {bf16 = 400}\nbandwidth_gb_s = 2000\nlink_gb_s = 100\nper_node = 4\n"
        "[network.wet-string]\ngb_s = 0.001\nlatency_us = 1e6\n"
    )
    cluster = cluster_of("X1", 8, "wet-string", own)
    assert (cluster.gpu.memory_gib, cluster.nodes, cluster.network.gb_s) == (50, 2, 0.001)
    assert find_gpu("h100", own).name == "h100-80gb"


def test_every_problem_of_the_users_file_is_named_at_once(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[gpu.x1]\nmemory_gib = -1\ncolour = 'red'\n[cpu.y]\n")
    with pytest.raises(UserError) as e:
        find_gpu("x1", own)
    text = str(e.value)
    for part in (
        "unknown section [cpu]",
        "needs per_node",
        "no place for colour",
        "memory_gib: -1",
        "own.toml",
    ):
        assert part in text
    own.write_text("[gpu")
    with pytest.raises(UserError, match="not TOML"):
        find_gpu("x2", own)
    with pytest.raises(UserError, match="cannot be read"):
        find_gpu("x3", tmp_path / "none.toml")
