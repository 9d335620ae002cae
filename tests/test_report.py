"""`bigtrain report`: one page that loads nothing, shows everything and trusts nobody's text; and pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import main
from bigtrain.errors import UserError
from bigtrain.metrics import EventRecord, to_json
from bigtrain.report import report
from bigtrain.reporting.watched import Watched
from bigtrain.top import screen
from tests.watching_parts import START, evaluation, make_run, record, rename, write_log

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's elements, checked for closing in order; its text; whatever could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.loads += [
            f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")
        ]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not (self.open and self.open[-1] == "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(*runs: Path, out: Path, **options: object) -> tuple[Page, str]:
    paths = report(runs, out, **options)  # type: ignore[arg-type]
    text = paths[0].read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Preempted after step 30, gone on from 20 to the end, one step skipped, one warning on two ranks."""
    path = make_run(tmp_path / "run", last=30, end="preempted", reason="SIGUSR1", skip=[7])
    make_run(path, first=21, last=60)
    for rank in (0, 1):
        write_log(path, 2, rank, "2026-11-25 01:55:02,000 WARNING bigtrain.sinks: the disk is slow")
    return path


def test_a_page_tells_everything_about_a_run(resumed: Path, tmp_path: Path) -> None:
    page, _ = made(resumed, out=tmp_path / "out")
    assert len(page.ids) == len(set(page.ids))
    for key in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes"):
        assert key in page.ids, f"a chart of {key}"
    for text in (
        "demo done", "steps 60 of 60", "final training loss 2.0500", "best held-out loss 2.1500 (step 60)",
        "bits per byte 0.7167", "tokens/s, median 32", "MFU, median 40.0%", "memory, rank 0 3.00 GiB",
        "time in steps 2m00s", "skipped steps 1", "attempts 2", "preempted after step 30: SIGUSR1",
        "attempt 2 goes on after step 20 with 1 rank", "1 steps skipped (not finite, or a spike): 7",
        "the disk is slow (on 2 ranks)", "ranks 1", "ZeRO level 1", "precision fp32", "torch", "train.seed 1",
        "Every step is drawn.", "resumed", "step skipped",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") == 6
    assert "NaN" not in page.scripts[0]


def test_a_page_tells_of_spikes_rollbacks_and_stragglers(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=60, skip=[7, 9])
    happened = {
        7: ("spike", "step 7: spike, loss 9.0000 (+12.0z); the update is skipped (samples 48 to 55)"),
        9: (
            "not finite",
            "step 9: the loss or gradient was not finite; the update is skipped (samples 64 to 71)",
        ),
        20: ("rollback", "step 22: spike; samples 160 to 175 are left out from now on"),
        40: ("straggler", "rank 1 on node7 is slow: 1.31 x the median step"),
    }
    with (path / "metrics.jsonl").open("a") as f:
        for step, (name, text) in happened.items():
            f.write(to_json(EventRecord(step, name, text, {}, START + 3600 + step)))
        f.write('{"kind": "event", "step": 50, "name": "spike", "time": null}\n')  # no text: left out
    write_log(path, 1, 0, f"2026-11-25 01:55:02,000 INFO bigtrain: {happened[7][1]}")
    page, html = made(path, out=tmp_path / "out")
    for _, text in happened.values():
        assert text in page.text
    rows = [row for row in html.split("<tr>") if "spike, loss 9.0000" in row]
    assert len(rows) == 1, "an event that the log tells too is one event"
    run = Watched(path)
    run.look()
    screen_text = "\n".join(line.plain for line in screen(run, 120, 40, now=START + 7200))
    assert "rank 1 on node7 is slow" in screen_text


def test_a_page_loads_nothing_and_runs_nothing_but_its_script(resumed: Path, tmp_path: Path) -> None:
    page, text = made(resumed, out=tmp_path / "out")
    assert page.loads == []
    assert page.handlers == []
    assert not re.search(r"url\(|@import|https?:", text.lower())
    data, script = page.scripts
    json.loads(data)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


def test_text_from_a_run_directory_is_only_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>&\"'$x^{"
    path = make_run(folder, end="failed", reason=HOSTILE)
    rename(path, HOSTILE)
    write_log(path, 1, 0, f"2026-11-25 01:55:02,000 WARNING x: {HOSTILE} https://me:sesame@host/")
    provenance = json.loads((path / "provenance.json").read_text())
    provenance["attempts"][-1] |= {
        "command": f"bigtrain {HOSTILE} --wandb_api_key=sesame", "host": HOSTILE, "hosts": [HOSTILE], "world": HOSTILE,
        "git": {"commit": HOSTILE}, "hardware": {HOSTILE: HOSTILE}, "versions": [HOSTILE], "changed": [HOSTILE],
    }  # fmt: skip
    (path / "provenance.json").write_text(json.dumps(provenance))
    with (path / "metrics.jsonl").open("a") as f:
        f.write(
            json.dumps({"kind": HOSTILE, "step": 5})
            + "\n"
            + json.dumps({"kind": "step", "step": 61, "loss": HOSTILE})
        )
    other = make_run(tmp_path / "other")
    for runs in ((path,), (path, other)):
        page, text = made(*runs, out=tmp_path / "out")
        assert page.tags.count("script") == 2
        assert "img" not in page.tags
        assert "b" not in page.tags or len(runs) == 2
        assert page.handlers == []
        assert "alert(1)" in page.text, "it is shown"
        assert "sesame" not in text


@pytest.mark.parametrize("field", ["attempts", "outcome", "records"])
def test_wrong_types_in_the_files_make_no_traceback(tmp_path: Path, field: str) -> None:
    path = make_run(tmp_path / "run")
    if field == "attempts":
        (path / "provenance.json").write_text(
            '{"attempts": [{}, {"started": 3, "ended": [], "hosts": 1}, 7, {"world": {}}]}'
        )
    elif field == "outcome":
        (path / "outcome.json").write_text('{"state": ["x"], "step": "y", "time": {}, "reason": 3}')
    else:
        (path / "metrics.jsonl").write_text(
            '{"kind": "step", "step": 1, "loss": {}, "seconds": "x", "time": [], "tokens": "many", "lr": true}\n'
            '{"kind": "step", "step": 9007199254740990, "loss": 1e308, "grad_norm": -1e308, "lr": 1e-320}\n'
            '{"kind": "eval", "step": 9007199254740990, "loss": 1e-320, "time": 1e300}\n'
        )
    made(path, out=tmp_path / "out")
    assert main(["top", str(path), "--once"]) == 0


def test_a_run_without_a_step(tmp_path: Path) -> None:
    page, _ = made(make_run(tmp_path / "run", last=0, end=None, evaluate_every=0), out=tmp_path / "out")
    assert "No step is recorded yet." in page.text
    assert "svg" not in page.tags
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.html"]


def test_a_single_step_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    page, _ = made(make_run(tmp_path / "one", last=1), out=tmp_path / "out")
    assert page.tags.count("svg") == 6
    page, _ = made(
        make_run(tmp_path / "nan", last=9, skip=range(1, 10), evaluate_every=0), out=tmp_path / "nan-out"
    )
    assert "loss" not in page.ids
    assert "lr" in page.ids


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a" / "run", settings=["optim.lr=1e-3"])
    b = make_run(tmp_path / "b" / "run", last=40, settings=["optim.lr=2e-3", "layout.zero=2"], end="failed")
    page, _ = made(a, b, out=tmp_path / "both.html")
    assert "2 runs: a/run, b/run" in page.text
    assert "optim.lr 0.001 0.002" in page.text
    assert "layout.zero 1 2" in page.text
    assert "steps 60 of 60 40 of 60" in page.text
    near = f"{(2 + 3 / 39 + 2 + 3 / 40) / 2:.4f}"  # 38 is 5 % before 40
    assert f"training loss near step 40 {near} {near}" in page.text
    lines = json.loads(page.scripts[0])["charts"][0]["lines"]
    assert [line["label"] for line in lines] == [
        "a/run: training",
        "a/run: held out",
        "b/run: training",
        "b/run: held out",
    ]
    assert [line["colour"] for line in lines] == [0, 0, 1, 1]
    assert (tmp_path / "both-loss.png").exists()
    page, _ = made(a, a, out=tmp_path / "same.html")
    assert "The configurations are the same." in page.text


def test_more_runs_than_colours_are_told_apart_by_dashes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, text = made(*[run] * 9, out=tmp_path / "out")
    assert len(set(re.findall(r'class="(smooth c\d(?: d\d)?)"', text))) == 9


def test_a_long_run_makes_a_small_page_and_keeps_its_spike(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=1)
    with (path / "metrics.jsonl").open("a") as f:
        for step in range(2, 60_001):
            f.write(to_json(record(step, loss=30.0 if step == 41_234 else 2 + 3 / step + step % 7 / 50)))
            if step % 20 == 0:
                f.write(to_json(evaluation(step)))
    page, text = made(path, out=tmp_path / "out", by="tokens")
    assert len(text) < 250_000
    assert "each point is the mean of 256 successive steps" in page.text
    assert "Every 16th of 3,001." in page.text
    line = json.loads(page.scripts[0])["charts"][0]["lines"][0]
    assert len(line["x"]) <= 400
    assert max(line["high"]) == 30.0
    assert line["x"][line["high"].index(30.0)] == pytest.approx(41_234 * 64, abs=256 * 64)


def test_pictures_are_pngs_of_every_chart(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = make_run(tmp_path / "run$x^{")
    paths = report([path], None)
    assert paths[0] == path / "report" / "index.html"
    names = [p.stem for p in paths[1:]]
    assert names == ["loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "overview"]
    for picture in paths[1:]:
        pixels = imread(picture)
        assert pixels.shape[0] > 500
        assert pixels.std() > 0.02, "it is not blank"


def test_the_verb_says_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(a), str(b), "--by", "hours"]) == 0
    assert re.match(r"report/index\.html \(\d+ kB\) and 7 pictures beside it", capsys.readouterr().out)
    assert "hours of training" in (tmp_path / "report" / "index.html").read_text()


def test_what_is_no_run_is_said_all_at_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", last=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        report([tmp_path / "x", tmp_path / "a", tmp_path / "file"], tmp_path / "out")
    assert "2 of 3 are no runs" in str(caught.value)
    assert str(tmp_path / "x") in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be written"):
        report([tmp_path / "a"], tmp_path / "file" / "page.html")


def on_gpus(run: Path) -> Path:
    """Let a run say that it ran on 8 H100."""
    path = run / "provenance.json"
    told = json.loads(path.read_text())
    told["attempts"][-1] |= {"world": 8, "hosts": ["node0"], "hardware": {"gpu": "NVIDIA H100 80GB HBM3"}}
    path.write_text(json.dumps(told))
    return run


def test_a_run_on_known_gpus_is_shown_beside_its_plan(tmp_path: Path) -> None:
    run = on_gpus(make_run(tmp_path / "run", settings=["layout.pipeline=2", "train.global_batch=8"]))
    text = report([run], tmp_path / "out")[0].read_text()
    page = Page(text)
    assert page.loads == [load for load in page.loads if load.startswith("src=data:image/png;base64,")]
    assert len(page.loads) == 3, "memory, timeline, scaling"
    assert all(base64.b64decode(load.partition(",")[2]).startswith(b"\x89PNG") for load in page.loads)
    assert "img-src data:;" in page.policy


def test_a_run_on_cpus_has_no_plan(tmp_path: Path) -> None:
    text = report([make_run(tmp_path / "run")], tmp_path / "out")[0].read_text()
    assert "<img" not in text


# In a browser


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Open a page in Chromium with an empty profile and no network; returns what it printed, both streams."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(
            "NO BROWSER: install chromium (apt-get install chromium) to test the report's page in one"
        )

    def run(page: Path, *flags: str, place: str = "") -> str:
        profile = tmp_path_factory.mktemp("profile")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-dev-shm-usage", "--hide-scrollbars",
            "--run-all-compositor-stages-before-draw", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, page.resolve().as_uri() + place,
        ]  # fmt: skip
        environment = {**os.environ, "HOME": str(profile)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert said == [], "no error and no refused request on the page's console"
        return done.stdout

    return run


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def test_the_script_runs_and_shows_values(resumed: Path, tmp_path: Path, browse: Callable[..., str]) -> None:
    rename(resumed, HOSTILE)
    (page, *_) = report([resumed], tmp_path / "out")
    still = browse(page, "--dump-dom")
    assert 'data-script="ran"' in still
    assert 'class="tip"' not in still
    pointed = browse(page, "--dump-dom", place="#loss=41")
    tip = re.search(r'<div class="tip".*?</div></div>', pointed, re.DOTALL)
    assert tip is not None
    said = re.sub("<[^>]*>", " ", tip[0])
    assert "step 41" in said
    assert "training 2.0732" in said
    assert "held out 2.175" in said
    assert pointed.count('class="cross"') == 6, "a hairline in every chart"


def test_without_scripts_the_page_looks_the_same(
    resumed: Path, tmp_path: Path, browse: Callable[..., str]
) -> None:
    (page, *_) = report([resumed], tmp_path / "out")
    silent = page.with_name("silent.html")
    silent.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    with_script, without = tmp_path / "a.png", tmp_path / "b.png"
    for _ in range(4):  # on a busy machine Chromium may take its picture of a page that is half painted
        browse(page, f"--screenshot={with_script}", "--window-size=1000,1400")
        browse(silent, f"--screenshot={without}", "--window-size=1000,1400")
        if same := bool((pixels(with_script) == pixels(without)).all()):
            break
    assert same
    assert pixels(without).std() > 0.05, "it is not blank"


def test_dark_mode_and_a_phone(resumed: Path, tmp_path: Path, browse: Callable[..., str]) -> None:
    (page, *_) = report([resumed, resumed], tmp_path / "out")
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    browse(page, f"--screenshot={light}", "--window-size=900,900", "--blink-settings=preferredColorScheme=1")
    browse(page, f"--screenshot={dark}", "--window-size=900,900", "--blink-settings=preferredColorScheme=0")
    assert pixels(light).mean() > 0.8
    assert pixels(dark).mean() < 0.3
    # Nothing but tables, which scroll by themselves, is wider than a phone: the script of the test measures it.
    probe = tmp_path / "phone.html"
    probe.write_text(
        f'<!doctype html><iframe src="{page.name}" style="width:360px;height:4000px;border:0"></iframe>'
        '<script>onload=()=>{const d=document.querySelector("iframe").contentDocument.documentElement;'
        'document.title=d.scrollWidth+" of "+d.clientWidth}</script>'
    )
    probe = probe.rename(page.parent / "phone.html")
    dom = browse(probe, "--dump-dom", "--allow-file-access-from-files")
    assert "<title>360 of 360</title>" in dom
