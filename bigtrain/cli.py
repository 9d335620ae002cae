"""The verbs. Heavy imports happen inside the verb that needs them, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bigtrain import __version__
from bigtrain.errors import BigtrainError, UserError

_Raw = argparse.RawDescriptionHelpFormatter
if TYPE_CHECKING:
    from bigtrain.config import Config

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
the usual way through:
  bigtrain prepare my_texts/ --out data/mine --vocab-size 2048
  bigtrain train quickstart --run-dir runs/mine --set data.path=data/mine
  bigtrain train quickstart --run-dir runs/mine --set data.path=data/mine      (the same command resumes)
  bigtrain evaluate runs/mine
  bigtrain generate runs/mine --prompt "Once upon a time"

on several processes:  torchrun --nproc-per-node 2 -m bigtrain train CONFIG
every verb explains itself:  bigtrain train --help
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigtrain",
        description="Train large language models: raw text and a cluster in, a trained transformer out.",
        epilog=_EPILOG,
        formatter_class=_Raw,
    )
    parser.add_argument("--version", action="version", version=f"bigtrain {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        *(_add_prepare, _add_pack, _add_data, _add_plan, _add_train, _add_launch, _add_generate),
        *(_add_evaluate, _add_inspect, _add_doctor, _add_top, _add_report, _add_export, _add_import),
        _add_quickstart,
    ):
        add(verbs)
    return parser


def _add_prepare(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "prepare",
        help="raw text -> tokenizer and token shards",
        formatter_class=_Raw,
        description="Read text, train a SentencePiece tokenizer (or take one), write token shards.",
        epilog="""\
inputs: .txt .md, source files, .jsonl .parquet (one document a row), each also .gz or .zst; folders are
searched recursively; quote globs ("corpus/**/*.jsonl.gz"). Any language in UTF-8.
The result is one folder: tokenizer.model, train-*.bin/.idx, validation-*.bin/.idx, dataset.json.
The shards are in Megatron's format. Everything that was skipped is counted and reported.
They are the same for any number of workers; interrupted, the same command goes on with what is not done.
On several machines: mpirun -n 64 bigtrain prepare ... (mpi4py; every rank must see the inputs and --out).

examples:
  bigtrain prepare books/ --out data/books --vocab-size 16000
  bigtrain prepare "dump/*.jsonl.zst" --out data/dump --tokenizer data/books/tokenizer.model""",
    )
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--tokenizer", help="use this SentencePiece .model instead of training one")
    p.add_argument("--tokenizer-kind", choices=["bpe", "unigram"], default="bpe")
    p.add_argument("--vocab-size", type=int, default=8000, help="pieces to train (default 8000)")
    p.add_argument("--no-byte-fallback", action="store_true", help="map unknown characters to <unk>")
    p.add_argument("--tokenizer-sample-mb", type=float, default=50.0, help="text to train the tokenizer on")
    p.add_argument("--validation-fraction", type=float, default=0.01, help="share of documents held out")
    p.add_argument("--text-key", default="text", help="field with the text in .jsonl and .parquet")
    p.add_argument(
        "--dedup",
        choices=["none", "exact", "near"],
        default="none",
        help="leave out texts that came before, or nearly (MinHash)",
    )
    p.add_argument(
        "--dedup-threshold",
        type=float,
        default=0.8,
        metavar="J",
        help="near: Jaccard index from which on (default 0.8)",
    )
    p.add_argument(
        "--quality",
        action="store_true",
        help="leave out what repeats itself, is too short, or is no text in any language",
    )
    p.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a limit: min_chars, max_chars, max_repeated_lines, max_symbols, min_compressed, max_compressed",
    )
    p.add_argument(
        "--chat-key", default="", metavar="KEY", help="JSON lines hold conversations: [{role, content}, ...]"
    )
    p.add_argument(
        "--prompt-key", default="", metavar="KEY", help="JSON lines hold a prompt and a response ..."
    )
    p.add_argument("--response-key", default="", metavar="KEY", help="... only responses are learned")
    p.add_argument(
        "--chat-template",
        default="",
        metavar="NAME",
        help="none, plain, chatml, or a TOML file: before and after in [system], [user], [assistant]",
    )
    p.add_argument("--bad-utf8", choices=["replace", "skip", "fail"], default="replace")
    p.add_argument("--max-bad", type=float, default=0.1, help="give up above this share of malformed lines")
    p.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="files or folders to leave out"
    )
    p.add_argument("--seed", type=int, default=1, help="decides the order of the documents")
    p.add_argument("--overwrite", action="store_true", help="replace an existing dataset in --out")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    p.add_argument(
        "--encoder",
        choices=["sentencepiece", "auto", "kitoken", "gigatoken"],
        default="sentencepiece",
        help="auto: the fastest installed one that gives the same ids on a sample of the text",
    )
    p.add_argument(
        "--unit-mb",
        type=float,
        default=0.0,
        help="input that a worker takes at a time (default: by the size)",
    )
    p.set_defaults(run_verb=_prepare)


def _add_pack(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "pack",
        help="put whole documents together into sequences, for data.packing = best_fit",
        formatter_class=_Raw,
        description="Pack the documents of a prepared corpus by best fit: only those longer than a sequence are cut,\n"
        'and hardly any padding is needed. Writes a file beside each shard; train with data.packing = "best_fit".',
        epilog="example:\n  bigtrain pack data/books --sequence-length 4096",
    )
    p.add_argument("corpus", metavar="CORPUS", help="a folder that bigtrain prepare wrote")
    p.add_argument("--sequence-length", type=int, required=True, metavar="S", help="tokens in a sequence")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    p.set_defaults(run_verb=_pack)


def _add_plan(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "plan",
        help="memory, time, cost and the best layout on a cluster, before paying for it",
        formatter_class=_Raw,
        description="Plan a run without a GPU: what a config takes on a cluster, or which config a budget is best\n"
        "spent on. Estimates come with the interval that should hold the truth.",
        epilog="""\
examples:
  bigtrain plan llama-8b --gpus 64 --gpu h100                       memory, speed, days
  bigtrain plan llama-8b --gpus 1024 --gpu h100 --layout auto --tokens 2T --price 2.5
  bigtrain plan --budget 5000gpuh --gpu h100 --out mine.toml        model, data, rate, batch and layout as a config
  bigtrain plan llama-70b --gpus 512 --gpu h200 --pictures plots/   memory, pipeline and scaling as PNGs
  bigtrain plan llama-405b --gpus 16384 --dry-run                   run the real code with fake tensors, compare
  bigtrain plan --calibrate runs/a runs/b --out measured.toml       compare finished runs with their plans, then
  bigtrain plan llama-8b --gpus 64 --layout auto --calibration measured.toml  corrected, by shape where one ran it

Amounts: 2T, 15e12, 500B; 5000gpuh, 20000usd (with --price). Leaves with 1 when the layout does not fit the card.""",
    )
    p.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML file, or a shipped config by name")
    _set_argument(p, "change one key: --set layout.tensor=8 (repeatable)")
    p.add_argument("--gpus", type=_count, help="how many GPUs")
    p.add_argument("--gpu", default="h100", help="which (default h100)")
    p.add_argument("--network", metavar="NAME", help="between nodes (default: the usual one of the GPU)")
    p.add_argument("--hardware", metavar="FILE", help="TOML with more GPUs and networks")
    p.add_argument("--layout", choices=["config", "auto"], default="config", help="auto: search all layouts")
    p.add_argument("--tokens", metavar="N", help="train on so many tokens instead of the config's")
    p.add_argument("--price", metavar="P", help="of one GPU-hour")
    p.add_argument(
        "--budget", metavar="AMOUNT", help="propose the best config for it; a CONFIG fixes model and data"
    )
    p.add_argument("--out", metavar="FILE", help="with --budget, --calibrate: the file to write")
    p.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    p.add_argument("--pictures", metavar="DIR", help="draw memory, pipeline and scaling into a folder")
    p.add_argument(
        "--dry-run", action="store_true", help="execute a step's real code with fake tensors; compare"
    )
    p.add_argument(
        "--calibrate",
        nargs="+",
        metavar="RUN",
        help="compare finished runs with their plans, store what they say",
    )
    p.add_argument(
        "--calibration", metavar="FILE", help="correct times, bytes and the search by what --calibrate stored"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_verb=_plan)


def _count(text: str) -> int:
    """A number of GPUs, at least 1."""
    number = int(text.replace(",", "").replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _set_argument(p: argparse.ArgumentParser, meaning: str) -> None:
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=meaning)


def _config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="CONFIG", help="a TOML file, or a shipped config by name (quickstart)")
    _set_argument(p, "change one key: --set optim.lr=1e-3 (repeatable)")


def _add_train(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "train",
        help="train a model; the same command resumes",
        formatter_class=_Raw,
        description="Train the model that a config describes. If the run directory holds checkpoints, go on.",
        epilog="""\
examples:
  bigtrain train quickstart --dry                       what would be run, with everything derived
  bigtrain train quickstart --set train.steps=50
  bigtrain train lstm --lr-find                         which learning rate? draws the curve
  torchrun --nproc-per-node 4 -m bigtrain train llama-340m --set layout.zero=2
  torchrun --nproc-per-node 8 -m bigtrain train llama-8b --set layout.tensor=4 --set layout.pipeline=2

RUN/ then holds config.toml, provenance.json, metrics.jsonl, checkpoints/, logs/, tensorboard/, outcome.json.
Ctrl-C or TERM saves and stops; a second one leaves at once (of several processes, when it comes 5 s later). At the
start ranks wait for each other for 10 minutes (BIGTRAIN_MEET_MINUTES), then say which did not come.""",
    )
    _config_arguments(p)
    # Not --run: torchrun reads its script's options too and takes that for its own --run-path.
    p.add_argument("--run-dir", help="run directory (default runs/NAME)")
    p.add_argument(
        "--fresh", action="store_true", help="start over; a former run is moved aside, not deleted"
    )
    p.add_argument("--dry", action="store_true", help="print the resolved config and what follows from it")
    p.add_argument("--lr-find", action="store_true", help="learning-rate range test: rise until it diverges")
    p.set_defaults(run_verb=_train)


def _add_launch(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "launch",
        help="fill in and submit a job: SLURM, Open MPI, Kubernetes",
        formatter_class=_Raw,
        description="Fill in a script of launch/ for this config and cluster, check that the layout fits the nodes and"
        "\n"
        "that the data is there, then submit it. The run resumes by itself after a preemption or a restart.",
        epilog="""\
examples:
  bigtrain launch slurm llama-8b --nodes 4 --gpus-per-node 8 --set layout.tensor=4 --print
  bigtrain launch slurm llama-1b --nodes 2-4 --gpus-per-node 8 --by torchrun --sbatch partition=gpu --sbatch account=me
  bigtrain launch mpi llama-1b --hosts a:8,b:8
  bigtrain launch kubernetes llama-1b --nodes 4 --gpus-per-node 8 --image you/bigtrain:1 --claim work --print
one machine without a queue: launch/torchrun.sh CONFIG""",
    )
    p.add_argument("kind", choices=["slurm", "mpi", "kubernetes"])
    _config_arguments(p)
    p.add_argument("--run-dir", help="run directory, on a disk that all nodes see (default runs/NAME)")
    p.add_argument("--nodes", default="1", help="4, or 2-4: start with what there is")
    p.add_argument("--gpus-per-node", type=int, default=8, help="one rank each (default 8)")
    p.add_argument("--by", choices=["srun", "torchrun"], default="srun", help="slurm: who starts the ranks")
    p.add_argument("--hosts", default="", help="mpi: HOST:RANKS,... (default: this machine)")
    p.add_argument("--time", default="24:00:00", help="slurm: time limit (default 24:00:00)")
    p.add_argument("--grace", type=int, default=300, help="seconds for the last save (default 300)")
    p.add_argument("--restarts", type=int, default=3, help="after failures, without the queue (default 3)")
    p.add_argument("--cpus-per-rank", type=int, default=8, help="slurm (default 8)")
    p.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any #SBATCH line, or none with KEY= (repeatable)",
    )
    p.add_argument("--image", default="", help="kubernetes: container image")
    p.add_argument("--claim", default="", help="kubernetes: volume claim with data and runs")
    p.add_argument("--folder", default="/work", help="kubernetes: where it is mounted (default /work)")
    p.add_argument("--python", default="", help="interpreter on the nodes (default: this one)")
    p.add_argument("--print", action="store_true", help="print the script and submit nothing")
    p.set_defaults(run_verb=_launch)


def _launch(args: argparse.Namespace) -> int:
    from bigtrain.launching import launch_command

    return launch_command(args)


def _add_generate(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "generate",
        help="let a trained model write",
        formatter_class=_Raw,
        description="Continue prompts with a trained model (KV cache, any number of prompts at once).",
        epilog="""\
examples:
  bigtrain generate runs/quickstart --prompt "def main():"
  bigtrain generate runs/quickstart --samples 3 --temperature 0.8 --top-p 0.95
  bigtrain generate runs/quickstart/checkpoints/step_00000500 --prompt "import" --temperature 0""",
    )
    p.add_argument("model", metavar="RUN", help="run directory, or one checkpoint in it")
    p.add_argument("--prompt", action="append", default=[], help="text to continue (repeatable)")
    p.add_argument("--prompt-file", help="a file with one prompt (- for standard input)")
    p.add_argument("--samples", type=int, default=1, help="continuations for each prompt")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    p.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest (0: all)")
    p.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest that sum to p")
    p.add_argument("--stop", action="append", default=[], help="end before this text (repeatable)")
    p.add_argument("--seed", type=int, default=1)
    p.set_defaults(run_verb=_generate)


def _add_evaluate(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "evaluate",
        help="held-out loss, perplexity, bits per byte",
        formatter_class=_Raw,
        description="Evaluate a trained model on its held-out split, or on a prepared dataset's.",
        epilog="example:\n  bigtrain evaluate runs/quickstart --sequences 500",
    )
    p.add_argument("model", metavar="RUN", help="run directory, or one checkpoint in it")
    p.add_argument("--data", help="dataset folder (default: the run's own)")
    p.add_argument("--split", choices=["validation", "train"], default="validation")
    p.add_argument("--sequences", type=int, default=0, help="sequences to read (default: all)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(run_verb=_evaluate)


def _add_data(verbs: Verbs) -> None:
    p = verbs.add_parser("data", help="what a step of training reads", formatter_class=_Raw)
    p = p.add_subparsers(dest="what", required=True, metavar="WHAT").add_parser(
        "show",
        help="the documents of any global batch",
        formatter_class=_Raw,
        description="Print the documents that a step reads, also of a step far ahead: the order of the samples is a\n"
        "formula, so nothing is read but these documents.",
        epilog="""\
examples:
  bigtrain data show llama-8b --step 120000
  bigtrain data show runs/mine --step 4711 --text 200       a run: also knows what its rollbacks left out
  bigtrain data show mine.toml --sample 77 --sample 78 --json

A step or a run that met bad samples goes on without them with --set data.skip='[[77, 78]]'.""",
    )
    p.add_argument(
        "config", metavar="CONFIG", help="a run directory, a TOML file, or a shipped config by name"
    )
    _set_argument(p, "change one key: --set data.skip='[[0, 7]]' (repeatable)")
    p.add_argument(
        "--step", type=int, metavar="N", help="what optimizer step N (from 1, as metrics count) reads"
    )
    p.add_argument(
        "--sample", type=int, action="append", default=[], metavar="G", help="one sample (repeatable)"
    )
    p.add_argument(
        "--text", type=int, default=60, metavar="N", help="characters of each document (default 60)"
    )
    p.add_argument("--json", action="store_true", help="one JSON object a sample")
    p.set_defaults(run_verb=_data)


def _add_inspect(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "inspect",
        help="explain a run, a checkpoint, a dataset, a shard or a config",
        formatter_class=_Raw,
        description="Say what a path is and what is in it: parameters, FLOPs, tokens, disk, health.",
        epilog="""\
examples:
  bigtrain inspect llama-8b                    a config: parameters, FLOPs a token, memory of the states
  bigtrain inspect llama-8b --schedule --set layout.pipeline=4      its pipeline as a picture
  bigtrain inspect data/books                  a dataset; data/books/train-00000.bin: one shard
  bigtrain inspect runs/quickstart             a run: where it stands, checkpoints, last metrics
  bigtrain inspect runs/quickstart --verify    also read every byte and compare checksums
  bigtrain inspect s3://bucket/run/step_00001000                    one checkpoint, wherever it lies
  bigtrain inspect runs/a runs/b               what differs between two checkpoints (of a run: the newest)

Leaves with 0 when all is sound and, of two, equal (the layout they were written in may differ), else with 1.""",
    )
    p.add_argument("path", metavar="PATH", help="run, checkpoint, dataset, shard, tokenizer or config")
    p.add_argument("other", nargs="?", metavar="OTHER", help="a checkpoint or run to compare the first with")
    p.add_argument("--verify", action="store_true", help="compare all checksums")
    p.add_argument("--json", action="store_true", help="of a checkpoint, a run's, or two: print JSON")
    p.add_argument(
        "--schedule",
        action="store_true",
        help="of a config: draw its pipeline's timeline, who computes what when, and the bubble",
    )
    p.add_argument("--ranks", type=int, help="with --schedule: ranks of the run (default: data = 1)")
    p.add_argument("--out", help="with --schedule: the picture (default NAME-schedule.png)")
    _set_argument(p, "of a config: change one key")
    p.set_defaults(run_verb=_inspect)


def _add_doctor(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "doctor",
        help="check this machine, or the whole cluster, before a run",
        formatter_class=_Raw,
        description="Check versions, GPUs, limits, environment, disks and free space; started by a launcher, on every\n"
        "machine, with the network's speed along each axis of the layout. Leaves with 1 when something is bad.",
        epilog="""\
examples:
  bigtrain doctor
  bigtrain doctor llama-1b --run-dir /scratch/runs/mine
  srun bigtrain doctor llama-8b --set layout.tensor=8
  torchrun --nproc-per-node 8 -m bigtrain doctor llama-8b""",
    )
    p.add_argument(
        "config", nargs="?", metavar="CONFIG", help="check for this run: its layout, data, checkpoints"
    )
    p.add_argument("--run-dir", metavar="RUN", help="where it will write (default runs/NAME)")
    p.add_argument(
        "--wait", type=float, default=5.0, metavar="MINUTES", help="for the other ranks (default 5)"
    )
    _set_argument(p, "as for train")
    p.set_defaults(run_verb=_doctor)


def _add_top(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "top",
        help="watch a run in the terminal, live or after the fact",
        formatter_class=_Raw,
        description="Draw a run on one screen and keep it up to date: state, steps, time left, loss, speed, events.\n"
        "It only reads the run directory: start it on any machine that sees it, as often as you like.",
        epilog="""\
q or Ctrl-C leaves. A run directory that is not there yet is waited for.

examples:
  bigtrain top runs/quickstart
  bigtrain top runs/quickstart --once              one screen, as plain text when piped""",
    )
    p.add_argument("run", metavar="RUN", help="run directory")
    p.add_argument(
        "--once", action="store_true", help="print one screen and leave (so it is without a terminal)"
    )
    p.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between looks (default 1)")
    p.set_defaults(run_verb=_top)


def _add_report(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "report",
        help="one HTML page and pictures about a run, or several compared",
        formatter_class=_Raw,
        description="Write one self-contained HTML page and a PNG of each chart: losses, learning rate, gradient norm,"
        "\n"
        "throughput, MFU, memory, events, configuration, provenance. Several runs are laid over each other.",
        epilog="""\
The page loads nothing from anywhere: mail it, or open it from the disk. Runs of any length make a small page.

examples:
  bigtrain report runs/quickstart                  writes runs/quickstart/report/index.html
  bigtrain report runs/a runs/b --out a-and-b.html""",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    p.add_argument(
        "--out", metavar="DIR_OR_HTML", help="folder, or page (default RUN/report; of several: report)"
    )
    p.add_argument(
        "--by",
        choices=["step", "tokens", "hours"],
        help="what the curves are drawn over (default: step; tokens when the runs' steps differ in tokens)",
    )
    p.set_defaults(run_verb=_report)


def _add_export(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "export",
        help="write a trained model as a Hugging Face directory",
        formatter_class=_Raw,
        description="Write safetensors, config.json and tokenizer files that transformers loads as they are, and\n"
        "compare its logits with the run's before saying done.",
        epilog="""\
Llama, Mistral, Qwen2, Qwen3 and GPT-2 are written; a model that is exactly none of these is refused, with every
difference. The weights are streamed from the checkpoint; the comparison holds one model in fp32 at a time.

examples:
  bigtrain export runs/quickstart --to exported/quickstart
  bigtrain export runs/quickstart/checkpoints/step_00000500 --to exported/step500 --dtype fp32""",
    )
    p.add_argument("model", metavar="RUN", help="run directory, or one checkpoint in it")
    p.add_argument("--to", required=True, metavar="DIR", help="folder to write, or a URL (s3://...)")
    p.add_argument(
        "--dtype", choices=["bf16", "fp32", "fp16"], default="bf16", help="of the weights (default bf16)"
    )
    p.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="most GB (10^9 bytes) of one file (default 5)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR")
    p.add_argument(
        "--no-compare",
        action="store_true",
        help="do not run the model: only read every tensor back, bit for bit",
    )
    p.set_defaults(run_verb=_export)


def _add_import(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "import",
        help="a config that trains on from a Hugging Face model or a distributed checkpoint",
        formatter_class=_Raw,
        description="Derive [model] from a directory of weights, check every tensor, and write a config whose\n"
        "train.init_from is that directory. `bigtrain train` then reads it, in any layout.",
        epilog="""\
DIR is a Hugging Face model (config.json and safetensors; Llama, Mistral, Qwen2, Qwen3 or GPT-2) or a
torch.distributed.checkpoint (.metadata), whose model --config must describe. Pickled weights (pytorch_model.bin)
are refused. DIR is neither copied nor changed: keep it until the run has saved its first checkpoint.

examples:
  bigtrain import exported/quickstart --data data/mine
  bigtrain import downloads/Qwen3-0.6B --out qwen.toml
  bigtrain import old_run/dcp --config llama-1b --out continued.toml""",
    )
    p.add_argument("folder", metavar="DIR", help="folder or URL with the weights")
    p.add_argument(
        "--out", metavar="CONFIG.toml", help="config to write (default NAME.toml after DIR's name)"
    )
    p.add_argument("--data", help="dataset folder to train on (default: data/NAME, to be prepared)")
    p.add_argument("--config", help="take everything but train.init_from from this config, [model] too")
    p.add_argument("--overwrite", action="store_true", help="replace the config that is there")
    p.set_defaults(run_verb=_import)


def _add_quickstart(verbs: Verbs) -> None:
    p = verbs.add_parser(
        "quickstart",
        help="the whole way on this Python's own source text, in a few minutes",
        formatter_class=_Raw,
        description="Tokenizer, shards, training, samples before and after, loss curve: on the source and\n"
        "documentation text of the Python installation that runs this. No download.",
    )
    p.add_argument("--out", default="runs/quickstart", help="run directory (default runs/quickstart)")
    p.add_argument("--data", default="data/quickstart", help="dataset folder (default data/quickstart)")
    _set_argument(p, "as for train")
    p.set_defaults(run_verb=_quickstart)


def _prepare(args: argparse.Namespace) -> int:
    from bigtrain.preparing import prepare_command

    return prepare_command(args)


def _plan(args: argparse.Namespace) -> int:
    from bigtrain.plan.planning import plan_command

    return plan_command(args)


def _train(args: argparse.Namespace) -> int:
    from bigtrain.configfile import find_config, load
    from bigtrain.place import discover

    place = discover()

    def choose_layout(config: Config) -> Config:
        from bigtrain.plan.auto import choose

        chosen, note = choose(config, place, Path(args.run_dir or f"runs/{config.name}"), fresh=args.fresh)
        if place.rank == 0:
            print(note, flush=True)
        return chosen

    config = load(find_config(args.config), args.overrides, auto=choose_layout)
    if args.dry:
        from bigtrain.explain import explain_config

        print(explain_config(config, full=True))
        return 0
    if args.lr_find:
        from bigtrain.lr_find import lr_find

        return lr_find(config, args.run_dir or f"runs/{config.name}")
    from bigtrain.grid import grid_of

    # torch warns of every lost connection with a C++ stack; who was lost is said in one line. Errors still show.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    grid_of(config, place.world)  # a layout that cannot be is refused before torch is imported (5 s)
    from bigtrain.train import train

    return train(config, args.run_dir or f"runs/{config.name}", fresh=args.fresh)


def _generate(args: argparse.Namespace) -> int:
    from bigtrain.generating import generate_command

    return generate_command(args)


def _evaluate(args: argparse.Namespace) -> int:
    from bigtrain.evaluate import evaluate_command

    return evaluate_command(args)


def _pack(args: argparse.Namespace) -> int:
    from bigtrain.preparing import pack_command

    return pack_command(args)


def _data(args: argparse.Namespace) -> int:
    from bigtrain.showing import data_command

    return data_command(args)


def _inspect(args: argparse.Namespace) -> int:
    from bigtrain.explain import explain, explain_checkpoints, explain_difference, explain_pipeline

    if args.schedule:
        print(explain_pipeline(args.path, args.overrides, ranks=args.ranks, out=args.out))
        return 0
    if args.other:
        text, sound = explain_difference(args.path, args.other, as_json=args.json)
    elif args.json:
        text, sound = explain_checkpoints(args.path, verify=args.verify)
    else:
        text, sound = explain(args.path, verify=args.verify, overrides=args.overrides)
    print(text)
    return 0 if sound else 1


def _doctor(args: argparse.Namespace) -> int:
    from bigtrain.doctor import doctor_command

    return doctor_command(args)


def _top(args: argparse.Namespace) -> int:
    from bigtrain.top import top_command

    return top_command(args)


def _report(args: argparse.Namespace) -> int:
    from bigtrain.report import report_command

    return report_command(args)


def _export(args: argparse.Namespace) -> int:
    from bigtrain.exporting import export_command

    return export_command(args)


def _import(args: argparse.Namespace) -> int:
    from bigtrain.importing import import_command

    return import_command(args)


def _quickstart(args: argparse.Namespace) -> int:
    from bigtrain.quickstart import quickstart

    return quickstart(run=args.out, data=args.data, overrides=args.overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 the run failed, 2 the user's input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run_verb(args))
    except BigtrainError as e:
        if os.environ.get("BIGTRAIN_TRACEBACK"):
            raise
        rank = os.environ.get("RANK")
        prefix = f"[rank {rank}] " if rank not in (None, "0") else ""
        word = "error" if isinstance(e, UserError) else "run failed"
        print(f"{prefix}bigtrain {args.verb}: {word}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `bigtrain inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def script() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(main())
