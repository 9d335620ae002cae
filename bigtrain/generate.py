"""Token ids in, token ids out: sampling with a cache, for a batch of prompts of unequal lengths.

What a prompt gets depends on its own tokens, the settings and its seed, never on the prompts beside it (up to
the rounding of matrix products, whose shapes change with the batch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bigtrain.errors import RunError, UserError
from bigtrain.model.lstm import LSTM
from bigtrain.model.transformer import Transformer

Decode = Callable[[list[int]], str]
OnText = Callable[[int, str], None]


def generate(
    model: Transformer | LSTM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 1,
    vocab: int | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    on_text: OnText | None = None,
) -> list[list[int]]:
    """Continue each prompt; returns the new ids of each.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest (0: all), then top_p the likeliest
    whose probabilities reach p. vocab: ids from there on are never written (rows of the embedding that the
    tokenizer has no piece for). A seed for each prompt, or one: prompt i then draws from (seed, i).

    A row ends after max_new_tokens; at an id of stop_ids, which is left out; at a stop string, where the ids
    returned are those whose text ends before it; or when prompt and new tokens together reach
    model.max_length (transformers: there is no sliding on, because positions behind it were never trained).
    Stop strings and on_text(i, new text), called as text becomes final, need decode. Raises UserError for a
    masked-objective model, an empty or too long prompt, or settings out of range; RunError when the model
    gives logits that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    if decode is None and (stop_strings or on_text):
        raise UserError("stop strings and streaming need a decode function")
    seeds = [f"{seed}/{i}" for i in range(len(prompts))] if isinstance(seed, int) else [str(s) for s in seed]
    rows = [_Row(list(p), s, _room(model, p, max_new_tokens)) for p, s in zip(prompts, seeds, strict=True)]
    if decode is not None and (stop_strings or on_text):
        for row in rows:
            row.text = _Text(decode, row.prompt, stop_strings)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            pick = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
            _run(model, rows, vocab, pick, frozenset(stop_ids), on_text)
    finally:
        model.train(was_training)
    return [row.new for row in rows]


class _Row:
    """One prompt and what has been written after it."""

    def __init__(self, prompt: list[int], seed: str, room: int) -> None:
        self.prompt, self.seed, self.room = prompt, seed, room
        self.new: list[int] = []
        self.text: _Text | None = None
        self.done = room == 0

    def uniform(self) -> float:
        """The next number in [0, 1): a hash of the seed and the step, so that no other row can shift it."""
        digest = hashlib.sha256(f"{self.seed}/{len(self.new)}".encode()).digest()
        return (int.from_bytes(digest[:8], "little") >> 11) / (1 << 53)

    def accept(self, token: int, stop_ids: frozenset[int]) -> str:
        """Take one token; returns the text that became final."""
        if token in stop_ids:
            self.done = True
        else:
            self.new.append(token)
            self.done = len(self.new) >= self.room
        if self.text is None:
            return ""
        final = self.text.feed(self.new, last=self.done)
        if self.text.stopped:
            self.done = True
            self.new = self.text.before_stop(self.new)
        return final


class _Text:
    """Turns growing ids into text that can be shown: whole characters, nothing of a stop string."""

    def __init__(self, decode: Decode, prompt: list[int], stops: Sequence[str]) -> None:
        self.decode = decode
        self.context = prompt[-8:]  # a tokenizer may write a word differently at the start of a text
        self.skip = len(decode(self.context))
        self.stops = [s for s in stops if s]
        self.shown = 0
        self.stop_at = 0
        self.stopped = False

    def of(self, new: list[int]) -> str:
        """The text of the new ids."""
        return self.decode(self.context + new)[self.skip :]

    def feed(self, new: list[int], *, last: bool) -> str:
        """The text that became final with the latest id; all the rest with `last`."""
        text = self.of(new)
        found = [at for s in self.stops if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.stop_at = True, min(found)
            end = self.stop_at
        else:
            end = len(text) if last else self._safe(text)
        final = text[self.shown : end]
        self.shown = max(self.shown, end)
        return final

    def _safe(self, text: str) -> int:
        """Length of the text that no later id can change: not half a character, not the head of a stop
        string.
        """
        end = len(text.rstrip("\ufffd"))
        for stop in self.stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return end

    def before_stop(self, new: list[int]) -> list[int]:
        """The most ids whose text ends before the stop string."""
        count = len(new)
        while count and len(self.of(new[:count])) > self.stop_at:
            count -= 1
        return new[:count]


def _run(
    model: Transformer | LSTM,
    rows: list[_Row],
    vocab: int | None,
    pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stop_ids: frozenset[int],
    on_text: OnText | None,
) -> None:
    """Read all prompts at once, then one token a row at a time until every row is done."""
    device = next(model.parameters()).device
    lengths = [len(row.prompt) for row in rows]
    longest = max(lengths, default=0)
    cache = model.new_cache(len(rows), longest + max((row.room for row in rows), default=0))
    padded = [row.prompt + [0] * (longest - len(row.prompt)) for row in rows]
    cache.expect(lengths)
    logits = model(torch.tensor(padded, device=device), cache=cache)
    last = logits[torch.arange(len(rows)), torch.tensor(lengths) - 1]
    while not all(row.done for row in rows):
        uniforms = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=device)
        tokens = pick(last[:, :vocab], uniforms)
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not row.done and (final := row.accept(token, stop_ids)) and on_text:
                on_text(i, final)
        if all(row.done for row in rows):
            return
        if any(row.done for row in rows):
            cache.expect([int(not row.done) for row in rows])  # a row that is done stands still
        last = model(tokens[:, None], cache=cache)[:, 0]


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """One id a row: logits (B, V), uniforms (B,) fp64 in [0, 1) -> (B,) int64.

    Inverts the cumulative distribution over the tokens sorted by probability, in fp64, so that one uniform
    number decides. Raises RunError for logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise RunError("the model gives logits that are not finite", do="use an earlier checkpoint")
    if temperature == 0:
        return logits.argmax(dim=-1)
    order = logits.double().sort(dim=-1, descending=True, stable=True)
    scores = order.values / temperature
    if top_k:
        scores = scores[:, :top_k]
    probabilities = scores.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.where(before < top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    rank = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    kept = (probabilities > 0).sum(dim=-1, keepdim=True)
    return order.indices.gather(1, rank.minimum(kept - 1)).squeeze(1)


def _room(model: Transformer | LSTM, prompt: Sequence[int], max_new_tokens: int) -> int:
    """New tokens that a prompt leaves room for."""
    if model.config.kind == "lstm":
        return max_new_tokens
    return min(max_new_tokens, model.config.max_length - len(prompt))


def _check(
    model: Transformer | LSTM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Everything that a person can get wrong."""
    if model.config.objective == "masked":
        raise UserError(
            "a masked-objective model fills in hidden tokens and cannot continue a text",
            do='train with model.objective = "causal" to generate',
        )
    problems = {
        f"max_new_tokens must be at least 1, not {max_new_tokens}": max_new_tokens < 1,
        f"temperature must be 0 (greedy) or more, not {temperature}": not temperature >= 0,
        f"top_k must be 0 (all tokens) or more, not {top_k}": top_k < 0,
        f"top_p must be above 0 and at most 1, not {top_p}": not 0 < top_p <= 1,
    }
    for problem, wrong in problems.items():
        if wrong:
            raise UserError(problem)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} has no tokens", do="begin it with the tokenizer's BOS")
        if not all(0 <= token < model.config.vocab_size for token in prompt):
            raise UserError(f"prompt {i} has an id outside the vocabulary of {model.config.vocab_size}")
        if _room(model, prompt, 1) < 1:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens and leaves no room below max_length "
                f"{model.config.max_length}",
                do="shorten the prompt",
            )
