"""The transformer against Hugging Face's models, and the properties that training relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.config import LossConfig, ModelConfig, RopeScaling
from bigtrain.errors import UserError
from bigtrain.model.build import build_model
from bigtrain.model.transformer import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 97, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn_width": 48, "max_length": 64,
    "init_std": 0.2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "window": {"sliding_window": 5},
    "gpt2": {
        "norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tied": True,
        "kv_heads": None, "ffn_width": None,
    },
    "llama3": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_length=16)},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=16)},
    "masked": {"objective": "masked"},
}  # fmt: skip


def variant(name: str, **more: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **VARIANTS[name], **more})


def tokens(B: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (B, S), generator=torch.Generator().manual_seed(seed))


def make(config: ModelConfig, **options: Any) -> Transformer:
    """A model whose norms and biases are random too: at 1 and 0 they would hide mistakes."""
    model = build_model(config, **options)
    assert isinstance(model, Transformer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_auto_kernels_equal_reference(name: str) -> None:
    """Logits, loss and every gradient, with and without packed documents."""
    config = variant(name)
    fast, slow = make(config), make(config, kernels="reference")
    x, y = tokens(3, 24), tokens(3, 24, seed=1)
    y[0, :7] = -100
    for cu in (None, torch.tensor([0, 5, 24, 40, 48, 72], dtype=torch.int32)):
        torch.testing.assert_close(fast(x, cu_seqlens=cu), slow(x, cu_seqlens=cu), rtol=0, atol=3e-5)
        sums = [m(x, cu_seqlens=cu, targets=y) for m in (fast, slow)]
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0)
        for m, s in zip((fast, slow), sums, strict=True):
            m.zero_grad()
            s.objective.backward()
        for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            scale = b.grad.abs().max().item()
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * scale + 1e-5)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_documents_do_not_see_each_other(name: str, kernels: str) -> None:
    """Changing document 1 changes document 2's logits by exactly 0, and positions restart."""
    model = make(variant(name), kernels=kernels).eval()
    x = tokens(2, 20)
    cu = torch.tensor([0, 8, 20, 25, 40], dtype=torch.int32)
    changed = x.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 97
    before, after = model(x, cu_seqlens=cu), model(changed, cu_seqlens=cu)
    assert (before[0, 8:] == after[0, 8:]).all()
    assert (before[1] == after[1]).all()
    assert (before[0, :8] != after[0, :8]).any()
    alone = model(x[0:1, 8:])
    torch.testing.assert_close(before[0:1, 8:], alone, rtol=0, atol=3e-5)


def test_documents_stay_apart_across_the_blocks_of_the_attention_kernel() -> None:
    """torch's CPU kernel works on 512 keys at a time: whole blocks are masked for the last document here."""
    model = make(variant("llama", max_length=1300)).eval()
    x = tokens(1, 1300)
    cu = torch.tensor([0, 1100, 1300], dtype=torch.int32)
    changed = x.clone()
    changed[0, :1100] = (changed[0, :1100] + 1) % 97
    before, after = model(x, cu_seqlens=cu), model(changed, cu_seqlens=cu)
    assert (before[0, 1100:] == after[0, 1100:]).all()
    torch.testing.assert_close(before[:, 1100:], model(x[:, 1100:]), rtol=0, atol=3e-5)


def test_row_boundaries_alone_need_no_mask() -> None:
    model = make(variant("llama"))
    x = tokens(2, 16)
    rows_only = torch.tensor([0, 16, 32], dtype=torch.int32)
    assert torch.equal(model(x), model(x, cu_seqlens=rows_only))


@pytest.mark.parametrize("name", ["llama", "window", "gpt2"])
def test_causal(name: str) -> None:
    model = make(variant(name)).eval()
    x = tokens(1, 20)
    changed = x.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (difference[:12] == 0).all()
    assert (difference[12:] > 0).all()


def test_sliding_window_forgets() -> None:
    """One layer with a window of 5: token 0 reaches tokens 0 to 4 and no further."""
    model = make(variant("window", layers=1)).eval()
    x = tokens(1, 12)
    changed = x.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 97
    difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (difference[:5] > 0).all()
    assert (difference[5:] == 0).all()


def test_masked_objective_looks_both_ways() -> None:
    model = make(variant("masked")).eval()
    x = tokens(1, 12)
    changed = x.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 97
    assert ((model(x) - model(changed)).abs().amax(-1)[0] > 0).all()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(recompute: str, kernels: str) -> None:
    config = variant("qwen3")
    x, y = tokens(2, 64), tokens(2, 64, seed=1)
    cu = torch.tensor([0, 9, 64, 128], dtype=torch.int32)
    plain, again = make(config, kernels=kernels), make(config, kernels=kernels, recompute=recompute)
    saved: dict[str, int] = {}
    for which, model in (("none", plain), (recompute, again)):
        count = [0]

        def pack(t: torch.Tensor, count: list[int] = count) -> torch.Tensor:
            count[0] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            objective = model(x, cu_seqlens=cu, targets=y).objective
        saved[which] = count[0]
        objective.backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    if recompute == "full" or kernels == "reference":
        assert saved[recompute] < 0.7 * saved["none"]


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"65 tokens is longer than model.max_length 64"):
        make(variant("llama"))(tokens(1, 65))


def test_names_are_hugging_face_like() -> None:
    model = build_model(variant("qwen3", layers=1), device="meta")
    assert [n for n, _ in model.named_parameters()] == [
        "embed_tokens.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "norm.weight",
        "lm_head.weight",
    ]
    tied = dict(build_model(variant("gpt2"), device="meta").named_parameters())
    assert "lm_head.weight" not in tied
    assert "embed_positions.weight" in tied


def test_tied_head_is_the_embedding() -> None:
    model = make(variant("tied"))
    assert model.lm_head.weight is model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head(torch.eye(32)[None])[0], model.embed_tokens.weight.T)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_bf16_model_stays_close(name: str) -> None:
    """Loss of a 16-bit model within what 8 bits of mantissa explain; logits keep the dtype, sums are fp32."""
    model = make(variant(name, init_std=0.05))
    x, y = tokens(2, 32), tokens(2, 32, seed=1)
    full = model(x, targets=y)
    model.to(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    half = model(x, targets=y, cu_seqlens=torch.tensor([0, 32, 64], dtype=torch.int32))
    assert half.objective.dtype == half.nll.dtype == torch.float32
    torch.testing.assert_close(half.nll, full.nll, rtol=3e-3, atol=0)


def test_z_loss_and_smoothing_are_in_the_objective_only() -> None:
    config = variant("llama")
    x, y = tokens(2, 8), tokens(2, 8, seed=1)
    plain = make(config)(x, targets=y)
    more = make(config, loss=LossConfig(z_loss=1e-2, label_smoothing=0.1))(x, targets=y)
    assert torch.equal(plain.nll, plain.objective)
    torch.testing.assert_close(more.nll, plain.nll)
    assert more.objective > more.nll * 0.9 + 1e-3


# --- Hugging Face as the oracle ---------------------------------------------------------------------------


def hf_config(kind: str, **more: Any) -> tuple[Any, ModelConfig]:
    """A tiny random Hugging Face model and our config of the same network."""
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    hf = transformers.AutoModelForCausalLM.from_config(config_class(**{**common, **more}))
    return hf.eval(), ModelConfig(**SMALL)


def assert_same_logits(hf: Any, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for value in weights.values():
        if value.dim() == 1:  # norms at 1 and biases at 0 would hide mistakes
            with torch.no_grad():
                value += 0.3 * torch.randn(value.shape, generator=generator)
    model = build_model(config)
    ours = dict(model.named_parameters())
    wanted = {n: w for n, w in weights.items() if not (config.tied and n == "lm_head.weight")}
    assert ours.keys() == wanted.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(wanted[name])
        x = tokens(2, 60)
        logits = hf(x).logits
        assert logits.std() > 0.5
        difference = (model(x) - logits).abs().max().item()
    assert difference <= 1e-4


ROPE3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
HF_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama3": (
        "Llama",
        {"rope_parameters": ROPE3, "rms_norm_eps": 1e-5},
        {"rope_theta": 500.0, "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_length=16)},
    ),
    "yarn": (
        "Llama",
        {"rope_parameters": YARN, "rms_norm_eps": 1e-5},
        {"rope_theta": 500.0, "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=16)},
    ),
    "linear": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "rms_norm_eps": 1e-5,
        },
        {"rope_theta": 500.0, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    ),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}, {"qkv_bias": True}),
    "qwen3": (
        "Qwen3",
        {"rms_norm_eps": 1e-5, "head_dim": 16, "tie_word_embeddings": True},
        {"qk_norm": True, "head_dim": 16, "tied": True},
    ),
    "mistral": ("Mistral", {"rms_norm_eps": 1e-5, "sliding_window": 7}, {"sliding_window": 7}),
}


@pytest.mark.parametrize("case", HF_CASES)
def test_logits_equal_hugging_face(case: str) -> None:
    kind, theirs, ours = HF_CASES[case]
    if case == "llama":
        theirs = {"rms_norm_eps": 1e-5}
    hf, config = hf_config(kind, **theirs)
    config = config.model_copy(update=ours)
    weights = {n.removeprefix("model."): p for n, p in hf.named_parameters()}
    assert_same_logits(hf, config, weights)


def test_logits_equal_hugging_face_gpt2() -> None:
    """GPT-2 stores transposed weights (Conv1D) and q, k, v in one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                                initializer_range=0.2, attn_implementation="eager")
    ).eval()  # fmt: skip
    renamed = {
        "wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm", "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj", "attn.c_attn": "self_attn.qkv",
    }  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in hf.transformer.named_parameters():
        value = parameter.T if "c_" in name and parameter.dim() == 2 else parameter
        for old, new in renamed.items():
            name = name.replace(old + ".", new + ".")
        name = name.removeprefix("h.") if not name.startswith("h.") else "layers." + name.removeprefix("h.")
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace("qkv", f"{part}_proj")] = piece
        else:
            weights[name] = value
    assert_same_logits(hf, variant("gpt2"), weights)
