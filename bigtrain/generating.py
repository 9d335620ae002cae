"""`bigtrain generate`: prompts in, text out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bigtrain.data.tokenizer import replace_surrogates
from bigtrain.errors import UserError
from bigtrain.generate import generate
from bigtrain.pretrained import Pretrained, open_model


def write_text(
    trained: Pretrained,
    prompts: list[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    stop: list[str] | None = None,
    seed: int = 1,
) -> list[str]:
    """Continue every prompt; returns the new text of each (without its prompt)."""
    tokenizer = trained.tokenizer
    # A document begins with BOS; a tokenizer without one begins after the end of another document.
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else [tokenizer.eos_id]
    ids = [[*begin, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    written = generate(
        trained.model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        vocab=tokenizer.vocab_size,
        stop_ids=[tokenizer.eos_id],
        stop_strings=stop or [],
        decode=tokenizer.decode,
    )
    return [tokenizer.decode(new) for new in written]


def generate_command(args: argparse.Namespace) -> int:
    """Run the verb."""
    if args.samples < 1:
        raise UserError(f"{args.samples} continuations make no text", where="--samples", do="give 1 or more")
    prompts = [replace_surrogates(prompt)[0] for prompt in args.prompt]
    if args.prompt_file:
        try:
            raw = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
            prompts.append(raw.decode())
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read the prompt: {e}", where=args.prompt_file, do="UTF-8 text") from e
    prompts = [p for p in prompts or [""] for _ in range(args.samples)]
    trained = open_model(args.model)
    for warning in trained.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    texts = write_text(
        trained,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=args.stop,
        seed=args.seed,
    )
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if len(prompts) > 1:
            print(f"--- {number} ---")
        print(prompt + text)
    return 0
