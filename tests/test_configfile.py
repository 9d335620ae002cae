"""TOML and --set: all problems at once, each with its place and a suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config import Config, LayoutConfig
from bigtrain.configfile import find_config, load, render
from bigtrain.errors import UserError

GOOD = """\
name = "x"
[model]
vocab_size = 100
layers = 2
width = 64
heads = 4
[data]
path = "d"
sequence_length = 128
[train]
steps = 10
global_batch = 8
[optim]
lr = 1e-3
warmup_steps = 3
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_problem_is_reported_at_once_with_file_line_and_suggestion(tmp_path: Path) -> None:
    bad = GOOD.replace("warmup", "warmpu").replace("width = 64", "width = 65").replace("= 1e-3", '= "fast"')
    path = written(tmp_path, bad)
    with pytest.raises(UserError) as caught:
        load(path, ["train.stepz=3", "layout.zero=4"])
    text = str(caught.value)
    assert "5 problems" in text
    assert f"{path}:15: unknown key optim.warmpu_steps; did you mean optim.warmup_steps?" in text
    assert f"{path}:14: optim.lr must be a valid number, not 'fast'" in text
    assert "model.heads: width 65 is not a multiple of heads 4" in text
    assert "--set: unknown key train.stepz; did you mean train.steps?" in text
    assert "--set: layout.zero must be 0, 1, 2 or 3, not 4" in text


def test_a_key_of_another_section_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.lr; did you mean optim\.lr\?"):
        load(written(tmp_path, GOOD), ["train.lr=1e-3"])


def test_missing_keys_say_what_they_mean(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data is required"):
        load(written(tmp_path, GOOD.split("[data]")[0] + "[train]\nsteps = 1\nglobal_batch = 1\n"))
    with pytest.raises(UserError, match=r"model\.layers is required: Transformer blocks"):
        load(written(tmp_path, GOOD.replace("layers = 2\n", "")))


def test_overrides_parse_toml_values_bare_words_and_none(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    config = load(
        path,
        [
            "optim.kind=sgd",
            "optim.lr=3e-2",
            "data.document_mask=false",
            "train.tokens=9999",
            "train.steps=none",
            "name=new-name",
        ],
    )
    assert (config.optim.kind, config.optim.lr, config.data.document_mask) == ("sgd", 3e-2, False)
    assert (config.train.tokens, config.train.steps, config.name) == (9999, None, "new-name")
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load(path, ["optim.lr"])
    with pytest.raises(UserError, match="is a value, not a section"):
        load(path, ["name.x=1"])


def test_render_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        written(tmp_path, GOOD),
        ['model.rope_scaling={kind="llama3",factor=8.0}', 'log.wandb=my "quoted" project ü'],
    )
    again = load(written(tmp_path, render(config)))
    assert again == config


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"name = ", "not valid TOML"), (b'name = "\xff"', "is not UTF-8")],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(path)


def test_shipped_configs_are_found_by_name_and_near_misses_suggested() -> None:
    assert find_config("quickstart").name == "quickstart.toml"
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_config("quikstart")
    with pytest.raises(UserError, match="no config file"):
        find_config("nowhere/else.toml")


def test_a_layout_may_be_chosen_later(tmp_path: Path) -> None:
    """`layout = "auto"` in the file or by --set: the caller chooses, or the default layout stands."""

    def chooses(config: Config) -> Config:
        assert config.layout == LayoutConfig()
        return config.model_copy(update={"layout": config.layout.model_copy(update={"zero": 2})})

    path = written(tmp_path, 'layout = "auto"\n' + GOOD)
    assert load(path).layout == LayoutConfig()
    assert load(path, auto=chooses).layout.zero == 2
    given = written(tmp_path, GOOD)
    assert load(given, ["layout=auto"], auto=chooses).layout.zero == 2
    assert load(given, auto=chooses).layout.zero == 1
    with pytest.raises(
        UserError, match=r'layout is a value, not a section; "auto" chooses all of \[layout\]'
    ):
        load(given, ["layout=auto", "layout.zero=3"], auto=chooses)
    with pytest.raises(UserError, match="layout"):
        load(given, ["layout=automatic"], auto=chooses)
