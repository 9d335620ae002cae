"""The whole way on text that every machine has: the source and documentation of its own Python."""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError

if TYPE_CHECKING:
    from bigtrain.pretrained import Pretrained

# No text to learn from: tables of numbers, other people's packages, tests (30 MB of repetition).
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "encodings", "lib2to3", "ensurepip"}

_PROMPTS = ["def read(self, ", "class Reader(", "for line in "]


def python_text() -> list[str]:
    """Files and folders of the standard library: source, docstrings, pydoc's topics and the licence.

    Raises UserError when this Python was installed without its source.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = [str(p) for p in sorted(library.iterdir()) if p.name not in _SKIPPED and _is_text(p)]
    if not any(name.endswith(".py") for name in found):
        raise UserError(
            "this Python was installed without its source files",
            where=str(library),
            do="train on your own text: bigtrain prepare FOLDER --out data/mine",
        )
    return found


def _is_text(path: Path) -> bool:
    return path.suffix in (".py", ".txt") if path.is_file() else any(path.rglob("*.py"))


def quickstart(*, run: str, data: str, overrides: list[str]) -> int:
    """Prepare, sample, train, sample again; then say what happened and where everything lies."""
    settings = [f"data.path={data}", *overrides]
    config = load(find_config("quickstart"), settings)
    data = config.data.first_path  # --set data.path wins over --data
    _prepare(config, data)
    print("\n== Before training the model writes noise ==", flush=True)
    before = _samples(_untrained(config, data), tokens=30)
    print(before)

    from bigtrain.train import train

    print("\n== Training (Ctrl-C saves and stops; the same command goes on) ==", flush=True)
    code = train(config, run, began=time.time())
    outcome = json.loads((Path(run) / "outcome.json").read_text())
    if code or outcome["state"] != "done":
        return code
    _report(Path(run), data, before, settings)
    return 0


def _prepare(config: Config, data: str) -> None:
    from bigtrain.data.prepare import PrepareOptions
    from bigtrain.preparing import prepare_and_report

    print(f"== The source and documentation text of Python {sys.version.split()[0]} ==", flush=True)
    prepare_and_report(
        PrepareOptions(
            inputs=tuple(python_text()),
            out=Path(data),
            exclude=("test", "tests", "idle_test"),
            vocab_size=config.model.vocab_size,
            validation_fraction=0.03,
            tokenizer_sample_mb=10.0,
        )
    )


def _untrained(config: Config, data: str) -> Pretrained:
    from bigtrain.data.corpus import Corpus
    from bigtrain.data.tokenizer import Tokenizer
    from bigtrain.model.build import build_model
    from bigtrain.pretrained import Pretrained

    model = build_model(config.model, config.loss, seed=config.train.seed).eval()
    return Pretrained(model, Tokenizer.load(Corpus.open(data).tokenizer_path), config, Path(data), [])


def _samples(model: Pretrained, *, tokens: int) -> str:
    """What the model makes of each prompt, one after the other."""
    from bigtrain.generating import write_text

    texts = write_text(model, _PROMPTS, max_new_tokens=tokens, temperature=0.6, top_p=0.9)
    return "\n".join(
        f"--- {prompt!r} goes on as\n{prompt}{text.rstrip()}"
        for prompt, text in zip(_PROMPTS, texts, strict=True)
    )


def _report(run: Path, data: str, before: str, settings: list[str]) -> None:
    """Samples, held-out figures from first to last, the loss curve, what to do next."""
    from bigtrain.console import summary
    from bigtrain.plots import loss_curve
    from bigtrain.pretrained import open_model

    after = _samples(open_model(run), tokens=120)
    print(f"\n== After training ==\n{after}")
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "before.txt").write_text(before + "\n", encoding="utf-8")
    (run / "samples" / "after.txt").write_text(after + "\n", encoding="utf-8")
    loss_curve([run], run / "plots" / "loss.png", title="quickstart")
    sets = " ".join(f"--set {setting}" for setting in settings)
    print(f"\n== What happened ==\n{summary(run)}")
    print(
        f"\n== Go on ==\n"
        f"train longer     bigtrain train quickstart --run-dir {run} {sets} --set train.steps=6000\n"
        f"let it write     bigtrain generate {run} --prompt 'def parse('\n"
        f"your own text    bigtrain prepare FOLDER --out data/mine --vocab-size 2048\n"
        f"                 bigtrain train quickstart --run-dir runs/mine --set data.path=data/mine"
    )
