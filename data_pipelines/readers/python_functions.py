"""Pairs of instruction and answer from Python source: a function's signature and docstring, and the function."""

import ast
import copy
import textwrap
import warnings
from collections.abc import Iterator

from slmjax.config import PythonFunctionsSourceConfig

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def pairs(source: str, config: PythonFunctionsSourceConfig) -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, question, answer) for every function and method with a docstring and a body.

    The question is the instruction, the signature on one line, and the first paragraph of the docstring; the answer is
    the function's own text, decorators and docstring left out and moved to the left margin. Source that this Python
    cannot parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
            return
    # Not splitlines: it also breaks at form feeds, which the parser does not count as line ends.
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    seen: dict[str, int] = {}
    for name, function in _functions(tree, ""):
        docstring = ast.get_docstring(function)
        answer = _without_docstring(function, lines) if docstring else None
        if docstring and answer:
            paragraph = docstring.split("\n\n")[0].strip()
            question = f"{config.instruction}\n{_signature(function)}\n{paragraph}"
            if len(question) <= config.max_prompt_chars and len(answer) <= config.max_answer_chars:
                seen[name] = seen.get(name, 0) + 1  # a module may define a name once for each platform
                yield name if seen[name] == 1 else f"{name}.{seen[name]}", question, answer


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    """Functions and methods, not functions inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _signature(function: _Function) -> str:
    bare = copy.copy(function)
    bare.decorator_list, bare.body = [], [ast.Expr(ast.Constant(...))]
    return ast.unparse(bare).partition("\n")[0]


def _without_docstring(function: _Function, lines: list[str]) -> str | None:
    """Text of the function less its docstring; None where nothing is left, or it cannot be cut out line by line."""
    docstring = function.body[0]
    after = function.body[1] if len(function.body) > 1 else None
    if after is None or docstring.end_lineno is None or function.end_lineno is None:
        return None
    header = lines[function.lineno - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : function.end_lineno]
    while body and not body[0].strip():
        del body[0]
    if not header or not body or after.lineno == docstring.end_lineno:
        return None
    answer = textwrap.dedent("\n".join(header + body))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(answer)  # a string whose lines start at the margin keeps dedent from moving the function
        except SyntaxError:
            return None
    return answer
