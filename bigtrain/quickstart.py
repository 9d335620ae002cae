"""The whole way on text that every machine has: the source and documentation of its own Python."""

from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError

# No text to learn from: tables of numbers, other people's packages, tests (30 MB of repetition).
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "encodings",
    "lib2to3",
    "ensurepip",
}

_PROMPTS = ["def ", "class ", "import "]


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
    started = time.monotonic()
    config = load(find_config("quickstart"), [f"data.path={data}", *overrides])
    if not (Path(data) / "dataset.json").is_file():
        _prepare(config, data)
    print("\nBefore training, the model writes noise:", flush=True)
    _show_samples(_untrained(config, data), tokens=40)

    from bigtrain.train import train

    print(f"\nTraining {run} (Ctrl-C saves and stops; the same command goes on):", flush=True)
    code = train(config, run, fresh=False)
    if code:
        return code
    _report(config, Path(run), data, time.monotonic() - started)
    return 0


def _prepare(config: Config, data: str) -> None:
    from bigtrain.data.prepare import PrepareOptions
    from bigtrain.preparing import prepare_and_report

    print(f"Reading the Python {sys.version.split()[0]} library: source and documentation text", flush=True)
    options = PrepareOptions(
        inputs=python_text(),
        out=Path(data),
        tokenizer_kind="bpe",
        vocab_size=config.model.vocab_size,
        validation_fraction=0.03,
        tokenizer_sample_mb=10.0,
    )
    prepare_and_report(options)
