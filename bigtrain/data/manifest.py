"""dataset.json: everything needed to open a prepared corpus, so that ten thousand shards open by one read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bigtrain import __version__
from bigtrain.data.files import write_whole
from bigtrain.data.shards import ShardInfo, tokenizer_facts
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT = "bigtrain dataset 1"
NAME = "dataset.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class Manifest:
    """A finished corpus folder."""

    tokenizer: Mapping[str, Any]
    """sha256, vocab_size, bos_id, eos_id and how a document is framed."""
    splits: Mapping[str, Sequence[ShardInfo]]
    """Shards in reading order, by split."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for: two runs with the same request make the same corpus."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Counters of the preparation, among them everything skipped."""

    @property
    def digest(self) -> str:
        """sha256 over the tokens' checksums and the tokenizer: equal digests mean equal token streams."""
        shards = {
            name: [(s.tokens, s.dtype, s.crc32) for s in shards] for name, shards in self.splits.items()
        }
        masks = {name: [s.mask_crc32 for s in shards] for name, shards in self.splits.items()}
        masked = any(crc is not None for crcs in masks.values() for crc in crcs)
        parts = [self.tokenizer["sha256"], shards, *([masks] if masked else [])]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Sequence[ShardInfo]],
    *,
    request: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> Manifest:
    """Write dataset.json, which makes the folder a corpus. RunError if the disk is full."""
    manifest = Manifest(tokenizer_facts(tokenizer), splits, request, summary)
    content = {
        "format": FORMAT,
        "tool": f"bigtrain {__version__}",
        "digest": manifest.digest,
        "tokenizer": {"file": TOKENIZER, **manifest.tokenizer},
        "totals": {name: totals(shards) for name, shards in splits.items()},
        "splits": {name: [asdict(s) for s in shards] for name, shards in splits.items()},
        "request": request,
        "summary": summary,
    }
    write_whole(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return manifest


def totals(shards: Sequence[ShardInfo]) -> dict[str, int]:
    """Shards, documents, tokens and text bytes of a split."""
    return {
        "shards": len(shards),
        "documents": sum(s.documents for s in shards),
        "tokens": sum(s.tokens for s in shards),
        "text_bytes": sum(s.text_bytes for s in shards),
    }


def read_manifest(folder: Path) -> Manifest:
    """Read dataset.json. UserError if the folder is no finished corpus or the file was changed."""
    path = folder / NAME
    advice = f"run `bigtrain prepare INPUTS --out {folder}`"
    if not path.exists():
        found = "the folder does not exist" if not folder.exists() else f"there is no {NAME} in it"
        raise UserError(f"not a prepared corpus: {found}", where=str(folder), do=advice)
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(f"has format {content['format']!r}, not {FORMAT!r}", where=str(path), do=advice)
        splits = {name: [_shard(s) for s in shards] for name, shards in content["splits"].items()}
        manifest = Manifest(content["tokenizer"], splits, content["request"], content["summary"])
        unchanged = manifest.digest == content["digest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot be read as a corpus manifest ({error})", where=str(path), do=advice
        ) from error
    if not unchanged:
        raise UserError("was changed by hand: it does not match its digest", where=str(path), do=advice)
    return manifest


def _shard(values: Mapping[str, Any]) -> ShardInfo:
    known = {f.name: values[f.name] for f in fields(ShardInfo) if f.name in values or f.default is MISSING}
    return ShardInfo(**{**known, "crc32": tuple(known["crc32"])})
