"""Our [model] as a Hugging Face config.json and back, for the families that both know.

A model that a family cannot express exactly is refused, never approximated: every logit would be a little wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from bigtrain.config import ModelConfig, RopeScaling, model_problems
from bigtrain.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""model_type -> class, in the order in which they are tried."""


def family_of(m: ModelConfig) -> str:
    """The family that is exactly this model. UserError with every difference to the nearest when there is none."""
    outside = list(_outside(m))
    if outside:
        raise _refused("no Hugging Face family is this model", outside)
    differences = {family: list(_differences(m, family)) for family in ARCHITECTURES}
    nearest = min(differences, key=lambda family: len(differences[family]))
    if differences[nearest]:
        raise _refused(
            f"no Hugging Face family is this model; the nearest is {nearest}", differences[nearest]
        )
    return nearest


def _refused(what: str, problems: list[str]) -> UserError:
    return UserError(
        what + "".join(f"\n    {p}" for p in problems),
        do="what bigtrain trains it also runs (`bigtrain generate`); export needs one of "
        + ", ".join(ARCHITECTURES),
    )


def _outside(m: ModelConfig) -> Iterator[str]:
    if m.kind == "lstm":
        yield "model.kind: an LSTM has no causal language model class in transformers"
    if m.objective == "masked":
        yield 'model.objective: the families are causal, this model is "masked"'


def _differences(m: ModelConfig, family: str) -> Iterator[str]:
    """What the family does not have or cannot leave out; each starts with the key."""
    gpt2 = family == "gpt2"
    wanted: dict[str, Any] = {
        "norm": "layernorm" if gpt2 else "rmsnorm",
        "position": "learned" if gpt2 else "rope",
        "activation": "gelu" if gpt2 else "swiglu",
        "qk_norm": family == "qwen3",
    }
    if family != "llama":  # attention_bias and mlp_bias together are our `bias`
        wanted["bias"] = gpt2
    if not m.bias:
        wanted["qkv_bias"] = family == "qwen2"
    if family in ("llama", "gpt2"):
        wanted["sliding_window"] = None
    for key, value in wanted.items():
        if getattr(m, key) != value:
            yield f"model.{key}: {family} has {_shown(value)}, this model {_shown(getattr(m, key))}"
    if family == "llama" and m.width % m.num_heads:
        yield f"model.heads: llama needs a width that is a multiple of heads, not {m.width} and {m.num_heads}"
    if gpt2 and m.num_kv_heads != m.num_heads:
        yield f"model.kv_heads: gpt2 has as many as heads ({m.num_heads}), not {m.num_kv_heads}"
    if gpt2 and m.dim_per_head * m.num_heads != m.width:
        yield f"model.head_dim: gpt2 has width / heads, not {m.dim_per_head}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


# ---- outwards


def to_hugging_face(m: ModelConfig, family: str) -> dict[str, Any]:
    """config.json of this model, as transformers 4 and 5 read it; without dtype and token ids."""
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tied,
        "initializer_range": m.init_std,
        "use_cache": True,
    }
    if family == "gpt2":
        return common | {
            "n_positions": m.max_length,
            "n_embd": m.width,
            "n_layer": m.layers,
            "n_head": m.num_heads,
            "n_inner": m.ffn,
            "activation_function": "gelu_new",  # the tanh approximation, which is ours
            "layer_norm_epsilon": m.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    found = common | {
        "hidden_size": m.width,
        "intermediate_size": m.ffn,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.dim_per_head,
        "max_position_embeddings": m.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_scaling": _rope_scaling(m.rope_scaling),
        "attention_dropout": 0.0,
    }
    if family in ("llama", "qwen3"):
        found["attention_bias"] = m.bias
    if family == "llama":
        found["mlp_bias"] = m.bias
    if family == "mistral":
        found["sliding_window"] = m.sliding_window
    if family.startswith("qwen"):
        found |= {"use_sliding_window": m.sliding_window is not None, "sliding_window": m.sliding_window}
        # Layers from this number on have the window: all of them, or none.
        found["max_window_layers"] = m.layers if m.sliding_window is None else 0
        kind = "full_attention" if m.sliding_window is None else "sliding_attention"
        found["layer_types"] = [kind] * m.layers
    return found


def _rope_scaling(s: RopeScaling | None) -> dict[str, Any] | None:
    if s is None:
        return None
    found: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        found["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        found |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        found |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    return found


# ---- inwards

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
    "gpt2": {"tie_word_embeddings": True},
}
"""What transformers takes for a key that config.json leaves out, where families differ."""


def from_hugging_face(raw: dict[str, Any], where: str) -> ModelConfig:
    """[model] from the content of a config.json.

    Raises UserError with everything in it that bigtrain's model does not have, and every missing key.
    """
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"model_type {family!r} is no family that bigtrain has",
            where=where,
            do="bigtrain has " + ", ".join(ARCHITECTURES),
        )
    reading = _Reading(_DEFAULTS[family] | raw)
    if raw.get("quantization_config"):
        reading.problems.append("quantization_config: the weights are quantised; dequantise them first")
    values = _gpt2_values(reading) if family == "gpt2" else _llama_values(reading, family)
    model = None
    if not reading.problems:
        try:
            model = ModelConfig.model_validate(values)
            reading.problems += model_problems(model)
        except ValidationError as e:
            reading.problems += [f"model.{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()]
    if reading.problems or model is None:
        raise UserError(
            f"describes a {family} model that bigtrain does not have"
            + "".join(f"\n    {p}" for p in reading.problems),
            where=where,
            do="import another model, or one that was converted to these families",
        )
    return model


class _Reading:
    """A config.json being read: collects every problem instead of stopping at the first."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def need(self, key: str) -> Any:
        """A key that must be there."""
        if self.raw.get(key) is None:
            self.problems.append(f"{key}: is missing")
        return self.raw.get(key)

    def number(self, key: str, default: float) -> float:
        """A number, `default` where it is left out."""
        value = self.raw.get(key)
        return float(default if value is None else value)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse every other value; the first allowed one is the family's default."""
        value = self.raw.get(key, allowed[0])
        if value not in allowed:
            self.problems.append(f"{key}: {_shown(value)}, bigtrain has {' or '.join(map(_shown, allowed))}")


def _gpt2_values(r: _Reading) -> dict[str, Any]:
    # gelu_new, gelu_pytorch_tanh and gelu_fast are one formula; "gelu" is another function (erf).
    r.only("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    r.only("scale_attn_weights", True)
    r.only("scale_attn_by_inverse_layer_idx", False)
    r.only("add_cross_attention", False)
    return {
        "vocab_size": r.need("vocab_size"),
        "layers": r.need("n_layer"),
        "width": r.need("n_embd"),
        "heads": r.need("n_head"),
        "ffn_width": r.raw.get("n_inner"),
        "max_length": r.need("n_positions"),
        "norm": "layernorm",
        "norm_eps": r.number("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "activation": "gelu",
        "bias": True,
        "tied": bool(r.raw["tie_word_embeddings"]),
        "init_std": r.number("initializer_range", 0.02),
    }


def _llama_values(r: _Reading, family: str) -> dict[str, Any]:
    raw = r.raw
    r.only("hidden_act", "silu", "swish")
    bias = False
    if family == "llama":
        bias = bool(raw.get("attention_bias"))
        if bias != bool(raw.get("mlp_bias")):
            r.problems.append("attention_bias, mlp_bias: bigtrain has biases in both or in none")
    elif family == "qwen3":
        r.only("attention_bias", False, None)
    scaling, theta = _rope(r)
    return {
        "vocab_size": r.need("vocab_size"),
        "layers": r.need("num_hidden_layers"),
        "width": r.need("hidden_size"),
        "heads": r.need("num_attention_heads"),
        "kv_heads": raw.get("num_key_value_heads"),
        "head_dim": raw.get("head_dim"),
        "ffn_width": r.need("intermediate_size"),
        "max_length": r.need("max_position_embeddings"),
        "norm_eps": r.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bias": bias,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "sliding_window": _window(r, family),
        "tied": bool(raw.get("tie_word_embeddings")),
        "init_std": r.number("initializer_range", 0.02),
    }


def _window(r: _Reading, family: str) -> int | None:
    """The window of every layer. Families with layers of both kinds say so in two ways, old and new."""
    window: int | None = r.raw.get("sliding_window")
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return window
    if not r.raw.get("use_sliding_window"):
        return None
    layers = r.raw.get("num_hidden_layers") or 0
    first = r.raw.get("max_window_layers", 28)
    kinds = r.raw.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    sliding = {kind == "sliding_attention" for kind in kinds}
    if len(sliding) > 1:
        r.problems.append(
            "layer_types: some layers have a sliding window and some have not; bigtrain has one kind"
        )
    return window if sliding == {True} else None


def _rope(r: _Reading) -> tuple[dict[str, Any] | None, float]:
    """Scaling and base: `rope_parameters` since transformers 5, `rope_scaling` and `rope_theta` before."""
    given = r.raw.get("rope_parameters") or r.raw.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or r.raw.get("rope_theta") or 10000.0)
    if r.raw.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1.0:
        r.problems.append("partial_rotary_factor: bigtrain turns whole heads")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return None, theta
    if kind not in ("linear", "llama3", "yarn"):
        r.problems.append(f'rope_type: {kind!r}, bigtrain has "linear", "llama3" and "yarn"')
        return None, theta
    factor = float(given.get("factor") or 1.0)
    found: dict[str, Any] = {"kind": kind, "factor": factor}
    if kind != "linear":
        length = given.get("original_max_position_embeddings") or r.raw.get("max_position_embeddings")
        found["original_length"] = length
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow")}
    found |= {k: float(given[k]) for k in names.get(kind, ()) if given.get(k) is not None}
    if kind == "yarn":
        ours = 0.1 * math.log(factor) + 1.0
        if not math.isclose(given.get("attention_factor") or ours, ours, rel_tol=1e-6):
            r.problems.append(f"attention_factor: bigtrain's yarn has 0.1 ln(factor) + 1 = {ours:.6f}")
        if given.get("mscale") or given.get("mscale_all_dim") or given.get("truncate") is False:
            r.problems.append(
                "mscale, mscale_all_dim, truncate: bigtrain's yarn is the paper's, without them"
            )
    return found, theta
