"""The choice of an engine, and the reference engine against bare PyTorch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bigtrain.config import Config
from bigtrain.engine import engine_name, make_engine
from bigtrain.engine.reference import ReferenceEngine
from bigtrain.engine.scaler import LossScaler
from bigtrain.errors import RunError, UserError
from bigtrain.grid import grid_of
from bigtrain.mesh import Mesh
from bigtrain.optim import build_optimizer
from bigtrain.place import Place
from tests.runs.engine_parts import (
    LSTM,
    assemble,
    fill,
    local_boxes,
    lr_of,
    make_config,
    make_model,
    microbatches,
    train,
)

ALONE = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)


def make(**config: Any) -> ReferenceEngine:
    made = make_config(**config)
    engine = make_engine(make_model(made), made, ALONE)
    assert isinstance(engine, ReferenceEngine)
    return engine


@pytest.mark.parametrize(
    ("layout", "world", "name"),
    [
        ({}, 1, "reference"),
        ({}, 2, "zero"),
        ({"offload": "optimizer"}, 1, "zero"),
        ({"engine": "zero"}, 1, "zero"),
        ({"engine": "reference"}, 1, "reference"),
    ],
)
def test_auto_is_the_reference_on_one_process(layout: dict[str, Any], world: int, name: str) -> None:
    assert engine_name(make_config(layout=layout), world) == name


@pytest.mark.parametrize(
    ("config", "world", "key", "advice"),
    [
        ({"layout": {"engine": "reference"}}, 2, "layout.engine", "auto"),
        ({"optim": {"kind": "muon"}, "layout": {"zero": 2}}, 2, "optim.kind", "layout.zero = 0"),
        ({"layout": {"zero": 0, "offload": "optimizer"}}, 2, "layout.offload", "layout.zero = 1"),
        ({"model": LSTM, "layout": {"zero": 3}}, 2, "layout.zero", "layout.zero = 2"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_does(
    config: dict[str, Any], world: int, key: str, advice: str
) -> None:
    made = make_config(**config)
    with pytest.raises(UserError) as caught:
        grid_of(made, world)
    assert key in str(caught.value)
    assert advice in str(caught.value)


def bare_loop(config: Config, steps: range) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The training loop that everybody writes."""
    model = make_model(config)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    losses, norms = [], []
    for step in steps:
        batches, counted = microbatches(step)
        total = 0.0
        for b in batches:
            out = model(b.tokens, cu_seqlens=b.cu_seqlens, targets=b.targets, sample_ids=b.sample_ids)
            (out.objective / counted).backward()
            total += out.nll.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / counted)
    return losses, norms, {f"master/{name}": p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_fp32_is_the_bare_loop(kind: str, clip: float) -> None:
    engine = make(optim={"kind": kind, "clip": clip})
    found = train(engine, range(6))
    losses, norms, weights = bare_loop(make_config(optim={"kind": kind, "clip": clip}), range(6))
    assert found["loss"] == pytest.approx(losses, rel=1e-6)
    assert found["norm"] == pytest.approx(norms, rel=1e-6)
    assert min(norms) > 0.5, "clipping is active where it is on"
    tensors = assemble(local_boxes(engine))
    for key, weight in weights.items():
        torch.testing.assert_close(tensors[key], weight, rtol=1e-4, atol=1e-6)


def test_a_tied_weight_is_counted_once() -> None:
    engine = make()
    names = [p.name for p in engine.pieces(owned=True) if p.kind == "master"]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    kinds = {p.kind for p in engine.pieces(owned=True)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    assert {p.kind for p in make(optim={"kind": "sgd"}).pieces(True)} == {"master", "momentum_buffer"}
    assert {p.kind for p in make(optim={"kind": "sgd", "momentum": 0.0}).pieces(True)} == {"master"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_follow_fp32(precision: str) -> None:
    engine = make(precision=precision)
    found, expected = train(engine, range(8)), train(make(), range(8))
    ulp = 2.0**-8 if precision == "bf16" else 2.0**-11
    assert found["loss"] == pytest.approx(expected["loss"], rel=ulp)
    assert found["loss"] != expected["loss"], "it must not have computed in fp32"
    assert {w.dtype for w in engine.weights} == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {m.dtype for m in engine.masters} == {torch.float32}
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(engine.weights, engine.masters, strict=True))


def test_sixteen_bit_gradients_are_added_in_fp32() -> None:
    """128 equal microbatches: added in bf16, the norm of their sum is wrong by 7 in 1000 (measured)."""
    one, many = make(precision="bf16"), make(precision="bf16")
    batches, _ = microbatches(3)
    batch = max(batches, key=lambda b: b.counted())
    alone = one.train_step([batch], batch.counted(), 1e-3)
    result = many.train_step([batch] * 128, 128 * batch.counted(), 1e-3)
    # Each gradient is rounded at 1/128 of its size, which is exact, so only the order of fp32 sums differs.
    assert result.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)


class Poison:
    """Make one output of the head wrong, once."""

    def __init__(self, engine: ReferenceEngine, **change: float) -> None:
        self.change = {k: torch.tensor(v) for k, v in change.items()}
        self.left = 1
        self.handle = engine.model.lm_head.register_forward_hook(self)  # type: ignore[union-attr, operator]

    def __call__(self, module: Any, arguments: Any, out: Any) -> Any:
        if not self.left:
            return out
        self.left -= 1
        changed = {k: getattr(out, k) * v for k, v in self.change.items()}
        return out._replace(**changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("change", [{"objective": math.nan}, {"objective": math.inf}, {"nll": math.inf}])
def test_a_step_that_is_not_finite_changes_nothing(precision: str, change: dict[str, float]) -> None:
    engine, twin = make(precision=precision), make(precision=precision)
    train(engine, range(2))
    train(twin, range(2))
    before, updates = assemble(local_boxes(engine)), engine.extra_state()["updates"]
    Poison(engine, **change)
    result = engine.train_step(*microbatches(2), lr_of(2))
    assert result.skipped
    assert result.grad_norm == math.inf
    after = assemble(local_boxes(engine))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert engine.extra_state()["updates"] == updates == 2
    assert train(engine, range(3, 6)) == train(twin, range(3, 6)), "as if the step had never been"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_going_on_from_saved_pieces_is_bitwise(precision: str, kind: str) -> None:
    config = {"precision": precision, "optim": {"kind": kind}}
    whole = make(**config)
    first = train(whole, range(3))
    saved, extra = assemble(local_boxes(whole)), json.loads(json.dumps(whole.extra_state()))
    rest = train(whole, range(3, 6))
    engine = make(**config)
    fill(engine, saved, extra)
    assert train(engine, range(3, 6)) == rest
    assert first["loss"] != rest["loss"]
    assert engine.extra_state() == whole.extra_state()


def test_evaluation_is_without_dropout_and_leaves_training_as_it_was() -> None:
    engine, twin = make(model=LSTM), make(model=LSTM)
    batch = microbatches(3)[0][1]
    engine.model.eval()
    expected = float(
        engine.model(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets).nll  # no sample_ids
    )
    engine.model.train()
    assert engine.evaluate([batch]) == expected == engine.evaluate([batch])
    assert train(engine, range(2)) == train(twin, range(2))


def test_a_batch_without_counted_tokens_has_loss_zero() -> None:
    engine = make()
    empty = next(b for b in microbatches(3)[0] if b.counted() == 0)
    result = engine.train_step([empty], 0, 1e-3)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)


def test_the_loss_scaler_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    import logging

    import deepspeed.runtime.fp16.loss_scaler as theirs

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    monkeypatch.setattr(theirs.dist, "get_rank", lambda: 1)  # it only logs on rank 0
    expected = theirs.DynamicLossScaler(
        init_scale=2**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )
    ours = LossScaler()
    overflows = {0, 1, 5, 2005, 2006, 2007, 2008, 4100}
    seen = set()
    for step in range(6000):
        expected.update_scale(step in overflows)
        ours.update(step in overflows)
        assert ours.scale == expected.loss_scale, step
        seen.add(ours.scale)
    assert len(seen) > 3


def test_a_scale_of_one_that_overflows_ends_the_run() -> None:
    scaler = LossScaler(scale=1.0, hysteresis=1)
    with pytest.raises(RunError, match="loss scale of 1"):
        scaler.update(overflow=True)


def test_importing_bigtrain_does_not_import_deepspeed() -> None:
    """The command line, the trainer and all that they import at start."""
    code = (
        "import sys, bigtrain.cli, bigtrain.train, bigtrain.trainer, bigtrain.engine.reference, "
        "bigtrain.engine.replica, bigtrain.engine.zero\n"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'deepspeed']\n"
        "assert 'torch' in sys.modules\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_deepspeed_starts_in_one_process_without_port_log_or_compilation(tmp_path: Any) -> None:
    """engine = "zero" with no launcher and no environment; a compiler that is called fails."""
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho a compiler was called >&2\nexit 1\n")
    fake.chmod(0o755)
    code = (
        "import torch\n"
        "from tests.test_engine import ALONE\n"
        "from tests.runs.engine_parts import *\n"
        "from bigtrain.engine import make_engine\n"
        "config = make_config(layout={'engine': 'zero', 'zero': 2, 'offload': 'optimizer'})\n"
        "engine = make_engine(make_model(config), config, ALONE)\n"
        "assert type(engine).__name__ == 'ZeroEngine'\n"
        "assert len(train(engine, range(2))['loss']) == 2\n"
        "engine.close()\n"
    )
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in (*launcher, "DS_ACCELERATOR")}
    env |= {
        "CXX": str(fake),
        "CC": str(fake),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert not (tmp_path / "ext").exists()
