"""Small real tokenizers and corpora for the tests of the data path."""

# ruff: noqa: RUF001 - the odd characters are the point
from __future__ import annotations

import functools
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from bigtrain.data.manifest import TOKENIZER, write_manifest
from bigtrain.data.prepare import PrepareOptions
from bigtrain.data.shards import MAX_SEQUENCE, ShardWriter
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.vocabulary import Kind, train_tokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the warm sun.\n" * 3
CHINESE = "人工智能正在改变世界。我们用大量文本训练语言模型,然后让它继续写下去。北京的春天很短。\n" * 3
CODE = (
    'def add(first, second):\n    """Add two numbers."""\n    if first:\n        return first + second\n\n\n'
    * 3
)
HOSTILE = (
    "  two  spaces \t tab\r\nCRLF\r\r\n\n\n trailing   ",
    "</s> <s> <mask> <unk> <pad> <0x0A> \u2581 \u2581\u2581x ⁇ \u2047",
    "nul \0 bell \a escape \x1b bom \ufeff nbsp \xa0 line \u2028 zwj \u200d",
    "😀 👩‍👩‍👧‍👦 🇩🇪 é e\u0301 ﬁ ① Å ｆｕｌｌ",
    "\n", "\t", " ", "\r", "\u2581", "\0", "", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 שלום مرحبا 12345.678",
)  # fmt: skip


def texts() -> list[str]:
    """Varied enough for a vocabulary of 512, also of unigram, which drops what does not pay."""
    choose = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "or", "un")]
    words = ["".join(choose.choices(syllables, k=choose.randint(1, 4))) for _ in range(400)]
    numbered = [" ".join(choose.choices(words, k=200)) for _ in range(40)]
    numbered += [f"{ENGLISH}Line {i} of the story.\n{CODE}value_{i} = {i * 37}\n{CHINESE}" for i in range(40)]
    return [*numbered, *HOSTILE]


@functools.cache
def small_tokenizer(kind: Kind = "bpe") -> Tokenizer:
    """512 pieces; trained once in a test process."""
    folder = Path(tempfile.mkdtemp(prefix="bigtrain-test-"))
    return train_tokenizer(texts(), folder / TOKENIZER, kind=kind, vocab_size=512)


def random_documents(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids 5 .. 511 framed by BOS and EOS, of lengths 2 .. longest + 2."""
    rng = np.random.default_rng(seed)
    bodies = (rng.integers(5, 512, rng.integers(0, longest + 1)) for _ in range(count))
    return [np.concatenate([[1], body, [2]]).astype(np.int32) for body in bodies]


def write_corpus(
    folder: Path,
    documents: list[np.ndarray],
    *,
    shards: int = 1,
    split: str = "train",
    max_sequence: int = MAX_SEQUENCE,
) -> Path:
    """A prepared folder that holds the documents in `shards` shards of one split."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer()
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    infos = []
    for number, group in enumerate(np.array_split(np.arange(len(documents)), shards)):
        writer = ShardWriter(folder / f"{split}-{number:05d}", tokenizer, max_sequence=max_sequence)
        for i in group:
            writer.add(documents[i], text_bytes=len(documents[i]), source=f"document {i}")
        infos.append(writer.close())
    write_manifest(folder, tokenizer, {split: infos}, request={}, summary={})
    return folder


def preparing(script: Path, options: PrepareOptions, before: str = "pass") -> list[str]:
    """The command of a process that prepares; it imports little, for its workers import it again."""
    script.write_text(
        "import resource, signal\n"
        "from pathlib import PosixPath\n"
        "from bigtrain.data.filters import Filters\n"
        "from bigtrain.data.prepare import PrepareOptions, prepare\n"
        "if __name__ == '__main__':\n"
        f"    {before}\n"
        f"    prepare({options!r})\n"
    )
    return [sys.executable, str(script)]
