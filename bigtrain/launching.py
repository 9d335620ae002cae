"""`bigtrain launch`: fill in a script of launch/, refuse what cannot work, then submit or start it.

The scripts are complete and readable without this; filling in is what a person would do with an editor. The result is
kept as RUN/launch/<name>, so that a job can be submitted again by hand.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config import Config
from bigtrain.configfile import find_config, load_undecided, shipped
from bigtrain.data.cached import is_url
from bigtrain.errors import RunError, UserError
from bigtrain.grid import world_problems

SCRIPTS = {
    ("slurm", "srun"): "slurm-srun.sbatch",
    ("slurm", "torchrun"): "slurm-torchrun.sbatch",
    ("mpi", "srun"): "mpirun.sh",
    ("kubernetes", "srun"): "kubernetes.yaml",
}


@dataclass(frozen=True)
class Cluster:
    """What a job asks for."""

    least: int
    most: int
    """Nodes; a range when the job may start with fewer."""
    per_node: int
    """Ranks, one a GPU."""

    @property
    def nodes(self) -> str:
        """As SLURM and torchrun's users write it: "4" or "2-4"."""
        return str(self.most) if self.least == self.most else f"{self.least}-{self.most}"


def nodes_of(text: str, per_node: int) -> Cluster:
    """From "4" or "2-4". Raises UserError for anything else."""
    if (found := re.fullmatch(r"(\d+)(?:-(\d+))?", text)) and per_node > 0:
        least, most = int(found[1]), int(found[2] or found[1])
        if 1 <= least <= most:
            return Cluster(least, most, per_node)
    raise UserError(
        f"--nodes {text} with {per_node} ranks on each", where="launch", do="give --nodes 4 or --nodes 2-4"
    )


def check(config: Config, cluster: Cluster, *, submit: bool, undecided: bool = False) -> list[str]:
    """What works, but slowly, as sentences. Raises one UserError with all that cannot work.

    Every number of nodes of a range must work: the job may get any of them. A layout that is `undecided` is chosen
    when the ranks start, by their GPUs, which nobody knows here. A script that is only printed may be for
    another machine, so data that is missing here is a warning then.
    """
    problems: list[str] = []
    warnings: list[str] = []
    if undecided:
        plan = f"`bigtrain plan CONFIG --gpus {cluster.most * cluster.per_node} --gpu KIND --layout auto`"
        warnings.append(
            f"layout auto: the ranks choose it when they start; {plan} tells which, and whether one fits"
        )
    for nodes in () if undecided else range(cluster.least, cluster.most + 1):
        ranks = nodes * cluster.per_node
        where = f"{nodes} nodes x {cluster.per_node} = {ranks} ranks"
        problems += [f"{where}: {problem}" for problem in world_problems(config, ranks)]
    for source in config.data.corpora.values():
        files = Path(source.path) / "dataset.json", Path(f"{source.path}.idx")
        if not is_url(source.path) and not any(file.is_file() for file in files):
            (problems if submit else warnings).append(
                f"data: {source.path} is no dataset here; `bigtrain prepare` writes one"
            )
    if problems:
        word = "problem" if len(problems) == 1 else "problems"
        raise UserError(f"{len(problems)} {word}; nothing was submitted\n  " + "\n  ".join(problems))
    tensor = config.layout.tensor
    if cluster.most > 1 and cluster.per_node % tensor:
        warnings.append(
            f"layout.tensor {tensor} does not divide the {cluster.per_node} ranks of a node: its ranks talk in every "
            "layer, and some would over the network"
        )
    return warnings


def directives(script: str, values: Mapping[str, str]) -> str:
    """Set `#SBATCH --key=value` lines, adding those that the script has not; without a value a line goes."""
    for key, value in values.items():
        if not value:
            script = re.sub(rf"^#SBATCH --{re.escape(key)}=.*\n", "", script, flags=re.MULTILINE)
            continue
        line = f"#SBATCH --{key}={value}"
        script, found = _put_line(rf"#SBATCH --{re.escape(key)}=", line, script)
        if not found:
            last = script.rindex("\n#SBATCH ") + 1
            end = script.index("\n", last) + 1
            script = script[:end] + line + "\n" + script[end:]
    return script


def settings(script: str, values: Mapping[str, str | Sequence[str]]) -> str:
    """Set `NAME=value` lines above the line of dashes; a sequence becomes an array."""
    head, dashes, body = script.partition("# ------")
    for name, value in values.items():
        told = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        head, found = _put_line(f"{name}=", f"{name}={told}", head)
        assert found == 1, f"{name} is set {found} times in the script"
    return head + dashes + body


def _put_line(start: str, line: str, text: str) -> tuple[str, int]:
    """Replace the lines that begin with a pattern; how many there were."""
    return re.subn(f"^{start}.*$", line.replace("\\", r"\\"), text, flags=re.MULTILINE)


def marked(manifest: str, values: Mapping[str, str]) -> str:
    """Put values into the lines of a manifest that end in `# launch: NAME`: after the last ": " and its brackets.

    What is replaced is the scalar in front of the mark; closing brackets stay.
    """
    lines = []
    for line in manifest.splitlines():
        text, mark, name = line.partition("  # launch: ")
        if mark and name in values:
            start, scalar, rest = re.fullmatch(r"(.*: )([^{}]*?)(\}*)", text).groups()  # type: ignore[union-attr]
            quoted = values[name] if not scalar.startswith('"') else f'"{values[name]}"'
            text = start + quoted + rest
        lines.append(text)
    return "\n".join(lines) + "\n"


def template(kind: str, by: str) -> tuple[str, str]:
    """(name, text) of the script that launch/ has for a kind of cluster."""
    name = SCRIPTS[kind, by if kind == "slurm" else "srun"]
    path = shipped(f"launch/{name}")
    if path is None:
        raise RunError(f"launch/{name} did not come with this installation", do="install bigtrain again")
    return name, path.read_text()


def render(args: argparse.Namespace, config: Config, cluster: Cluster) -> tuple[str, str]:
    """(name, text) of the filled-in script."""
    name, text = template(args.kind, args.by)
    run = args.run_dir or f"runs/{config.name}"
    options = [part for item in args.overrides for part in ("--set", item)]
    common = {"PYTHON": args.python or sys.executable, "CONFIG": args.config, "RUN": run, "OPTIONS": options}
    ranks = cluster.most * cluster.per_node
    if args.kind == "slurm":
        text = settings(text, common | {"RESTARTS": str(args.restarts)})
        if args.by == "torchrun":
            text = settings(text, {"RANKS": str(cluster.per_node), "GRACE": str(args.grace)})
        else:
            text = text.replace("--wait=300", f"--wait={args.grace}")
        return name, directives(text, _sbatch(args, config, cluster, run))
    if args.kind == "mpi":
        own = {"RESTARTS": str(args.restarts), "RANKS": str(ranks), "GRACE": str(args.grace)}
        hosts = args.hosts or f"localhost:{cluster.per_node}"
        return name, settings(text, common | own | {"HOSTS": hosts})
    job = re.sub(r"[^a-z0-9-]+", "-", config.name.lower()).strip("-")
    values = {"name": job, "job-name": job, "HEAD": f"{job}-0.{job}", "RUN": run}
    values |= {"nodes": str(cluster.most), "NODES": str(cluster.most)}
    values |= {"gpus": str(cluster.per_node), "RANKS": str(cluster.per_node)}
    values |= {"image": args.image, "claim": args.claim, "folder": args.folder, "mount": args.folder}
    values |= {"TRAIN": shlex.join([args.config, "--run-dir", run, *options])}
    return name, marked(text, values)


def _sbatch(args: argparse.Namespace, config: Config, cluster: Cluster, run: str) -> dict[str, str]:
    per_task = args.cpus_per_rank * (cluster.per_node if args.by == "torchrun" else 1)
    found = {
        "job-name": config.name,
        "nodes": cluster.nodes,
        "ntasks-per-node": "1" if args.by == "torchrun" else str(cluster.per_node),
        "gpus-per-node": str(cluster.per_node),
        "cpus-per-task": str(per_task),
        "time": args.time,
        "signal": f"USR1@{args.grace}",
        "output": f"{run}/launch/slurm-%j.out",
    }
    for item in args.sbatch:
        key, _, value = item.partition("=")
        found[key.lstrip("-")] = value
    return found


def launch_command(args: argparse.Namespace) -> int:
    """Run the verb."""
    config, undecided = load_undecided(find_config(args.config), args.overrides)
    if args.kind == "mpi" and args.hosts:
        slots = [int(part.partition(":")[2] or 1) for part in args.hosts.split(",")]
        if len(set(slots)) != 1:
            raise UserError("every host needs as many ranks", where="--hosts", do="give a:8,b:8")
        cluster = Cluster(len(slots), len(slots), slots[0])
    else:
        cluster = nodes_of(args.nodes, args.gpus_per_node)
    if args.kind == "kubernetes" and not (args.image and args.claim):
        raise UserError(
            "an image and a volume are needed", where="launch kubernetes", do="give --image and --claim"
        )
    warnings = check(config, cluster, submit=not args.print, undecided=undecided)
    name, text = render(args, config, cluster)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.print:
        print(text, end="")
        return 0
    command = {"slurm": ["sbatch"], "mpi": ["bash"], "kubernetes": ["kubectl", "apply", "-f"]}[args.kind]
    if shutil.which(command[0]) is None or (args.kind == "mpi" and shutil.which("mpirun") is None):
        raise UserError(
            f"{command[0] if args.kind != 'mpi' else 'mpirun'} is not on this machine",
            do="run this where jobs are submitted, or --print the script and take it there",
        )
    script = Path(args.run_dir or f"runs/{config.name}") / "launch" / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    print(f"{shlex.join([*command, str(script)])}", flush=True)
    return subprocess.run([*command, str(script)], check=False).returncode
