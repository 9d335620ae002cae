"""Before a run: do our Triton kernels compute on this device what torch's operations compute?

They are tested in an interpreter and compiled for the GPUs we know; a new GPU, driver or Triton is met by users first.
"""

from __future__ import annotations

import torch

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.errors import RunError, UserError
from bigtrain.model.batch import IGNORE
from bigtrain.model.build import build_model
from bigtrain.model.kernels import attention_refuses
from bigtrain.model.loss import LossSum

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest relative difference of a gradient, in its norm. Roundings make 8 ulp or less of a block and a head, TF32 in
fp32 as much as bf16's eighth; a wrong mask, head or offset makes about 1.
"""
_ROWS, _LENGTH, _VOCAB = 2, 192, 1000


def check_kernels(
    kernels: str, model: ModelConfig, loss: LossConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises UserError when "triton" is asked for where no kernel runs, RunError when they are wrong on this GPU."""
    if device.type != "cuda":
        if kernels == "triton":
            _check_interpreter(device)
        return
    if kernels == "triton" and model.kind == "transformer":
        why = attention_refuses(model.dim_per_head, dtype)
        if why:
            raise UserError(
                f'"triton" is asked for, and attention cannot run in it: {why}',
                where="layout.kernels",
                do='say "auto", which then takes torch\'s attention and our other kernels',
            )
    if kernels in ("auto", "triton"):
        name, error = worst_difference(model, loss, dtype, device)
        if not error <= TOLERANCE[dtype]:
            raise RunError(
                f"bigtrain's Triton kernels differ from torch on {torch.cuda.get_device_name(device)}: the gradient of "
                f"{name} by {error:.2g} of itself, at most {TOLERANCE[dtype]:g} is rounding",
                where="layout.kernels",
                do="train with --set layout.kernels=torch, and report it: this must not happen",
            )


def _check_interpreter(device: torch.device) -> None:
    from bigtrain_kernels.checks import INTERPRETED  # loads triton

    if not INTERPRETED:
        raise UserError(
            f'"triton" needs a GPU, and this process computes on {device.type}',
            where="layout.kernels",
            do='say "auto", which takes the kernels wherever there is a GPU, or set TRITON_INTERPRET=1 to run them '
            "in Triton's interpreter, thousands of times slower",
        )


def small_model(model: ModelConfig) -> ModelConfig:
    """One layer with the heads' dimension and grouping, norms, window and parts of a model; the rest is small."""
    fields = {"layers": 1, "vocab_size": min(model.vocab_size, _VOCAB), "max_length": _LENGTH}
    if model.kind == "lstm":
        return model.model_copy(update={**fields, "width": min(model.width, 256), "dropout": 0.0})
    group = model.num_heads // model.num_kv_heads
    kv_heads = min(2, model.num_kv_heads)
    dim, heads = model.dim_per_head, group * kv_heads
    update = {**fields, "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "width": dim * heads}
    return model.model_copy(update={**update, "ffn_width": 2 * dim * heads})


def worst_difference(
    model: ModelConfig, loss: LossConfig, dtype: torch.dtype, device: torch.device
) -> tuple[str, float]:
    """The parameter whose gradient by the kernels is furthest from torch's, and how far, relative to its norm."""
    small = small_model(model)
    made = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, small.vocab_size, (2, _ROWS, _LENGTH), generator=made).to(device)
    targets[:, ::5] = IGNORE
    cuts = [0, _LENGTH // 4, _LENGTH // 4 + 1, _LENGTH, 3 * _LENGTH // 2, _ROWS * _LENGTH]
    ends = torch.tensor(cuts, dtype=torch.int32, device=device)
    gradients = []
    for kernels in ("torch", "auto" if device.type == "cuda" else "triton"):
        net = build_model(small, loss, kernels=kernels, device=device, seed=1).to(dtype)
        for parameter in net.parameters():
            parameter.data *= 2  # small initial weights would hide attention: all scores near 0
        sums = net(tokens, cu_seqlens=ends, targets=targets)
        assert isinstance(sums, LossSum)
        sums.objective.backward()
        gradients.append({name: p.grad.float() for name, p in net.named_parameters() if p.grad is not None})
    torchs, ours = gradients
    worst = ("", 0.0)
    for name, wanted in torchs.items():
        error = float((ours[name] - wanted).norm() / wanted.norm().clamp(min=1e-12))
        if not error <= worst[1]:
            worst = (name, error)
            if error != error:
                break
    return worst
