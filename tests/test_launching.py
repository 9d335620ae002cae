"""Launch scripts: what is filled in is what was asked for, and what cannot work is refused before a queue sees it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import main
from bigtrain.configfile import shipped
from bigtrain.errors import UserError
from bigtrain.launching import SCRIPTS, directives, nodes_of, settings, template

CONFIG = """\
name = "job"
[model]
vocab_size = 64
layers = 4
width = 32
heads = 4
[data]
path = "data"
sequence_length = 32
[train]
steps = 5
global_batch = 48
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config and something that looks like its dataset."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").touch()
    (tmp_path / "job.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments, "--print"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments]) == 2
    return capsys.readouterr().err


def sbatch(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    found = dict(line.partition("=")[::2] for line in lines)
    assert len(found) == len(lines), "a directive comes twice"
    return found


def in_bash(script: str, show: str) -> list[str]:
    """What bash makes of the settings: `show` is words to print, one a line."""
    head = script.partition("# ------")[0]
    done = subprocess.run(
        ["bash", "-c", f"{head}\nprintf '%s\\n' {show}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", [*sorted(set(SCRIPTS.values()) - {"kubernetes.yaml"}), "torchrun.sh"])
def test_every_script_is_bash(name: str) -> None:
    path = shipped(f"launch/{name}")
    assert path is not None
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_slurm_script_is_filled_in(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(
        capsys,
        *(
            "slurm",
            "job.toml",
            "--nodes",
            "2-4",
            "--gpus-per-node",
            "4",
            "--time",
            "2:00:00",
            "--grace",
            "120",
        ),
        *("--sbatch", "partition=gpu", "--sbatch", "output=", "--cpus-per-rank", "3", "--restarts", "7"),
        *("--set", "layout.tensor=4", "--set", 'checkpoint.folder="a $HOME \\ b"', "--run-dir", "runs/a b"),
    )
    found = sbatch(script)
    assert found["nodes"] == "2-4"
    assert (found["ntasks-per-node"], found["gpus-per-node"], found["cpus-per-task"]) == ("4", "4", "3")
    assert (found["time"], found["signal"], found["partition"]) == ("2:00:00", "USR1@120", "gpu")
    assert "output" not in found
    assert "--wait=120" in script
    told = in_bash(script, '"$CONFIG" "$RUN" "$RESTARTS" "${OPTIONS[@]}"')
    assert told == [
        *("job.toml", "runs/a b", "7", "--set", "layout.tensor=4", "--set"),
        'checkpoint.folder="a $HOME \\ b"',
    ]


def test_torchrun_in_slurm_has_one_task_a_node(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "slurm", "job.toml", "--by", "torchrun", "--nodes", "2", "--gpus-per-node", "8")
    found = sbatch(script)
    assert (found["ntasks-per-node"], found["cpus-per-task"]) == ("1", "64")
    assert in_bash(script, '"$RANKS" "$GRACE"') == ["8", "300"]


def test_an_mpi_script_is_filled_in(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "mpi", "job.toml", "--hosts", "a:8,b:8")
    assert in_bash(script, '"$RANKS" "$HOSTS" "$CONFIG"') == ["16", "a:8,b:8", "job.toml"]
    assert "every host needs as many ranks" in refused(
        capsys, "mpi", "job.toml", "--hosts", "a:8,b:4", "--print"
    )


def test_a_kubernetes_manifest_is_filled_in(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = pytest.importorskip("yaml")
    script = printed(
        capsys,
        *(
            "kubernetes",
            "job.toml",
            "--nodes",
            "2",
            "--gpus-per-node",
            "4",
            "--image",
            "me/it:1",
            "--claim",
            "disk",
        ),
        *("--set", "layout.tensor=4", "--folder", "/data"),
    )
    service, job = yaml.safe_load_all(script)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert service["metadata"]["name"] == job["metadata"]["name"] == pod["subdomain"] == "job"
    assert service["spec"]["selector"] == {"job-name": "job"}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert (env["NODES"], env["RANKS"], env["HEAD"]) == ("2", "4", "job-0.job")
    assert env["TRAIN"] == "job.toml --run-dir runs/job --set layout.tensor=4"
    assert container["image"] == "me/it:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"] == "/data"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    assert "# launch:" not in script
    assert "--image and --claim" in refused(capsys, "kubernetes", "job.toml", "--nodes", "2")


def test_the_manifest_as_it_lies_there_is_valid_too() -> None:
    yaml = pytest.importorskip("yaml")
    assert len(list(yaml.safe_load_all(template("kubernetes", "srun")[1]))) == 2


def test_all_that_cannot_work_is_said_before_the_queue(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = refused(
        capsys,
        *("slurm", "job.toml", "--nodes", "1-3", "--gpus-per-node", "4"),
        *("--set", "layout.tensor=4", "--set", "layout.pipeline=3", "--set", "data.path=nowhere"),
    )
    assert "1 nodes x 4 = 4 ranks: layout: pipeline 3" in text
    assert "2 nodes x 4 = 8 ranks" in text
    assert "3 nodes" not in text, "12 ranks are what this layout needs"
    assert "nowhere is no dataset here" in text
    assert "nothing was submitted" in text
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch is not on this machine" in refused(capsys, "slurm", "job.toml")
    assert "mpirun is not on this machine" in refused(capsys, "mpi", "job.toml")
    assert not (here / "runs").exists()


def test_tensor_ranks_on_two_nodes_are_a_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "launch",
        "slurm",
        "job.toml",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--set",
        "layout.tensor=4",
    ]
    assert main([*arguments, "--print"]) == 0
    assert "over the network" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0", "x", "4-2", "2-", "1:2"])
def test_nodes_are_a_number_or_a_range(text: str) -> None:
    with pytest.raises(UserError, match="2-4"):
        nodes_of(text, 8)


def test_a_setting_that_the_script_has_not_is_a_bug_and_a_directive_is_added() -> None:
    script: Any = "#!/bin/bash\n#SBATCH --a=1\nX=1\n# ------\nX=2\n"
    with pytest.raises(AssertionError):
        settings(script, {"Y": "1"})
    assert settings(script, {"X": "it's"}) == "#!/bin/bash\n#SBATCH --a=1\nX='it'\"'\"'s'\n# ------\nX=2\n"
    assert directives(script, {"b": "2"}).splitlines()[1:3] == ["#SBATCH --a=1", "#SBATCH --b=2"]


def test_a_layout_that_the_ranks_choose_is_not_judged_before(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default layout could not hold 128 ranks over 48 sequences; one with tensor ranks can."""
    (here / "auto.toml").write_text('layout = "auto"\n' + CONFIG)
    assert "128 ranks" in refused(
        capsys, "slurm", "job.toml", "--nodes", "16", "--gpus-per-node", "8", "--print"
    )
    assert main(["launch", "slurm", "auto.toml", "--nodes", "16", "--gpus-per-node", "8", "--print"]) == 0
    told = capsys.readouterr().err
    assert (
        "layout auto: the ranks choose it when they start; `bigtrain plan CONFIG --gpus 128 --gpu KIND"
        in told
    )
    assert main(["inspect", "auto.toml", "--set", "data.path=elsewhere"]) == 0
    assert "auto: chosen when the ranks start" in capsys.readouterr().out
    assert main(["inspect", "auto.toml", "--schedule"]) == 2
    assert "there is no schedule yet" in capsys.readouterr().err


def test_doctor_looks_at_the_layout_that_its_ranks_would_choose(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "auto.toml").write_text('layout = "auto"\n' + CONFIG)
    main(["doctor", "auto.toml"])  # what else it finds depends on the machine
    assert "BAD layout" not in capsys.readouterr().out
