"""Before an export is called done: does `transformers` compute from it what bigtrain computes?"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.boxes import Box
from bigtrain.checkpoint.reader import load_weights
from bigtrain.config import ModelConfig
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import RunError
from bigtrain.interop.safetensors_reader import SafetensorsWeights
from bigtrain.interop.safetensors_writer import DTYPES, Export
from bigtrain.model.build import build_model
from bigtrain.model.transformer import Transformer

LOGITS_BOUND = 1e-4
"""Largest difference of a logit, both sides in fp32 with the exported (rounded) weights: the order of sums differs,
nothing else (issue 4)."""
_ROWS, _TOKENS, _MOST_TOKENS = 2, 64, 1024
_PROBE = "  Hello,  World!\n\tx = [1, 23]\r\n Grüße, 你好 \u2581 </s> <0x0A> 😀\n\n    return a"


def transformers_version() -> str:
    """Of the installed package; "" when there is none."""
    if importlib.util.find_spec("transformers") is None:
        return ""
    return importlib.metadata.version("transformers")


def logits_difference(folder: Path, checkpoint: Path, m: ModelConfig, dtype: str) -> float:
    """Largest absolute difference between transformers' logits and ours on the same random tokens, both in fp32.

    Ours come from the checkpoint, rounded to `dtype` as the export is. One model after the other is in memory.
    Raises RunError when it is more than LOGITS_BOUND, or not a number, or transformers cannot load the folder.
    """
    tokens = _probe_tokens(m)
    try:
        theirs = _their_logits(folder, tokens)
    except Exception as e:  # whatever a library of many models raises
        raise RunError(
            f"transformers cannot load the export ({type(e).__name__}: {e})",
            where=str(folder),
            do=_NOT_WRITTEN,
        ) from e
    gc.collect()
    ours = _our_logits(checkpoint, m, dtype, tokens)
    difference = float((theirs - ours).abs().max())
    if not difference <= LOGITS_BOUND:  # NaN is refused too
        raise RunError(
            f"transformers' logits differ from bigtrain's by {difference:.3g}, more than {LOGITS_BOUND:.0e} "
            f"(logits reach {float(ours.abs().max()):.3g})",
            where=str(folder),
            do=_NOT_WRITTEN,
        )
    return difference


_NOT_WRITTEN = "the export is not written; please report this with the run's config.toml"


def _probe_tokens(m: ModelConfig) -> torch.Tensor:
    """(2, S) random tokens; with a sliding window more than the window holds, as far as that is cheap."""
    S = max(_TOKENS, min((m.sliding_window or 0) + 16, _MOST_TOKENS))
    generator = torch.Generator().manual_seed(1)
    return torch.randint(m.vocab_size, (_ROWS, min(S, m.max_length)), generator=generator)


@torch.no_grad()
def _their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with _quiet_transformers() as transformers:
        key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, local_files_only=True, **{key: torch.float32})
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits.float()


@torch.no_grad()
def _our_logits(checkpoint: Path, m: ModelConfig, dtype: str, tokens: torch.Tensor) -> torch.Tensor:
    model = build_model(m)
    assert isinstance(model, Transformer)
    load_weights(checkpoint, model, verify=False)  # they were verified when they were exported
    for parameter in model.parameters():
        parameter.copy_(parameter.to(DTYPES[dtype][1]))
    logits = model.eval()(tokens)
    assert isinstance(logits, torch.Tensor)
    return logits


def compare_bits(folder: Path, export: Export) -> None:
    """Read every tensor back and compare it with the checkpoint's, bit for bit. Raises RunError naming it."""
    written = SafetensorsWeights(folder)
    for name, shape in export.tensors.items():
        top = 0
        for slab in export.slabs(name):
            back = torch.empty_like(slab)
            written.read(name, Box((top, *(0 for _ in shape[1:])), tuple(slab.shape)), back)
            top += slab.shape[0]
            if not torch.equal(back.view(-1).view(torch.uint8), slab.view(-1).view(torch.uint8)):
                raise RunError(
                    f"{name} reads back otherwise than it was written", where=str(folder), do="check the disk"
                )


def tokenizer_problem(folder: Path, tokenizer: Tokenizer, m: ModelConfig) -> str:
    """What AutoTokenizer does otherwise than we on one text full of traps; "" when nothing."""
    try:
        with _quiet_transformers() as transformers:
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            ids = theirs.encode(_PROBE, add_special_tokens=False)
    except Exception as e:
        return f"AutoTokenizer cannot load the tokenizer ({type(e).__name__}: {e})"
    if ids == tokenizer.encode(_PROBE).tolist():
        return ""
    name = type(theirs).__name__
    return (
        f"AutoTokenizer loads this folder as {name}, which gives other ids than the tokenizer the model was trained "
        "with; load it with PreTrainedTokenizerFast.from_pretrained(DIR), or use tokenizer.model with SentencePiece"
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """The package, without its progress bars and advice."""
    import transformers

    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
