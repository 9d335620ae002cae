"""TOML and `--set` into a `Config`: every problem in one report, with file:line and did-you-mean."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sysconfig
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bigtrain.config import Config, ModelConfig, model_problems, problems
from bigtrain.errors import UserError


def shipped(name: str) -> Path | None:
    """A file that ships with bigtrain (`configs/quickstart.toml`), in a checkout or an installed wheel."""
    bases = (
        Path(__file__).parents[1],
        Path(sysconfig.get_path("data")) / "share/bigtrain",
        Path(__file__).parents[1] / "share/bigtrain",  # pip install --target
    )
    return next((base / name for base in bases if (base / name).exists()), None)


def find_config(name: str) -> Path:
    """A path, or the name of a shipped config (`quickstart`, `llama-8b`). UserError if there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    known = name.removesuffix(".toml")
    if path.parent == Path(".") and (found := shipped(f"configs/{known}.toml")):
        return found
    folder = shipped("configs")
    names = sorted(p.stem for p in folder.glob("*.toml")) if folder else []
    close = difflib.get_close_matches(known, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"give a TOML file, or one of: {', '.join(names)}"
    raise UserError(f"no config file {name!r}", do=hint)


Auto = Callable[[Config], Config]
"""Puts a chosen layout in the place of `layout = "auto"`."""


def load(path: str | Path, overrides: Sequence[str] = (), *, auto: Auto | None = None) -> Config:
    """Read a TOML file, apply `--set section.key=value` strings, check everything.

    Where the file or a string says `layout = "auto"`, `auto` chooses; without it the layout is the default one.
    Raises one UserError that lists every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as e:
        raise UserError(f"cannot read: {e.strerror}", where=str(path)) from e
    except UnicodeDecodeError as e:
        raise UserError("is not UTF-8 text", where=str(path), do="TOML files are UTF-8") from e
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"not valid TOML: {e}", where=str(path)) from e
    return build(raw, overrides, text=text, source=str(path), auto=auto)


def load_undecided(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, bool]:
    """As `load`, for what happens before there are ranks; and whether the layout is "auto", so not known yet."""
    automatic: list[Config] = []

    def note(config: Config) -> Config:
        automatic.append(config)
        return config

    return load(path, overrides, auto=note), bool(automatic)


def build(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    text: str = "",
    source: str = "config",
    auto: Auto | None = None,
) -> Config:
    """Turn parsed TOML plus overrides into a Config, or raise one UserError with every problem."""
    merged = json.loads(json.dumps(raw, default=str))
    found: list[str] = []
    touched = set()
    for item in overrides:
        key, problem = _apply(merged, item)
        touched.add(key)
        if problem:
            found.append(f"--set {item}: {problem}")
    automatic = merged.get("layout") == "auto"
    if automatic:
        del merged["layout"]

    def locate(key: str) -> str:
        if key in touched:
            return "--set"
        line = _line_of(text, key)
        return f"{source}:{line}" if line else source

    try:
        config = Config.model_validate(merged)
        found += [f"{locate(p.split(':')[0])}: {p}" for p in problems(config)]
        if not found:
            return auto(config) if automatic and auto is not None else config
    except ValidationError as e:
        for error in e.errors():
            key = ".".join(str(part) for part in error["loc"])
            found.append(f"{locate(key)}: {_explain(key, error)}")
        # A sound [model] is checked for itself, so that its arithmetic is reported in the same go.
        with contextlib.suppress(ValidationError):
            model = ModelConfig.model_validate(merged.get("model"))
            found += [f"{locate(p.split(':')[0])}: {p}" for p in model_problems(model)]
    word = "problem" if len(found) == 1 else "problems"
    raise UserError(f"{len(found)} {word} in the configuration\n  " + "\n  ".join(found))


def _apply(tree: dict[str, Any], item: str) -> tuple[str, str]:
    """Put one `a.b=value` into the tree. Returns (key, problem or '')."""
    key, equals, value = item.partition("=")
    key = key.strip()
    if not equals or not key:
        return key, "expected section.key=value"
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string: --set optim.kind=sgd
    if parsed == "none":
        parsed = None if _optional(key) else parsed
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            chosen = '; "auto" chooses all of [layout]' if node == "auto" else ""
            return key, f"{section} is a value, not a section{chosen}"
    if parsed is None:
        node.pop(last, None)
    else:
        node[last] = parsed
    return key, ""


def _field(key: str) -> Any:
    """The pydantic field of a dotted key, or None."""
    model: Any = Config
    field = None
    for part in _nameless(key).replace(".*", "").split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        field = fields[part]
        model = _section_of(field.annotation)
    return field


def _section_of(annotation: Any) -> Any:
    """The section class inside an annotation such as `RopeScaling | None`."""
    options = (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _nameless(key: str) -> str:
    """A key without the names that a user gave: data.sources.*.weight for data.sources.web.weight."""
    return re.sub(r"^(data\.(?:sources|stages))\.[^.]+", r"\1.*", key)


def _optional(key: str) -> bool:
    field = _field(key)
    return field is not None and type(None) in get_args(field.annotation)


def _explain(key: str, error: Any) -> str:
    """One problem in the user's words."""
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_did_you_mean(key)}"
    if error["type"] == "missing":
        field = _field(key)
        meaning = f": {field.description}" if field is not None and field.description else ""
        return f"{key} is required{meaning}"
    message = error["msg"].removeprefix("Input should be ")
    return f"{key} must be {message}, not {error['input']!r}"


def _did_you_mean(key: str) -> str:
    """`; did you mean optim.lr?` from the sibling keys first, then from every key."""
    shown = key.rpartition(".")[0]
    parent, _, last = _nameless(key).rpartition(".")
    every = {name.rpartition(".")[2]: name for name in _all_keys(Config, "")}
    siblings = [n.rpartition(".")[2] for n in _all_keys(Config, "") if n.rpartition(".")[0] == parent]
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return f"; did you mean {shown + '.' if shown else ''}{close[0]}?"
    if close := difflib.get_close_matches(last, list(every), n=1, cutoff=0.75):
        return f"; did you mean {every[close[0]]}?"
    return f"; {shown or 'the top level'} has {', '.join(siblings)}" if siblings else ""


def _all_keys(model: Any, prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = _section_of(field.annotation)
        if section is not None:
            names = "*." if get_origin(field.annotation) is dict else ""
            keys += _all_keys(section, f"{prefix}{name}.{names}")
    return keys


def _line_of(text: str, key: str) -> int:
    """Line of a dotted key in TOML text written the usual way (sections and `key = value`); 0 if not found."""
    section = ""
    nearest = 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\-]+)\]", line):
            section = header[1] + "."
            if key == header[1] or key.startswith(section):
                nearest = number
        elif (pair := re.match(r"\s*([\w.\-]+)\s*=", line)) and (section + pair[1]) == key:
            return number
    return nearest


def render(config: Config) -> str:
    """The resolved config as TOML, every key with its meaning above it; `load` reads it back equal."""
    lines = ["# Resolved by bigtrain: every key, defaults included.", f"name = {_toml(config.name)}"]
    for section, field in Config.model_fields.items():
        value = getattr(config, section)
        if isinstance(value, BaseModel):
            meaning = (_section_of(field.annotation).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"# {meaning}", f"[{section}]", *_render_section(value, section)]
    return "\n".join(lines) + "\n"


def _render_section(section: BaseModel, name: str) -> list[str]:
    lines: list[str] = []
    nested: list[str] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        meaning = " ".join((field.description or "").split())
        if isinstance(value, BaseModel):
            nested += ["", f"[{name}.{key}]", *_render_section(value, f"{name}.{key}")]
        elif _section_of(field.annotation) is not None and isinstance(value, dict) and value:
            for given, each in value.items():
                header = f"{name}.{key}.{_bare(given)}"
                nested += ["", f"[{header}]", *_render_section(each, header)]
        elif value is None or value == {}:
            lines += [f"# {meaning}", f"# {key} ="]
        else:
            lines += [f"# {meaning}", f"{key} = {_toml(value)}"]
    return lines + nested


def _toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_bare(name)} = {_toml(each)}" for name, each in value.items()) + " }"
    return repr(value)


def _bare(key: str) -> str:
    """A name as a TOML key."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
