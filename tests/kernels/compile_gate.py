"""What Triton makes of the kernels for sm_90 (H100, H200), without a GPU: registers, spills, shared memory, SASS.

A case calls the launching code of a kernel on small CPU tensors; every launch inside is compiled with exactly the
arguments, block sizes and specialisations that a GPU would get, and is not run. So what is checked is what is shipped.

To add kernels, write tests/kernels/gate_<group>.py with `CASES`, a list of Case:

    def forward() -> None:
        x = torch.empty(64, 4096, dtype=torch.bfloat16)
        torch.ops.bigtrain.rms_norm(x, x[0], 1e-6)       # the op itself: the public function asks for a GPU

    CASES = [Case("rms_norm 4096", forward, needs={"rms_norm_forward": "LDG.E.128"})]

`needs` names each kernel that must be launched, with what its SASS must contain. tests/kernels/test_compile_gate.py
finds the file, and compiles the cases with quick=True; BIGTRAIN_COMPILE_ALL=1 all of them. By hand, a table:

    python -m tests.kernels.compile_gate [--all] [--sass FOLDER] GROUP...

Run in a process without TRITON_INTERPRET. Another version of Triton: put it on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHARED_BYTES = 232_448
"""What one block may use of an SM's shared memory on sm_90 (CUDA programming guide, technical specifications)."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[], object]
    needs: dict[str, str]
    quick: bool = True
    """Compiled in the default suite."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One compiled kernel."""

    kernel: str
    registers: int
    stack: int
    """Bytes a thread spills to local memory."""
    shared: int
    warps: int
    sass: str = dataclasses.field(repr=False)

    def count(self, instruction: str) -> int:
        """How often an instruction occurs; a prefix of its dotted name will do: "LDG.E.128", "HGMMA"."""
        return len(re.findall(rf"\s{re.escape(instruction)}(?=[.\s;])", self.sass))


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Build]]:
    """Inside, launches of Triton kernels are compiled for the given GPU and appended to the list, and do not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoGPU:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    builds: list[Build] = []
    run: Any = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        builds.append(inspect(self.fn.__name__, compiled))
        return compiled

    before, setting = driver._active, driver.set_active
    JITFunction.run = compile_only  # type: ignore[method-assign]
    setting(NoGPU())  # type: ignore[arg-type]
    try:
        yield builds
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before


def inspect(name: str, compiled: Any) -> Build:
    """Read a cubin with the tools of the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", file.name])
        sass = _output([tools / "nvdisasm", "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    meta = compiled.metadata
    return Build(name, int(found[1]), int(found[2]), meta.shared, meta.num_warps, sass)


def _output(command: list[Any]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(case: Case, builds: list[Build]) -> list[str]:
    """What is wrong with a case's kernels, in words; none when they may ship."""
    wrong = [f"{name} was not launched" for name in case.needs if name not in {b.kernel for b in builds}]
    for b in builds:
        if b.stack or b.count("STL") or b.count("LDL"):
            wrong.append(f"{b.kernel} spills {b.stack} bytes ({b.registers} registers, {b.warps} warps)")
        if b.shared > SHARED_BYTES:
            wrong.append(f"{b.kernel} takes {b.shared} bytes of shared memory, more than {SHARED_BYTES}")
        # Heads of 32 have 12 products at most, and Triton 3.7 waits for each whatever the blocks; 3.6 does not.
        products, waits = b.count("HGMMA"), b.count("WARPGROUP.DEPBAR")
        if products >= 16 and waits >= products // 2:
            wrong.append(f"{b.kernel} waits for each of its {products} products (ptxas's C7512)")
        if b.kernel in case.needs and not b.count(case.needs[b.kernel]):
            wrong.append(f"{b.kernel} has no {case.needs[b.kernel]}")
    return wrong


def cases(group: str) -> list[Case]:
    found: list[Case] = importlib.import_module(f"tests.kernels.gate_{group}").CASES
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--all", action="store_true", help="also the cases that the default suite leaves out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--sass", type=Path, help="write the SASS of every kernel here")
    options = parser.parse_args()
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    table = []
    for case in (c for group in options.groups for c in cases(group)):
        if options.only not in case.name or not (case.quick or options.all):
            continue
        started = time.monotonic()
        try:
            with compiling() as builds:
                case.launch()
            wrong = faults(case, builds)
        except Exception as e:  # a compiler may fail in any way; the other cases still count
            wrong = [f"does not compile: {type(e).__name__}: {str(e)[:2000]}"]
        table.append({"case": case.name, "faults": wrong, "kernels": len(builds)})
        print(
            f"{case.name}  ({time.monotonic() - started:.1f} s, Triton {triton.__version__})", file=sys.stderr
        )
        for b in builds:
            counted = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDG.E.128", "LDG", "STG.E.128", "STG", "MUFU")
            counts = " ".join(f"{name} {n}" for name in counted if (n := b.count(name)))
            print(
                f"    {b.kernel}: {b.registers} registers, {b.stack} B spilled, {b.shared} B shared, "
                f"{b.warps} warps; {counts}",
                file=sys.stderr,
            )
            if options.sass:
                options.sass.mkdir(parents=True, exist_ok=True)
                (options.sass / f"{case.name} {b.kernel}.sass".replace(" ", "-")).write_text(b.sass)
        for line in wrong:
            print(f"    WRONG: {line}", file=sys.stderr)
        sys.stderr.flush()
    print(json.dumps(table))
    return int(any(row["faults"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
