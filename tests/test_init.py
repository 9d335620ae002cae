"""Initial weights: functions of (seed, name, index) alone, and good normal numbers."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import ModelConfig
from bigtrain.logical import Logical, boxes_of_flat_range
from bigtrain.model.build import build_model
from bigtrain.model.init import fill_box, initialise


def whole(shape: tuple[int, ...], name: str = "w", seed: int = 1, std: float = 1.0) -> torch.Tensor:
    tensor = torch.empty(shape)
    fill_box(tensor, name, shape, (0,) * len(shape), seed, std)
    return tensor


def test_moments_are_normal() -> None:
    """4 million values: each moment within 5 standard errors of the normal's, and the tails are there."""
    x = whole((2000, 2000)).double()
    n = x.numel()
    assert abs(x.mean().item()) < 5 / n**0.5
    assert abs(x.var().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean().item()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    for z in (1.0, 2.0, 3.0, 4.0):
        share = torch.special.erfc(torch.tensor(z / 2**0.5)).item()
        assert abs((x.abs() > z).double().mean().item() - share) < 5 * (share / n) ** 0.5
    assert 4.6 < x.abs().max() < 6.2


def test_neighbours_names_and_seeds_are_uncorrelated() -> None:
    shape = (1000, 1000)
    x = whole(shape).double()
    limit = 5 / (999 * 1000) ** 0.5
    for lag in (1, 2, 16, 256):
        assert abs((x[:, lag:] * x[:, :-lag]).mean().item()) < limit * 1.2
        assert abs((x[lag:] * x[:-lag]).mean().item()) < limit * 1.2
    assert abs((x[1:, 1:] * x[:-1, :-1]).mean().item()) < limit
    for other in (whole(shape, "w2"), whole(shape, "layers.1.w"), whole(shape, seed=2), whole(shape, seed=0)):
        assert abs((x * other.double()).mean().item()) < limit
        assert abs((x.square() * other.double().square()).mean().item() - 1) < 5 * (8 / 1e6) ** 0.5


def test_spectrum_is_that_of_a_random_matrix() -> None:
    """The largest singular value of an n x n normal matrix is about 2 sqrt(n): no hidden rows or columns."""
    n = 800
    singular = torch.linalg.svdvals(whole((n, n)))
    assert abs(singular[0].item() / (2 * n**0.5) - 1) < 0.03


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_box_equals_the_slice_of_the_whole(data: st.DataObject) -> None:
    """Bit for bit, for 1 to 3 dimensions, also when rows are longer than a chunk."""
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    if data.draw(st.booleans()):
        shape = (*shape[:-1], shape[-1] + 70_000) if len(shape) < 3 else shape
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    box = torch.empty(sizes)
    fill_box(box, "w", shape, offset, 1, 0.02)
    part = whole(shape, std=0.02)
    for dim, (o, size) in enumerate(zip(offset, sizes, strict=True)):
        part = part.narrow(dim, o, size)
    assert torch.equal(box, part)


def test_flat_ranges_tile_the_whole() -> None:
    """A ZeRO partition, filled box by box, is the same range of the whole tensor."""
    shape = (37, 29)
    flat = torch.empty(37 * 29)
    for start in range(0, len(flat), 100):
        for box in boxes_of_flat_range(shape, start, min(100, len(flat) - start)):
            size = torch.Size(box.sizes).numel()
            fill_box(flat[box.start : box.start + size].view(box.sizes), "w", shape, box.offset, 1, 1.0)
    assert torch.equal(flat.view(shape), whole(shape))


def test_dtype_and_strides_do_not_matter() -> None:
    x = whole((50, 60))
    half = torch.empty(50, 60, dtype=torch.bfloat16)
    fill_box(half, "w", (50, 60), (0, 0), 1, 1.0)
    assert torch.equal(half, x.bfloat16())
    strided = torch.empty(60, 50).t()
    fill_box(strided, "w", (50, 60), (0, 0), 1, 1.0)
    assert torch.equal(strided, x)


def test_values_never_change() -> None:
    """A fingerprint: old checkpoints' runs can be started again by a newer version."""
    x = whole((2, 3), "layers.0.mlp.up_proj.weight", seed=1, std=0.02)
    assert x.flatten().tolist() == pytest.approx(FINGERPRINT, rel=1e-6)


FINGERPRINT = [0.028716868, 0.0054087169, -0.033032201, -0.0057315086, -0.043597221, 0.0085364468]


def test_rules() -> None:
    config = ModelConfig(vocab_size=500, layers=8, width=64, heads=4, bias=True, norm="layernorm",
                         position="learned", activation="gelu", init_std=0.1)  # fmt: skip
    model = build_model(config, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.1 / 4 if ("o_proj" in name or "down_proj" in name) else 0.1
            assert abs(parameter.std().item() / expected - 1) < 0.05


def test_a_part_of_a_model_starts_as_that_part_of_the_whole() -> None:
    """Tensor parallelism in miniature: a model with half the ffn, its records pointing into the whole one."""
    config = ModelConfig(vocab_size=50, layers=1, width=32, heads=4, ffn_width=64)
    full = dict(build_model(config, seed=9).named_parameters())
    half = build_model(config.model_copy(update={"ffn_width": 32}), device="meta").to_empty(device="cpu")
    for name, parameter in half.named_parameters():
        shape = tuple(full[name].shape)
        offset = tuple(a - b for a, b in zip(shape, parameter.shape, strict=True))  # the second half
        parameter.logical = Logical(name, shape, offset, tuple(parameter.shape))
    initialise(half, config, seed=9)
    for name, parameter in half.named_parameters():
        index = tuple(slice(o, None) for o in parameter.logical.offset)
        assert torch.equal(parameter, full[name][index])


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_model(ModelConfig(vocab_size=50, layers=1, width=32, heads=4), seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_speed() -> None:
    """At least 10 M values/s on one thread, even on a busy machine (80 M/s on an idle EPYC core)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tensor = torch.empty(1000, 2000)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            fill_box(tensor, "w", tensor.shape, (0, 0), 1, 1.0)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert tensor.numel() / best > 10e6
