"""Generation: the cache gives the full forward's logits, and a prompt's text is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.config import ModelConfig
from bigtrain.errors import RunError, UserError
from bigtrain.generate import generate, sample
from bigtrain.model.build import build_model
from bigtrain.model.lstm import LSTM
from bigtrain.model.transformer import Transformer
from tests.test_transformer import VARIANTS, make, tokens, variant

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 21, 22]]
CAUSAL = [name for name in VARIANTS if name != "masked"]


def model_of(name: str, **options: Any) -> Transformer | LSTM:
    if name == "lstm":
        config = ModelConfig(kind="lstm", vocab_size=97, layers=2, width=32, init_std=1.0)
        model = build_model(config)
        with torch.no_grad():
            model.lm_head.weight *= 20  # clear winners, as in a trained model
        return model
    return make(variant(name), **options)


def by_full_forward(model: Transformer | LSTM, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache."""
    model.eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_logits_equal_the_full_forward(name: str, kernels: str) -> None:
    """In pieces of 7, 1, 1, 5 and 1 tokens, to the rounding of fp32."""
    model = make(variant(name), kernels=kernels).eval()
    x = tokens(3, 15)
    with torch.no_grad():
        full = model(x)
        cache = model.new_cache(3, 15)
        parts = [model(part, cache=cache) for part in x.split([7, 1, 1, 5, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=2e-5)
    assert cache.lengths.tolist() == [15, 15, 15]


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_of_unequal_length(name: str) -> None:
    model = make(variant(name)).eval()
    x = tokens(2, 14)
    with torch.no_grad():
        full = model(x)
        cache = model.new_cache(2, 14)
        cache.expect([9, 4])
        padded = x[:, :9].clone()
        padded[1, 4:] = 50
        first = model(padded, cache=cache)
        torch.testing.assert_close(first[1, :4], full[1, :4], rtol=0, atol=2e-5)
        for step in range(5):
            both = torch.stack((x[0, 9 + step], x[1, 4 + step]))[:, None]
            logits = model(both, cache=cache)[:, 0]
            expected = torch.stack((full[0, 9 + step], full[1, 4 + step]))
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "lstm"])
def test_greedy_equals_the_full_forward_whatever_the_batch(name: str) -> None:
    model = model_of(name)
    together = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, new in zip(PROMPTS, together, strict=True):
        assert new == by_full_forward(model, prompt, 12)


@pytest.mark.parametrize("name", ["llama", "lstm"])
def test_sampling_is_independent_of_the_batch(name: str) -> None:
    model = model_of(name)
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 2.0, "top_k": 50, "top_p": 0.95}
    together = generate(model, PROMPTS, seed=[5, 6, 7], **settings)
    for prompt, seed, new in zip(PROMPTS, [5, 6, 7], together, strict=True):
        assert generate(model, [prompt], seed=[seed], **settings) == [new]
    assert generate(model, PROMPTS[::-1], seed=[7, 6, 5], **settings) == together[::-1]
    one_seed = generate(model, PROMPTS, seed=3, **settings)
    assert generate(model, PROMPTS, seed=3, **settings) == one_seed
    assert generate(model, PROMPTS[:1], seed=3, **settings) == one_seed[:1]
    assert generate(model, PROMPTS, seed=4, **settings) != one_seed
    same_prompt = generate(model, [[1, 2]] * 3, seed=3, **settings)
    assert len({tuple(new) for new in same_prompt}) == 3


def test_a_row_that_is_done_does_not_disturb_the_others() -> None:
    model = model_of("gpt2")
    alone = [generate(model, [p], max_new_tokens=15, temperature=0)[0] for p in PROMPTS]
    stop = alone[0][2]
    cut = [new[: new.index(stop)] if stop in new else new for new in alone]
    assert len({len(new) for new in cut}) > 1
    assert generate(model, PROMPTS, max_new_tokens=15, temperature=0, stop_ids=[stop]) == cut


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ends_at_max_length(name: str) -> None:
    """A row that is full stands still while a shorter one goes on."""
    model = model_of(name)
    prompts = [list(range(60)), list(range(5))]
    new = generate(model, prompts, max_new_tokens=1000, temperature=0)
    assert [len(n) for n in new] == [4, 59]
    assert new[1] == by_full_forward(model, prompts[1], 59)


def test_lstm_has_no_longest_length() -> None:
    model = build_model(ModelConfig(kind="lstm", vocab_size=97, layers=1, width=8, max_length=16))
    assert len(generate(model, [[1]], max_new_tokens=40)[0]) == 40


def test_sample_follows_the_distribution() -> None:
    """20,000 evenly spread uniforms give each token its probability."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    n = 20_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature in (0.5, 1.0, 2.0):
        ids = sample(logits.expand(n, 7), uniforms, temperature=temperature)
        shares = torch.bincount(ids, minlength=7) / n
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=2 / n)


def test_top_k_and_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05])
    n = 10_000
    logits = probabilities.log().expand(n, 5)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def shares(**settings: Any) -> list[float]:
        ids = sample(logits, uniforms, temperature=1.0, **settings)
        return [round(x, 3) for x in (torch.bincount(ids, minlength=5) / n).tolist()]

    assert shares(top_k=2) == [0, 0.571, 0.429, 0, 0]
    assert shares(top_k=1) == [0, 1, 0, 0, 0]
    assert shares(top_k=100) == [0.1, 0.4, 0.3, 0.15, 0.05]
    assert shares(top_p=0.5) == [0, 0.571, 0.429, 0, 0]  # 0.4 does not reach 0.5, with 0.3 it does
    assert shares(top_p=0.39) == [0, 1, 0, 0, 0]
    assert shares(top_p=1e-9) == [0, 1, 0, 0, 0]
    assert shares(top_k=3, top_p=0.8) == [0, 0.571, 0.429, 0, 0]  # of the 3 kept, two hold 0.875


def test_extreme_uniforms_stay_inside() -> None:
    logits = torch.zeros(2, 5)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, ends, temperature=1.0).tolist() == [0, 4]
    assert sample(logits, ends, temperature=1.0, top_p=0.5).tolist() == [0, 2]


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spell(ids: list[int]) -> str:
    """A toy decoder: one letter an id."""
    return "".join(LETTERS[i % 26] for i in ids)


def test_stop_strings() -> None:
    model = model_of("llama")
    full = generate(model, PROMPTS, max_new_tokens=15, temperature=0)
    text = spell(full[0])
    stop = text[4:7]
    new = generate(model, PROMPTS, max_new_tokens=15, temperature=0, stop_strings=[stop, ""], decode=spell)
    assert spell(new[0]) == text[: text.index(stop)]
    for a, b in zip(full[1:], new[1:], strict=True):
        assert spell(b) == spell(a).split(stop)[0]


@pytest.mark.parametrize("stops", [[], ["stop"]])
def test_streaming_gives_the_same_text(stops: list[str]) -> None:
    model = model_of("llama")
    if stops:
        text = spell(generate(model, PROMPTS[:1], max_new_tokens=30, temperature=1.5, seed=2)[0])
        stops = [text[10:13], text[11:12] + "!"]
    parts: dict[int, list[str]] = {}
    new = generate(
        model, PROMPTS, max_new_tokens=30, temperature=1.5, seed=2, decode=spell, stop_strings=stops,
        on_text=lambda i, text: parts.setdefault(i, []).append(text),
    )  # fmt: skip
    assert ["".join(parts.get(i, [])) for i in range(3)] == [spell(n) for n in new]
    assert len(parts[0]) > 5


def test_half_characters_are_held_back() -> None:
    """A decoder of bytes: a character of three ids appears when the third has come."""
    model = model_of("llama")

    def decode(ids: list[int]) -> str:
        return (b"\xe4\xb8\xad" * 50)[: len(ids)].decode(errors="replace")

    parts: list[str] = []
    generate(model, [[1, 2, 3]], max_new_tokens=7, decode=decode, on_text=lambda _, text: parts.append(text))
    assert parts == ["中", "中", "\ufffd"]


def test_training_mode_is_restored() -> None:
    model = model_of("llama").train()
    generate(model, [[1]], max_new_tokens=2)
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], {}, "prompt 0 has no tokens"),
        ([[1], [97]], {}, "prompt 1 has an id outside the vocabulary of 97"),
        ([[1] * 64], {}, "no room below max_length 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"stop_strings": ["x"]}, "decode"),
    ],
)
def test_refusals(prompts: list[list[int]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model_of("llama"), prompts, **{"max_new_tokens": 3, **settings})


def test_masked_models_are_refused() -> None:
    with pytest.raises(UserError, match="masked-objective"):
        generate(make(variant("masked")), [[1]], max_new_tokens=3)


def test_broken_weights_are_named() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        generate(model, [[1]], max_new_tokens=3)


def test_rows_without_a_piece_are_never_written() -> None:
    model = model_of("llama") if "llama" in VARIANTS else model_of(CAUSAL[0])
    for temperature in (0.0, 5.0):
        texts = generate(model, PROMPTS, max_new_tokens=12, temperature=temperature, vocab=30)
        assert max(token for text in texts for token in text) < 30
    free = generate(model, PROMPTS, max_new_tokens=12, temperature=5.0)
    assert max(token for text in free for token in text) >= 30, "without the limit they would be"
