"""Configs: typed dataclasses; defaults <- YAML files <- command-line flags, merged by OmegaConf.

Every field of a dataclass is a flag (`--guidance-scale 2`, nested `--optim.lr 1e-3`). `--help` reads only the
dataclass, so that it needs no heavy import.
"""

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stablerep.runtime.errors import UsageError

T = TypeVar("T")


def key(default: Any, help: str) -> Any:
    """A config field with its default and its line in `--help`. A list, dict or dataclass type is copied or called."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse(cls: type[T], argv: Sequence[str], *, prog: str, about: str, positional: str | None = None) -> T:
    """Parse a command line into `cls`; later files and flags win.

    `positional` names the list-typed field that takes the arguments without a flag. Prints the help and exits 0 on
    `--help`. Raises UsageError on an unknown key (with the nearest valid ones) or a value of the wrong type.
    """
    if any(a in ("--help", "-h") for a in argv):
        print(help_text(cls, prog=prog, about=about, positional=positional))
        raise SystemExit(0)
    files, flags = _split(cls, argv, positional)
    return merge(cls, files, flags)


def merge(cls: type[T], files: Sequence[str], values: dict[str, Any]) -> T:
    """Build `cls` from its defaults, then the YAML `files`, then `values` (dotted keys). Raises UsageError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fields = dict(walk(cls))
    config = OmegaConf.structured(cls)
    try:
        for name in files:
            loaded = load_yaml(name, "config file ")
            for dotted in _leaves(OmegaConf.to_container(loaded)):
                if not any(dotted == f or dotted.startswith(f + ".") for f in fields):
                    raise UsageError(f"unknown key '{dotted}' in {name}{_nearest(dotted, fields)}")
            config = OmegaConf.merge(config, loaded)
        for dotted, value in values.items():
            OmegaConf.update(config, dotted, value)
        return typing.cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        where = f"key '{error.full_key}': " if getattr(error, "full_key", None) else ""
        raise UsageError(f"{where}{reason}") from None


def load_yaml(path: str | Path, what: str = "") -> Any:
    """A YAML file as OmegaConf has it; `what` is said before its name. Raises UsageError."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {what}{path}: {error.__class__.__name__}") from None
    except YAMLError as error:
        raise UsageError(f"{what}{path} is not valid YAML: {' '.join(str(error).split())}") from None


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (dotted name, field) for every leaf of a config dataclass."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from walk(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            field.type = hint
            yield prefix + field.name, field


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or None where it has none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def part(cls: type[T], config: Any) -> T:
    """The fields of `cls` taken out of a wider config (a command's config inherits from those of its parts)."""
    return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(typing.cast(Any, cls))})


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML text that `--config` reads back."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_yaml(cls: type[T], path: str | Path) -> T:
    """Read a frozen `config.yaml` back into its dataclass. Raises UsageError."""
    return merge(cls, [str(path)], {})


def help_text(cls: type, *, prog: str, about: str, positional: str | None = None) -> str:
    """The text of `--help`: every key with its default and meaning."""
    words = f" {positional.upper()}..." if positional else ""
    lines = [f"usage: {prog}{words} [--config FILE]... [--key value]...", "", about, ""]
    lines.append(f"  {'--config FILE':<34} a YAML file in the shape of these keys (repeatable, later wins)")
    for name, field in walk(cls):
        flag = f"--{name.replace('_', '-')}"
        default = default_of(field)
        shown = "" if default in (None, "", []) else f" (default: {_show(default)})"
        gap = "\n" + " " * 37 if len(flag) > 33 else ""
        lines.append(f"  {flag:<34}{gap} {field.metadata.get('help', '')}{shown}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _split(cls: type, argv: Sequence[str], positional: str | None) -> tuple[list[str], dict[str, Any]]:
    """Cut a command line into config files and {dotted key: value}."""
    fields = dict(walk(cls))
    files: list[str] = []
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if positional is None:
                raise UsageError(f"unexpected argument '{word}': every setting is a flag, see --help")
            values.setdefault(positional, []).append(word)
            continue
        name, has_value, value = word[2:].partition("=")
        dotted = name.replace("-", "_")
        if dotted != "config" and dotted not in fields:
            raise UsageError(f"unknown key '--{name}'{_nearest(dotted, fields)}")
        field = fields.get(dotted)
        is_bool = field is not None and field.type in (bool, bool | None)
        is_list = field is not None and typing.get_origin(field.type) is list
        if not has_value:
            taken: list[str] = []
            while rest and not rest[0].startswith("--") and (is_list or not taken):
                if is_bool and rest[0].lower() not in _BOOLS:
                    break
                taken.append(rest.pop(0))
            if not taken and is_bool:
                taken = ["true"]
            if not taken:
                raise UsageError(f"'--{name}' needs a value")
        else:
            taken = [value]
        if dotted == "config":
            files += taken
        elif is_list:
            values.setdefault(dotted, []).extend(taken)
        else:
            values[dotted] = None if taken[0] in ("null", "none") and _optional(field) else taken[0]
    return files, values


_BOOLS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def _optional(field: dataclasses.Field[Any] | None) -> bool:
    return field is not None and type(None) in typing.get_args(field.type)


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(tree, dict):
        raise UsageError("a config file must hold a mapping of keys to values")
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join('--' + c.replace('_', '-') for c in close)}?" if close else "; see --help"


def run_command(main: Any) -> None:
    """Run `main(argv) -> exit code` and turn our errors into one line on stderr and the contract's exit code."""
    from stablerep.runtime.errors import WorkError

    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except WorkError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # whoever read our output has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)
