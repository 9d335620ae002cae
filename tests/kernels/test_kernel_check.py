"""The comparison before a run: right kernels pass, each wrong one is found, and is said to a person."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from bigtrain_kernels import attention_api, linear_cross_entropy, norm, rope, swiglu

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.errors import RunError, UserError
from bigtrain.model import kernel_check as module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LLAMA = ModelConfig(
    vocab_size=5000, layers=3, width=128, heads=8, kv_heads=2, head_dim=16, qk_norm=True, sliding_window=12
)
LSTM = ModelConfig(kind="lstm", vocab_size=300, layers=2, width=24)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VOCAB", 200)
    monkeypatch.setattr(module, "_LENGTH", 32)


def difference(model: ModelConfig = LLAMA, dtype: torch.dtype = torch.float32) -> tuple[str, float]:
    return module.worst_difference(model, LossConfig(z_loss=1e-3), dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    assert 0 < difference(dtype=dtype)[1] < module.TOLERANCE[dtype] / 2
    assert difference(LSTM, dtype)[1] < module.TOLERANCE[dtype] / 2


def without_the_first_key(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> Any:
    return RIGHT_ATTENTION(q, k, v.index_fill(0, torch.tensor([0], device=v.device), 0.0), *rest, **more)


RIGHT_ATTENTION = attention_api.flash_attn_varlen_func
WRONG: dict[str, tuple[Any, str, Any]] = {
    "attention": (attention_api, "flash_attn_varlen_func", without_the_first_key),
    "rope": (rope, "rotate", lambda x, cos, sin: x),
    "norm": (norm, "rms_norm", lambda x, weight, eps: x * weight),
    "swiglu": (swiglu, "swiglu", lambda gate, up: gate.relu() * up),
    "loss": (
        linear_cross_entropy,
        "linear_cross_entropy",
        lambda hidden, *rest, **more: [
            x * hidden.sum().sign() * 1.5 for x in RIGHT_LOSS(hidden, *rest, **more)
        ],
    ),
}
RIGHT_LOSS = linear_cross_entropy.linear_cross_entropy


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, wrong = WRONG[name]
    monkeypatch.setattr(owner, function, wrong)
    assert difference()[1] > module.TOLERANCE[torch.bfloat16]


def test_the_small_model_has_the_large_ones_parts() -> None:
    large = ModelConfig(
        vocab_size=128256, layers=80, width=8192, heads=64, kv_heads=8, ffn_width=28672, norm="layernorm"
    )
    small = module.small_model(large)
    assert (small.layers, small.num_heads, small.num_kv_heads, small.dim_per_head) == (1, 16, 2, 128)
    assert (small.width, small.norm, small.vocab_size) == (2048, "layernorm", 200)


def test_a_difference_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "worst_difference", lambda *_: ("lm_head.weight", float("nan")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H300")
    check: Any = module.check_kernels
    gpu = torch.device("cuda")
    with pytest.raises(
        RunError, match=r"differ from torch on H300: the gradient of lm_head.weight by nan(.|\n)*=torch"
    ):
        check("auto", LLAMA, LossConfig(), torch.bfloat16, gpu)
    with pytest.raises(
        UserError, match=r"attention cannot run in it: torch.float32 is not theirs(.|\n)*auto"
    ):
        check("triton", LLAMA, LossConfig(), torch.float32, gpu)
    for kernels, device in (("torch", gpu), ("reference", gpu), ("auto", torch.device("cpu"))):
        check(kernels, LLAMA, LossConfig(), torch.bfloat16, device)


def test_asked_for_where_none_runs() -> None:
    program = "import torch; from bigtrain.model.kernel_check import check_kernels as c; "
    program += "c('triton', None, None, torch.float32, torch.device('cpu'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert 'layout.kernels: "triton" needs a GPU, and this process computes on cpu' in ran.stderr
