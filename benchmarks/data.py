"""Speed of the data path beside its peers: encoding, parallel preparation, loading, and opening 10^12 tokens.

python benchmarks/data.py [--mb 150] [--repeats 3] [--only encode scaling loader open] [--out FILE]

The text is real: Python sources and documentation of the interpreter and of installed packages, as JSON lines. Rates of
one core are CPU time; walls of two workers need a quiet machine. Peers that are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.overhead import machine
from bigtrain.data.corpus import Corpus
from bigtrain.data.documents import ReadOptions
from bigtrain.data.encoders import use
from bigtrain.data.loader import Loader
from bigtrain.data.manifest import NAME, TOKENIZER, write_manifest
from bigtrain.data.prepare import PrepareOptions, prepare
from bigtrain.data.samples import Samples
from bigtrain.data.shards import BLOCK, ShardInfo
from bigtrain.data.sources import find_sources
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.unit_work import do_unit
from bigtrain.data.units import units_of
from bigtrain.data.vocabulary import train_tokenizer
from bigtrain.data.work import Work

VOCABULARY = 32_000
SEQUENCE, ROWS = 4096, 8
TRILLION = 10**12
SHARDS = 4096


def text_files() -> Iterator[Path]:
    """Sources and documentation that every Python installation has."""
    for key in ("stdlib", "purelib"):
        folder = Path(sysconfig.get_path(key))
        yield from (
            f for f in sorted(folder.rglob("*")) if f.suffix in (".py", ".rst", ".md", ".txt") and f.is_file()
        )


def gather(folder: Path, megabytes: float) -> list[str]:
    """Documents of together so much UTF-8, each once, also written as four files of JSON lines."""
    documents: list[str] = []
    seen: set[int] = set()
    size = 0
    for file in text_files():
        if file.stat().st_size > 10**6:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 200 or hash(text) in seen:
            continue
        seen.add(hash(text))
        documents.append(text)
        size += len(text.encode())
        if size > megabytes * 1e6:
            break
    for part in range(4):
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents[part::4])
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return documents


def cpu(function: Callable[[], Any]) -> float:
    """CPU seconds of this process, threads included."""
    before = time.process_time()
    function()
    return time.process_time() - before


def medians(
    rates: dict[str, Callable[[], float]], amount: float, repeats: int, unit: str = "mb_per_s"
) -> dict[str, dict[str, Any]]:
    """`amount` a second of each, taken in turns so that a slow spell of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(repeats):
        for name, function in rates.items():
            seconds[name].append(function())
    found = {}
    for name, values in seconds.items():
        rate = [amount / s for s in values]
        found[name] = {
            unit: round(statistics.median(rate), 2),
            "lowest": round(min(rate), 2),
            "highest": round(max(rate), 2),
        }
    return found


def ours(raw: Path, out: Path, model: Path, encoder: Any) -> float:
    """One worker's CPU time from files to shards on the disk: reading, JSON, encoding, shuffling, writing."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(model, out / TOKENIZER)
    tokenizer = Tokenizer.load(out)
    use(tokenizer, encoder)
    (unit,) = units_of(find_sources([raw]).sources, 10**12)
    work = Work(out, "", 1, ReadOptions(), 0.01, 2**30, 64.0, 1)
    return cpu(lambda: do_unit(work, unit, tokenizer, 1))


def hugging_face(documents: Sequence[str]) -> Callable[[], float] | None:
    """A byte-level BPE of the same size, one thread."""
    try:
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        return None
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)  # type: ignore[call-arg]
    made.train_from_iterator(documents[:: max(1, len(documents) // 1500)], trainer)
    return lambda: cpu(lambda: made.encode_batch(list(documents)))


def encode(
    documents: Sequence[str], raw: Path, model: Path, megabytes: float, repeats: int
) -> dict[str, Any]:
    """MB/s of one core."""
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    out = raw.parent / "encoded"
    rates = {
        "bigtrain prepare, sentencepiece": lambda: ours(raw, out, model, "sentencepiece"),
        "sentencepiece alone, whole documents": lambda: cpu(
            lambda: plain.encode(list(documents), num_threads=1)
        ),
    }
    for name in ("kitoken", "gigatoken"):
        try:
            use(Tokenizer.load(model), name)  # type: ignore[arg-type]
        except Exception:
            continue
        rates[f"bigtrain prepare, {name}"] = lambda name=name: ours(raw, out, model, name)  # type: ignore[misc]
    if peer := hugging_face(documents):
        rates["tokenizers, byte-level BPE"] = peer
    return medians(rates, megabytes, repeats)


_PLAIN: dict[str, Any] = {}


def _begin(model: bytes) -> None:
    import sentencepiece

    _PLAIN["sp"] = sentencepiece.SentencePieceProcessor(model_proto=model)


def _ids(line: str) -> list[int]:
    return [*_PLAIN["sp"].encode(json.loads(line)["text"], num_threads=1), 2]


def pool(raw: Path, model: Path, workers: int) -> float:
    """Wall of the way that Megatron-LM prepares: lists of ids from a pool of processes, one writer."""
    began = time.perf_counter()
    processes = multiprocessing.get_context("spawn").Pool(workers, _begin, (model.read_bytes(),))
    with processes, (raw.parent / "pool.bin").open("wb") as out:
        for file in sorted(raw.glob("*.jsonl")):
            with file.open(encoding="utf-8") as lines:
                for ids in processes.imap(_ids, lines, 32):
                    out.write(np.array(ids, np.uint16).tobytes())
    return time.perf_counter() - began


_PROGRAM = """
import sys, time
from pathlib import Path
from bigtrain.data.prepare import PrepareOptions, prepare
if __name__ == "__main__":
    raw, out, model, workers = sys.argv[1:]
    began = time.perf_counter()
    prepare(PrepareOptions((raw,), Path(out), tokenizer=Path(model), workers=int(workers), unit_mb=1, overwrite=True))
    print(time.perf_counter() - began)
"""


def started(raw: Path, model: Path, workers: int, core: int) -> subprocess.Popen[str]:
    """A `bigtrain prepare`; one worker stays on `core`."""
    script, out = raw.parent / "script.py", raw.parent / f"prepared{core}"
    script.write_text(_PROGRAM)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(script), str(raw), str(out), str(model), str(workers)]
    if workers == 1:
        command = ["taskset", "-c", str(core), *command]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def prepared(raw: Path, model: Path, workers: int) -> float:
    """Wall of one preparation."""
    return float(started(raw, model, workers, 0).communicate()[0])


def apart(raw: Path, model: Path) -> float:
    """Wall of two preparations of everything at once, each on a core of its own, for one: what the machine allows."""
    both = [started(raw, model, 1, core) for core in (0, 1)]
    return max(float(each.communicate()[0]) for each in both) / 2


def scaling(raw: Path, model: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Walls of 1 and 2 workers, of two that know nothing of each other, and of a pool."""
    found = medians(
        {
            "bigtrain prepare, 1 worker": lambda: prepared(raw, model, 1),
            "bigtrain prepare, 2 workers": lambda: prepared(raw, model, 2),
            "two separate preparations, together": lambda: apart(raw, model),
            "pool of 2 and one writer": lambda: pool(raw, model, 2),
        },
        megabytes,
        repeats,
    )
    one, two, most = (found[name]["mb_per_s"] for name in list(found)[:3])
    return {
        **found,
        "2 workers over 1": round(two / one, 2),
        "two separate ones over 1": round(most / one, 2),
    }


def loader(raw: Path, model: Path, repeats: int) -> dict[str, Any]:
    """Tokens/s of one core from shards in the page cache to batches of tensors, in million."""
    import torch

    torch.set_num_threads(1)
    folder = raw.parent / "loaded"
    prepare(PrepareOptions((str(raw),), folder, tokenizer=model, workers=1, overwrite=True))
    corpus = Corpus.open(folder)
    made = Loader(Samples.single(corpus, SEQUENCE, 1), seed=1)
    batches = max(20, min(200, corpus.num_tokens // (SEQUENCE * ROWS)))
    flat = np.memmap(next(folder.glob("train-*.bin")), np.uint16, "r")
    rng = np.random.default_rng(0)

    def read() -> None:
        for step in range(batches):
            made.batch(range(step * ROWS, (step + 1) * ROWS))

    def plain() -> None:
        for _ in range(batches):
            starts = rng.integers(0, len(flat) - SEQUENCE - 1, ROWS)
            rows = torch.from_numpy(np.stack([flat[s : s + SEQUENCE + 1].astype(np.int64) for s in starts]))
            rows[:, :-1].contiguous()
            rows[:, 1:].contiguous()

    rates = {"bigtrain Loader": lambda: cpu(read), "plain memmap loop": lambda: cpu(plain)}
    if peer := megatron(folder, batches):
        rates["megatron-core GPTDataset"] = peer
    tokens = batches * ROWS * SEQUENCE / 1e6
    return medians(rates, tokens, repeats, "mtokens_per_s")


def megatron(folder: Path, batches: int) -> Callable[[], float] | None:
    """The same number of samples from megatron-core, its index built before the clock starts."""
    warnings.simplefilter("ignore")
    try:
        import torch
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    except ImportError:
        return None

    class Stub:
        """What the dataset asks of a tokenizer."""

        eod, pad, vocab_size, unique_identifiers = 2, 3, VOCABULARY, ("stub",)

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=([str(folder / "train-00000")], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=Stub(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        mmap_bin_files=True,
    )
    prefix = str(folder / "train-00000")
    indexed = IndexedDataset(prefix)
    count = batches * ROWS
    made = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), count, Split.train, config)

    def read() -> None:
        for step in range(batches):
            rows = [made[step * ROWS + i] for i in range(ROWS)]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                torch.stack([row[key] for row in rows])

    return lambda: cpu(read)


def open_trillion(folder: Path, model: Path) -> dict[str, Any]:
    """Seconds and memory, over an interpreter with the same imports, to the first batch of 10^12 tokens (sparse)."""
    folder.mkdir()
    shutil.copy(model, folder / TOKENIZER)
    each = TRILLION // SHARDS + 1
    infos = []
    for n in range(SHARDS):
        name = f"train-{n:05d}"
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(2 * each)
        zeros = (0,) * -(-2 * each // BLOCK)
        infos.append(
            ShardInfo(
                name, "uint16", each, each // 800, 4 * each, 31_999, 9999, 2 * each, zeros, 34, 0, "a", "b"
            )
        )
    write_manifest(folder, Tokenizer.load(model), {"train": infos}, request={}, summary={})
    program = (
        "import sys, time, resource\nfrom bigtrain.data.corpus import Corpus\nfrom bigtrain.data.loader import Loader\n"
        "from bigtrain.data.samples import Samples\n"
        "def rss():\n    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20\n"
        "base = rss()\nbegan = time.perf_counter()\n"
        f"loader = Loader(Samples.single(Corpus.open(sys.argv[1]), {SEQUENCE}, 1), seed=1)\n"
        f"loader.batch(range({ROWS}))\nseconds = time.perf_counter() - began\n"
        "print(seconds, rss() - base, loader.corpus.num_tokens)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    values = [[float(v) for v in run.stdout.split()] for run in runs]
    return {
        "tokens": int(values[0][2]),
        "shards": SHARDS,
        "seconds": round(statistics.median(v[0] for v in values), 3),
        "megabytes": round(statistics.median(v[1] for v in values), 1),
        "manifest_megabytes": round((folder / NAME).stat().st_size / 1e6, 1),
    }


def main() -> None:
    """Run what is asked for and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=150.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["encode", "scaling", "loader", "open"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bigtrain-data-") as temporary:
        folder = Path(temporary)
        (raw := folder / "raw").mkdir()
        documents = gather(raw, args.mb)
        megabytes = sum(len(text.encode()) for text in documents) / 1e6
        model = folder / "model" / TOKENIZER
        model.parent.mkdir()
        train_tokenizer(
            documents[:: max(1, len(documents) // 1500)], model, kind="bpe", vocab_size=VOCABULARY
        )
        found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
        found |= {
            "date": date.today().isoformat(),
            "machine": machine(),
            "python": platform.python_version(),
            "text": f"{megabytes:.1f} MB, {len(documents):,} files: sources and texts of Python and its packages",
            "vocabulary": VOCABULARY,
        }
        if "encode" in args.only:
            found["encode"] = encode(documents, raw, model, megabytes, args.repeats)
        if "scaling" in args.only:
            found["scaling"] = scaling(raw, model, megabytes, args.repeats)
        if "loader" in args.only:
            found["loader"] = loader(raw, model, args.repeats)
        if "open" in args.only:
            found["open"] = open_trillion(folder / "trillion", model)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
