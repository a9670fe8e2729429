"""Configs: one YAML file per use, checked against the class of its `stage:` before anything runs.

`load("demo-pretrain", ["optim.lr=3e-4"])` reads a preset (or a path: an existing path wins), lays the overrides over
it, and validates the result, so that a mistake in the file and one on the command line give the same message: dotted
path, what was given, what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

# Stage -> its config class. By name, so that reading configs imports only the floor that is asked for.
STAGES: Mapping[str, str] = types.MappingProxyType(
    {
        "shards": "shards.config:ShardsConfig",
        "pretrain": "pipeline.config:PretrainConfig",
        "finetune": "pipeline.finetune_config:FinetuneConfig",
        "evaluate": "pipeline.evaluate_config:EvaluateConfig",
        "predict": "pipeline.predict_config:PredictConfig",
        "export": "pipeline.export_config:ExportConfig",
        "slurm": "launchers.config:SlurmConfig",
        "chain": "launchers.config:ChainConfig",
    }
)


class ConfigError(ValueError):
    """A config cannot be used. One line per mistake: dotted path, what was given, what is allowed."""


def presets() -> list[str]:
    """Names of the configs that ship with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def stage_of(source: str | Path) -> str:
    """The stage that a file or preset is for."""
    return str(_read(source).get("stage", ""))


def config_class(stage: str) -> type[Any]:
    """The config class of a stage; ConfigError lists the stages."""
    if stage not in STAGES:
        raise ConfigError(f"stage: {stage!r} given; allowed: {', '.join(STAGES)}")
    return typing.cast("type[Any]", pkgutil.resolve_name(STAGES[stage]))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The config in a file or preset, with `key.path=value` overrides laid over it.

    Args:
        source: path of a YAML file, or the name of a preset.
        overrides: values are YAML: `steps=100`, `sensors=[s1,dem]`, `where.split=[train]`.

    Raises:
        ConfigError: no such file or preset, not YAML, or contents that do not validate.
    """
    raw = _read(source)
    for text in overrides:
        _override(raw, text)
    return parse(raw)


def parse(raw: Mapping[str, Any]) -> Any:
    """Validate a mapping that holds `stage`; ConfigError names every mistake at once."""
    cls = config_class(str(raw.get("stage", "")))
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, item) for item in error.errors())) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values of YAML and JSON types; `parse` is the inverse."""
    return typing.cast("dict[str, Any]", TypeAdapter(type(config)).dump_python(config, mode="json"))


def dump(config: Any) -> str:
    """A config as YAML, `stage` first, every field written out."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False, width=120))


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two configs of one class differ, with both values."""
    left, right = dict(_leaves(to_dict(a))), dict(_leaves(to_dict(b)))
    pairs = {key: (left.get(key), right.get(key)) for key in [*left, *(key for key in right if key not in left)]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def describe(stage: str) -> str:
    """The fields of a stage for its help: dotted path, default, meaning; a line each."""
    rows = [row for row in _fields(config_class(stage)) if row[0] != "stage"]
    width = max(len(path) for path, _, _ in rows)
    given = ["" if default is dataclasses.MISSING else f"  [{_short(default)}]" for _, default, _ in rows]
    return "\n".join(f"  {path:<{width}}  {doc}{default}" for (path, _, doc), default in zip(rows, given, strict=True))


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(source) in presets():
        text = resources.files(__name__).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        close = difflib.get_close_matches(str(source), presets(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"{source}: neither a file nor a preset{hint} Presets: {', '.join(presets())}")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: a mapping that starts with 'stage:' is expected")
    return raw


def _override(raw: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"{text!r}: write key.path=value")
    node: dict[str, Any] = raw
    *parents, last = path.split(".")
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: {name} is {child!r}, not a group of fields")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        both = f"where it is text, a shell needs both quotes: \"{path}='{value}'\""
        raise ConfigError(f"{path}: {value!r} is not a YAML value; {both}") from None


def _explain(cls: type[Any], item: Any) -> str:
    """One validation error as a line."""
    names = [str(part) for part in item["loc"]]
    path = ".".join(names) or "config"
    if item["type"] == "unexpected_keyword_argument":
        valid = _names_at(cls, names[:-1])
        close = difflib.get_close_matches(names[-1], valid, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return f"{path}: unknown key{hint} Valid here: {', '.join(valid)}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: missing; give it in the file or as {path}=VALUE"
    if item["type"] == "value_error":  # our own checks already say what was given
        return f"{path}: {item['ctx']['error']}"
    empty = item["type"] == "string_type" and item["input"] is None
    hint = f"; for an empty text a shell needs both quotes: \"{path}=''\"" if empty else ""
    return f"{path}: {item['input']!r} given; {item['msg'][0].lower()}{item['msg'][1:]}{hint}"


def _names_at(cls: Any, path: Sequence[str]) -> list[str]:
    for name in path:
        found = {field.name: kind for field, kind in _typed_fields(cls)} if _group(cls) else {}
        if name in found:
            cls = _group(found[name]) or found[name]
    return [field.name for field, _ in _typed_fields(cls)] if _group(cls) else []


def _group(kind: Any) -> Any:
    """The dataclass in a type such as `Tiling` or `Label | None`; None when there is none."""
    options = typing.get_args(kind) or (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _typed_fields(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    kinds = typing.get_type_hints(cls)
    return [(field, kinds[field.name]) for field in dataclasses.fields(cls)]


def _fields(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    for field, kind in _typed_fields(cls):
        inner = _group(kind)
        if inner is not None:
            yield from _fields(inner, f"{prefix}{field.name}.")
            continue
        default, doc = field.default, field.metadata.get("description", "")
        if isinstance(default, FieldInfo):  # a pydantic field; plain dataclasses give both themselves
            info, doc = default, default.description or ""
            default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
        yield f"{prefix}{field.name}", default, doc


def _short(value: Any) -> str:
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
