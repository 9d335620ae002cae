"""Runs of tiny models without training them, for the tests of export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import store
from bigtrain.config import Config, ModelConfig, RopeScaling
from bigtrain.configfile import build, render
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.build import build_model
from bigtrain.place import Place
from tests.data_parts import small_tokenizer

ONE = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)
SMALL: dict[str, Any] = {
    "vocab_size": 515, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "max_length": 128,
    "init_std": 0.2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "kv_heads": 4,
    "ffn_width": 72,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tied": True, "norm_eps": 1e-6, "rope_theta": 500.0}),
    "biases": ("llama", {"bias": True}),
    "heads": ("llama", {"head_dim": 16, "kv_heads": 1}),
    "odd-width": ("mistral", {"width": 30, "heads": 4, "head_dim": 8}),
    "llama3": ("llama", {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_length=16)}),
    "linear": ("llama", {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}),
    "yarn": ("llama", {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=16)}),
    "window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"qkv_bias": True, "tied": True}),
    "qwen2-window": ("qwen2", {"qkv_bias": True, "sliding_window": 7}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 16}),
    "qwen3-window": ("qwen3", {"qk_norm": True, "sliding_window": 9, "tied": True}),
    "gpt2": ("gpt2", {**GPT2, "tied": True}),
    "gpt2-untied": ("gpt2", GPT2),
}
"""Name -> family and what differs from SMALL."""


def model_config(name: str, **more: Any) -> ModelConfig:
    """The [model] of one of `MODELS`."""
    return ModelConfig(**{**SMALL, **MODELS[name][1], **more})


def weights_of(model: ModelConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Logical fp32 tensors, norms and biases random too: at 1 and 0 they would hide mistakes."""
    found = {n: p.detach() for n, p in build_model(model, seed=seed).named_parameters()}
    generator = torch.Generator().manual_seed(5)
    for tensor in found.values():
        if tensor.dim() == 1:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return found


def config_of(model: ModelConfig, **train: Any) -> Config:
    """A whole config around a model."""
    return build(
        {
            "name": "tiny",
            "model": model.model_dump(exclude_none=True),
            "data": {"path": "none", "sequence_length": 24},
            "train": {"steps": 4, "global_batch": 4, **train},
            "optim": {"lr": 1e-3},
        }
    )


def make_run(folder: Path, model: ModelConfig, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """A run directory with one checkpoint of these weights, as training would leave it."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(render(config_of(model)))
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model)
    weights = weights_of(model) if weights is None else weights
    pieces = [Piece("master", n, tuple(t.shape), (0,) * t.dim(), t) for n, t in weights.items()]
    store.save(folder / "checkpoints", 7, pieces, {"step": 7}, ONE)
    return folder
