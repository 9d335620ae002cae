"""The shape of the repository: what would break users or tools silently."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_kernels_folder_is_no_package() -> None:
    # An __init__.py here would shadow, and on uninstall destroy, Hugging Face's package "kernels".
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "bigtrain_kernels" / "__init__.py").exists()


def test_torch_is_bound_so_that_pip_takes_a_tested_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.11,<2.14" in project["dependencies"]
    assert any(d.startswith("mpi4py") for d in project["optional-dependencies"]["mpi"])


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bigtrain.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'deepspeed', 'sentencepiece', 'matplotlib', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
