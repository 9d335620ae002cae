"""Our tokenizer as Hugging Face's files, with the same ids for every text.

transformers would convert tokenizer.model by itself, into a tokenizer that writes a space before each text and turns
"</s>" in it into the id that ends a document. So tokenizer.json is written here. Pieces hold real spaces in it
instead of SentencePiece's U+2581: then no normalisation is needed, and that character in a text becomes its three
bytes, as it does with us (bigtrain.data.tokenizer).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bigtrain.data.files import write_whole
from bigtrain.data.tokenizer import SPACE, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SILENT = (_UNKNOWN, _CONTROL, _BYTE, _UNUSED)
_BPE = 2
"""Numbers in SentencePiece's format."""


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the tokenizer has them."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {f"{name}_token_id": number for name, number in ids.items() if number >= 0}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> list[str]:
    """Write tokenizer.model, tokenizer_config.json and tokenizer.json; returns warnings for people.

    The tokenizer puts BOS before a text (EOS where there is no BOS), for documents begin so in training
    (docs/decisions/0001), and nothing after it. A tokenizer that changes text (made elsewhere: normalisation, a space
    in front) is left to transformers' own conversion, with a warning that its ids are not ours for sure.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    write_whole(folder / "tokenizer.model", tokenizer.model)
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    special = {f"{name}_token": model.pieces[i].piece for name, i in names.items() if i >= 0}
    special["unk_token"] = model.pieces[model.trainer_spec.unk_id].piece
    if tokenizer.mask_id is not None:
        special["mask_token"] = model.pieces[tokenizer.mask_id].piece
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.exact else "LlamaTokenizer",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text
        **special,
    }
    if not tokenizer.exact:
        config |= {"legacy": False, "add_bos_token": tokenizer.bos_id >= 0, "add_eos_token": False}
    write_json(folder / "tokenizer_config.json", config)
    if not tokenizer.exact:
        return [
            "this tokenizer normalises text or puts a space before it: tokenizer.model is copied and transformers "
            "converts it its own way; compare its ids with the run's before you rely on them"
        ]
    write_json(folder / "tokenizer.json", _tokenizer_json(model, tokenizer))
    if model.trainer_spec.model_type == _BPE:
        return []
    return [
        "a unigram tokenizer: where two ways to cut a text are equally likely, transformers (it adds in 64 bits) "
        "may take the other one than SentencePiece"
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file. RunError if the disk is full."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _tokenizer_json(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizers` library's description of a SentencePiece model that takes text as it is."""
    pieces = [
        p.piece if p.type in (_CONTROL, _UNKNOWN) else p.piece.replace(SPACE, " ") for p in model.pieces
    ]
    added = [
        {
            "id": i,
            "content": piece,
            "special": p.type != _USER,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (p, piece) in enumerate(zip(model.pieces, pieces, strict=True))
        if p.type in (_CONTROL, _UNKNOWN, _USER)  # user-defined pieces are found before all others
    ]
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    cut: dict[str, Any] | None = None
    fallback = bool(model.trainer_spec.byte_fallback)
    if model.trainer_spec.model_type == _BPE:
        kind: dict[str, Any] = {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(model, pieces),
        }
    else:
        # What is no text gets the least score: an unknown letter's is counted from it.
        least = min(p.score for p in model.pieces if p.type == _NORMAL)
        scores = [
            [piece, p.score if p.type == _NORMAL else least]
            for p, piece in zip(model.pieces, pieces, strict=True)
        ]
        silent = [piece for p, piece in zip(model.pieces, pieces, strict=True) if p.type in _SILENT]
        cut = _between_letters(silent)
        kind = {
            "type": "Unigram",
            "unk_id": model.trainer_spec.unk_id,
            "vocab": scores,
            "byte_fallback": fallback,
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": _first(tokenizer, pieces),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": kind,
    }


def _between_letters(pieces: list[str]) -> dict[str, Any]:
    """Cut a text that looks like a control or byte piece ("</s>", "<0x0A>") after its first letter.

    A unigram model would find that piece in its vocabulary; SentencePiece knows that it stands for no text.
    """
    pattern = "|".join(f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in pieces if len(p) > 1)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}


def _merges(model: Any, pieces: list[str]) -> list[list[str]]:
    """Every way to put a piece together from two others, the best piece first: SentencePiece keeps no list of them."""
    normal = {piece: p.score for p, piece in zip(model.pieces, pieces, strict=True) if p.type == _NORMAL}
    found: list[list[str]] = []
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        whole = [(a, b) for a, b in cuts if a in normal and b in normal]
        # A run of one character is met from the left: what stands there is the longer half.
        found += [[a, b] for a, b in sorted(whole, key=lambda cut: -len(cut[0]))]
    return found


def _first(tokenizer: Tokenizer, pieces: list[str]) -> dict[str, Any] | None:
    """What begins every text."""
    number = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    if number < 0:
        return None
    name = pieces[number]
    mark = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [mark, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            mark,
            {"Sequence": {"id": "A", "type_id": 0}},
            mark,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
