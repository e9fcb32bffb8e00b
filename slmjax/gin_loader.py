"""Reads Gin files into one frozen config. The only module that imports gin.

Gin alone accepts wrong types, bindings that nothing uses and a forgotten `()` without a word. `load` rejects all
three, names the file and line of the binding at fault, and clears Gin's global registry, so that the rest of the
program sees plain dataclasses. Files name only the dataclasses of `slmjax.config`: no code runs from a config.
"""

import dataclasses
import difflib
import os
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from slmjax import config as configs
from slmjax.config.typed import CLASSES, ConfigError, FieldError, build

_ROOTS = (
    configs.RunConfig,
    configs.PipelineConfig,
    configs.QualityTrainingConfig,
    configs.InfluenceConfig,
    configs.DiversityConfig,
)


class _BuildError(ConfigError):
    """A dataclass of the config could not be made; in `scope` the fields that `error` names are at fault."""

    def __init__(self, error: FieldError):
        super().__init__(error.message)
        self.name, self.fields, self.scope = error.name, error.fields, gin.current_scope_str()


def _register(name: str, cls: type) -> None:
    """Gives Gin a maker of `cls` that checks fields and types before the class looks at the values."""
    # A part that is there by default can be bound without being named: it is made by Gin, too.
    parts = {
        field.name: type(field.default) for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.default)
    }

    def make(**values):
        for field, part in parts.items():
            if field not in values:
                values[field] = gin.get_configurable(f"slmjax.{part.__name__}")()
        try:
            return build(cls, values)
        except FieldError as error:
            raise _BuildError(error) from error

    gin.external_configurable(make, name=name, module="slmjax")


for _name, _class in CLASSES.items():
    _register(_name, _class)


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
      root: class to build; by default whichever of `_ROOTS` the files bind, or ModelConfig if none.

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
            _reject_undefined_macros(origins)
            root = _bound_root(files, root)
            built = _build(root, files, origins)
            _reject_unused_bindings(origins)
            text = gin.config_str(max_line_length=110)
        finally:
            gin_config._set_config_is_locked(False)  # gin 0.5.0 has no public equivalent
            gin.clear_config()
    return Loaded(built, text)


class _Delegate(config_parser.ParserDelegate):
    """Makes the values @Name() and %name: only classes of `slmjax.config` can be named, none of Gin's own functions."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> gin_config.ConfigurableReference:
        _check_class(scoped_selector.rpartition("/")[2].removeprefix("slmjax."))
        return gin_config.ConfigurableReference(scoped_selector, evaluate)

    def macro(self, name: str) -> gin_config.ConfigurableReference:
        return gin_config.ConfigurableReference(f"{name}/gin.macro", True)


def _parse_file(path: str, origins: dict[str, str], stack: tuple[str, ...]) -> None:
    """Binds what one file says, included files where they stand, and notes where every binding is."""
    if os.path.realpath(path) in map(os.path.realpath, stack):
        raise ConfigError(f"{path}: includes itself, by way of {' -> '.join(stack)}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        where = f" (included by {stack[-1]})" if stack else ""
        raise ConfigError(f"{path}: cannot be read{where}: {error}") from error
    for statement, where in _statements(text, lambda line: f"{path}:{line}"):
        if isinstance(statement, config_parser.IncludeStatement):
            beside = os.path.join(os.path.dirname(path), statement.filename)
            _parse_file(beside if os.path.exists(beside) else statement.filename, origins, (*stack, path))
        elif isinstance(statement, config_parser.BindingStatement):
            _bind(statement, where, origins)
        elif isinstance(statement, config_parser.ImportStatement):
            raise ConfigError(f"{where}: imports are not allowed in a config, got {statement.format()!r}")


def _parse_override(override: str, origins: dict[str, str]) -> None:
    key, _, value = (part.strip() for part in override.partition("="))
    try:
        statements = [statement for statement, _ in _statements(override, lambda _: f"--set {override}")]
    except ConfigError:
        if not value or value[0] in "@%([{'\"":
            raise
        # A shell eats quotes, so a value that is no Gin literal is taken as a string; the field's type still decides.
        quoted = f"{key} = {value!r}"
        statements = [statement for statement, _ in _statements(quoted, lambda _: f"--set {override}")]
    if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
        raise ConfigError(f"--set {override}: expected Name.field=value")
    _bind(statements[0], f"--set {override}", origins)


def _statements(text: str, where: Callable[[int], str]) -> Iterator[tuple[Any, str]]:
    """Yields each statement of a Gin text and where it is; `where` spells a line number."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        for statement in parser:
            yield statement, where(statement.location.line_num)
        return
    except ConfigError as error:  # of the delegate
        token = parser.current_token if parser else None
        raise ConfigError(f"{where(token.start[0] if token else 1)}: {error.message}") from None
    except SyntaxError as error:
        line, problem = error.lineno or 1, error.msg
    except tokenize.TokenError as error:
        problem, (line, _) = error.args
    lines = text.splitlines()
    found = repr(lines[line - 1].strip()[:100]) if line <= len(lines) else "the end of the file"
    raise ConfigError(
        f"{where(line)}: expected Name.field = value, where value is a Python literal without arithmetic, @Name() or "
        f"%macro; got {found} ({problem.splitlines()[-1].strip().rstrip('.')})"
    )


def _bind(statement: config_parser.BindingStatement, where: str, origins: dict[str, str]) -> None:
    """Binds one value in Gin's registry, and notes where it and the classes that it names are."""
    name, field = statement.selector.removeprefix("slmjax."), statement.arg_name
    if field:
        try:
            _check_class(name)
            _check_field(name, field)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from None
        gin.bind_parameter((statement.scope, name, field), statement.value)
        origins[_key(statement.scope, f"{name}.{field}")] = where
    else:
        macro = _key(statement.scope, name)
        gin.bind_parameter((macro, "gin.macro", "value"), statement.value)
        origins[macro] = where
    for reference in gin_config.iterate_references([statement.value]):
        origins[f"@{reference.selector}"] = where


def _key(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def _check_class(name: str) -> None:
    if name not in CLASSES:
        raise ConfigError(f"there is no config class {name!r}{_nearest(name, CLASSES)}")


def _check_field(name: str, field: str) -> None:
    fields = [f.name for f in dataclasses.fields(CLASSES[name])]
    if field not in fields:
        raise ConfigError(f"{name} has no field {field!r}{_nearest(field, fields)}")


def _nearest(word: str, choices: Collection[str]) -> str:
    if near := difflib.get_close_matches(word, choices, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(choices)}" if 0 < len(choices) < 30 else ""


def _bound_root(files, wanted: type | None) -> type:
    bound = {name.rpartition(".")[2] for _, name in gin_config._CONFIG}
    roots = [root for root in _ROOTS if root.__name__ in bound]
    if wanted is not None:
        if roots and wanted not in roots:
            raise ConfigError(
                f"{', '.join(map(str, files))}: binds a {roots[0].__name__}, but this command needs a {wanted.__name__}"
            )
        return wanted
    if not roots and configs.ModelConfig.__name__ in bound:
        return configs.ModelConfig
    if len(roots) != 1:
        names = " or ".join(root.__name__ for root in _ROOTS)
        raise ConfigError(f"{', '.join(map(str, files))}: expected bindings of exactly one of {names}, got {roots}")
    return roots[0]


def _build(root: type, files: Sequence[str | os.PathLike], origins: dict[str, str]) -> Any:
    try:
        return gin.get_configurable(f"slmjax.{root.__name__}")()
    except _BuildError as error:
        scopes = error.scope.split("/") if error.scope else []
        places = []
        for field in error.fields:
            # The binding in force is that of the innermost scope.
            keys = [_key("/".join(scopes[:depth]), f"{error.name}.{field}") for depth in range(len(scopes), -1, -1)]
            places += [origins[key] for key in keys if key in origins][:1]
        places = places or [origins.get(f"@{error.name}", ", ".join(map(str, files)))]
        raise ConfigError(f"{', '.join(dict.fromkeys(places))}: {error.message}") from None
    except RecursionError:
        raise ConfigError(f"{', '.join(map(str, files))}: a config class contains itself") from None


def _reject_undefined_macros(origins: dict[str, str]) -> None:
    macros = [scope for scope, name in gin_config._CONFIG if name == "gin.macro"]
    for (scope, name), fields in gin_config._CONFIG.items():
        for field, value in fields.items():
            for reference in gin_config.iterate_references([value]):
                wanted, referenced = reference.config_key
                if referenced == "gin.macro" and wanted not in macros:
                    key = scope if name == "gin.macro" else _key(scope, f"{name.removeprefix('slmjax.')}.{field}")
                    raise ConfigError(f"{origins[key]}: the macro %{wanted} has no value{_nearest(wanted, macros)}")


def _reject_unused_bindings(origins: dict[str, str]) -> None:
    used = set(gin_config._OPERATIVE_CONFIG)
    problems = []
    for scope, name in gin_config._CONFIG:
        if any(name == used_name and _inherits(used_scope, scope) for used_scope, used_name in used):
            continue
        if name == "gin.macro":
            problems.append(f"{origins[scope]}: the macro {scope} is never used (a field is bound as Name.field = ...)")
            continue
        key = _key(scope, name.removeprefix("slmjax."))
        places = [origin for bound, origin in origins.items() if bound.startswith(f"{key}.")]
        problems.append(f"{', '.join(places)}: {key} is bound but nothing in this config uses it")
    if problems:
        raise ConfigError("; ".join(sorted(problems)))


def _inherits(scope: str, ancestor: str) -> bool:
    return not ancestor or scope.split("/")[: ancestor.count("/") + 1] == ancestor.split("/")
