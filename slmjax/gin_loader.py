"""Reads Gin files into one frozen config. The only module that imports gin.

Gin alone accepts wrong types, bindings that nothing uses and a forgotten `()` without a word. `load` rejects all
three, names the file and line of the binding at fault, and clears Gin's global registry, so that the rest of the
program sees plain dataclasses. Files name only the dataclasses of `slmjax.config`: no code runs from a config.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import gin
from gin import config as gin_config

from slmjax import config as configs

_CLASSES = {
    name: cls
    for name in configs.__all__
    if isinstance(cls := getattr(configs, name), type) and dataclasses.is_dataclass(cls)
}
_ROOTS = (configs.RunConfig, configs.PipelineConfig)


class ConfigError(ValueError):
    """A config that cannot be used; the message names the file or override, the field, what was expected and got."""


    def __init__(self, message: str):
        super().__init__(message)
        self.message = message  # without what Gin adds to str()


def _register(name: str, cls: type) -> None:
    """Registers a maker of `cls` that checks fields and types before the class looks at the values."""
    hints = typing.get_type_hints(cls)
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def make(**values):
        if missing := [field for field in required if field not in values]:
            raise ConfigError(f"{name}: no value for {', '.join(missing)}; bind {name}.{missing[0]} = ...")
        for field, value in values.items():
            if not _conforms(value, hints[field]):
                raise ConfigError(f"{name}.{field}: expected {_spell(hints[field])}, got {_spell_value(value)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    gin.external_configurable(make, name=name, module="slmjax")


for _name, _cls in _CLASSES.items():
    _register(_name, _cls)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config and the text that gives it again.

    Attributes:
      config: the root dataclass.
      text: every binding in force, as one Gin file without includes.
    """

    config: Any
    text: str


def load(files: Sequence[str | os.PathLike], overrides: Sequence[str] = (), *, root: type | None = None) -> Loaded:
    """Returns the config that `files` and then `overrides` ("Name.field=value") describe, later bindings winning.

    Args:
      files: Gin files; an include is looked up beside the including file, then in the working directory.
      overrides: bindings from the command line.
      root: RunConfig or PipelineConfig; by default the one that the files bind.

    Raises:
      ConfigError: a file is missing, a name is unknown, a required field is absent, a value has the wrong type, a
        binding is unused, or values contradict each other.
    """
    origins: dict[str, str] = {}
    with gin.unlock_config():
        gin.clear_config()
        try:
            for file in files:
                _parse_file(os.fspath(file), origins, ())
            for override in overrides:
                _parse_override(override, origins)
            root = root or _bound_root(files)
            built = _build(root, origins)
            _reject_unused_bindings(origins)
            text = gin.config_str(max_line_length=110)
        finally:
            gin_config._set_config_is_locked(False)  # noqa: SLF001 -- gin 0.5.0 has no public equivalent
            gin.clear_config()
    return Loaded(built, text)


def to_json(node: Any) -> Any:
    """Returns `node` as JSON values; a dataclass carries its class name, so that unions can be told apart."""
    if dataclasses.is_dataclass(node):
        fields = {field.name: to_json(getattr(node, field.name)) for field in dataclasses.fields(node)}
        return {"class": type(node).__name__, **fields}
    if isinstance(node, tuple):
        return [to_json(item) for item in node]
    return node


def from_json(node: Any) -> Any:
    """Returns the config that `to_json` wrote."""
    if isinstance(node, dict):
        name = node.get("class")
        if name not in _CLASSES:
            raise ConfigError(f"saved config names the unknown class {name!r}")
        fields = {key: from_json(value) for key, value in node.items() if key != "class"}
        known = {field.name for field in dataclasses.fields(_CLASSES[name])}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"saved config has fields that {name} does not know: {unknown}")
        return _CLASSES[name](**fields)
    if isinstance(node, list):
        return tuple(from_json(item) for item in node)
    return node


_INCLUDE = re.compile(r"""^\s*include\s+(['"])(?P<path>[^'"]+)\1\s*(#.*)?$""")
_BINDING = re.compile(r"^(?P<key>[A-Za-z_][\w./]*)\s*=")


def _parse_file(path: str, origins: dict[str, str], stack: tuple[str, ...]) -> None:
    """Parses one file, its includes first where they stand, and notes the line of every binding."""
    if path in stack:
        raise ConfigError(f"{path}: includes itself, by way of {' -> '.join(stack)}")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        where = f" (included by {stack[-1]})" if stack else ""
        raise ConfigError(f"{path}: cannot be read{where}: {error}") from error
    pending: list[str] = []

    def flush() -> None:
        # Blank lines stand in for what was parsed already, so that Gin reports true line numbers.
        try:
            gin.parse_config("\n".join(pending))
        except (ValueError, SyntaxError, ImportError) as error:
            raise ConfigError(f"{path}: {_readable(error)}") from error
        pending[:] = [""] * len(pending)

    for number, line in enumerate(lines, 1):
        if include := _INCLUDE.match(line):
            flush()
            target = include["path"]
            beside = os.path.join(os.path.dirname(path), target)
            _parse_file(beside if os.path.exists(beside) else target, origins, (*stack, path))
            pending.append("")
            continue
        if line.lstrip().startswith(("import ", "from ")):
            raise ConfigError(f"{path}:{number}: imports are not allowed in a config, got {line.strip()!r}")
        if binding := _BINDING.match(line):
            _check_name(binding["key"], f"{path}:{number}")
            origins[binding["key"]] = f"{path}:{number}"
        pending.append(line)
    flush()


def _parse_override(override: str, origins: dict[str, str]) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected Name.field=value")
    _check_name(key.strip(), f"--set {override}")
    value = override.partition("=")[2].strip()
    # A shell eats quotes, so a value that is no Gin literal is taken as a string; the field's type still decides.
    quoted = f"{key} = {value!r}"
    try:
        gin.parse_config(override)
    except (ValueError, SyntaxError) as error:
        if value[:1] in tuple("@%([{'\""):
            raise ConfigError(f"--set {override}: {_readable(error)}") from error
        gin.parse_config(quoted)
    origins[key.strip()] = f"--set {override}"


def _check_name(key: str, origin: str) -> None:
    """Rejects a binding for a class or field that does not exist; names near misses."""
    name = key.rpartition("/")[2]
    if "." not in name:  # a macro
        return
    class_name, _, field = name.removeprefix("slmjax.").rpartition(".")
    if class_name not in _CLASSES:
        raise ConfigError(f"{origin}: there is no config class {class_name!r}{_nearest(class_name, _CLASSES)}")
    fields = [f.name for f in dataclasses.fields(_CLASSES[class_name])]
    if field not in fields:
        raise ConfigError(f"{origin}: {class_name} has no field {field!r}{_nearest(field, fields)}")


def _nearest(word: str, choices) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(choices)}" if len(choices) < 30 else ""


def _readable(error: BaseException) -> str:
    return " ".join(str(error).split())


def _bound_root(files) -> type:
    bound = {name.rpartition(".")[2] for _, name in gin_config._CONFIG}  # noqa: SLF001
    roots = [root for root in _ROOTS if root.__name__ in bound]
    if len(roots) != 1:
        names = " or ".join(root.__name__ for root in _ROOTS)
        raise ConfigError(f"{', '.join(map(str, files))}: expected bindings of exactly one of {names}, got {roots}")
    return roots[0]


def _build(root: type, origins: dict[str, str]) -> Any:
    try:
        return gin.get_configurable(f"slmjax.{root.__name__}")()
    except ConfigError as error:
        subject = error.message.partition(":")[0]  # "Class" or "Class.field"
        places = [o for key, o in origins.items() if f"{key.rpartition('/')[2]}.".startswith(f"{subject}.")]
        where = f"{', '.join(dict.fromkeys(places))}: " if places else ""
        raise ConfigError(f"{where}{error.message}") from None
    except (ValueError, TypeError) as error:  # Gin's own, such as a macro without a value
        raise ConfigError(_readable(error)) from error


def _reject_unused_bindings(origins: dict[str, str]) -> None:
    used = set(gin_config._OPERATIVE_CONFIG)  # noqa: SLF001
    problems = []
    for scope, name in gin_config._CONFIG:  # noqa: SLF001
        if any(name == used_name and _inherits(used_scope, scope) for used_scope, used_name in used):
            continue
        short = name.removeprefix("slmjax.")
        key = "/".join(filter(None, (scope, short)))
        if short == "gin.macro":
            problems.append(f"{origins.get(scope, '?')}: the macro {scope} is never used")
            continue
        places = [origin for bound, origin in origins.items() if bound.startswith(f"{key}.")]
        problems.append(f"{', '.join(places) or '?'}: {key} is bound but nothing in this config uses it")
    if problems:
        raise ConfigError("; ".join(sorted(problems)))


def _inherits(scope: str, ancestor: str) -> bool:
    return not ancestor or scope.split("/")[: ancestor.count("/") + 1] == ancestor.split("/")


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(arg) for arg in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_spell(arg) for arg in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {', '.join('...' if arg is Ellipsis else _spell(arg) for arg in typing.get_args(hint))}"
    return getattr(hint, "__name__", str(hint))


def _spell_value(value: Any) -> str:
    if isinstance(value, type) or callable(value):
        return "a class instead of an instance: write @Name() with parentheses"
    return f"{value!r} ({type(value).__name__})"


def _conforms(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_conforms(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_conforms, value, args))
    if hint in (int, float):  # bool is an int in Python; a config that says True for 4 is a mistake
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if hint is None else hint)
