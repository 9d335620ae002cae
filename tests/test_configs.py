"""Every shipped config loads, fits together, and has exactly the parameters that it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config import Config
from bigtrain.configfile import load, render, shipped
from bigtrain.model.build import build_model
from bigtrain.plan.flops import flops_per_token, parameters

FOLDER = shipped("configs")
assert FOLDER is not None
FILES = sorted(FOLDER.glob("*.toml"))

PARAMETERS = {
    # As published on the Hugging Face Hub for the same shapes.
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    # By hand: 30522 x 768 + 512 x 768 + 12 x 7,087,872 + 2 x 768.
    "bert-base": 108_890_112,
    # By hand: 32000 x 1024 + 24 x (4 x 1024^2 + 3 x 1024 x 2816 + 2 x 1024) + 1024.
    "llama-340m": 341_099_520,
    # By hand: 2048 x 96 + 4 x (2 x 96^2 + 2 x 96 x 48 + 3 x 96 x 256 + 2 x 96) + 96.
    "quickstart": 602_976,
    # By hand: 2 x 2048 x 256 + 2048 + 2 x (8 x 256^2 + 8 x 256).
    "lstm": 2_103_296,
}


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def test_the_ladder_is_there() -> None:
    assert set(PARAMETERS) == {p.stem for p in FILES}


def test_loads_and_is_named_like_its_file(path: Path) -> None:
    config = load(path)
    assert isinstance(config, Config)
    assert config.name == path.stem


def test_parameter_count(path: Path) -> None:
    """The claim, the formula and the model built on the meta device are the same integer."""
    config = load(path)
    built = sum(p.numel() for p in build_model(config.model, device="meta").parameters())
    assert parameters(config.model) == built
    assert built == PARAMETERS[path.stem]
    assert f"{built:,}" in path.read_text(), f"{path.name} should state its {built:,} parameters"


def test_flops_equal_torchs_counter(path: Path) -> None:
    """Forward and backward of the model itself, on the meta device: the same integer, for every shipped config."""
    config = load(path)
    if config.model.kind == "lstm":
        pytest.skip("torch counts no products in its LSTM; tests/test_flops.py does by hand")
    model = build_model(config.model, device="meta", kernels="reference")
    B, S = 2, 64
    tokens = torch.zeros(B, S, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        objective = model(tokens, targets=tokens).objective
    flops = flops_per_token(config.model, S)
    assert counter.get_total_flops() == flops.forward * B * S
    with counter:
        objective.backward()
    assert counter.get_total_flops() == 2 * flops.forward * B * S
    assert flops.training == 3 * flops.forward


def test_resolved_config_reads_back(path: Path, tmp_path: Path) -> None:
    config = load(path)
    resolved = tmp_path / "config.toml"
    resolved.write_text(render(config))
    assert load(resolved) == config


def test_every_section_says_where_its_numbers_come_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("["):
            assert lines[number - 1].startswith("# "), f"{path.name}: {line} has no comment above it"
    assert lines[0].startswith("# ")


def test_budget_is_sensible(path: Path) -> None:
    """Between 1 and 200 tokens a parameter, and a training cost that can be named."""
    config = load(path)
    if config.train.tokens is None:
        pytest.skip("a lesson, by steps")
    count = parameters(config.model)
    assert 1 <= config.train.tokens / count <= 200
    flops = flops_per_token(config.model, config.data.sequence_length)
    assert 4 * count < flops.training < 14 * count
