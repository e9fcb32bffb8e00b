"""Which files of a directory of repositories are source code that somebody wrote."""

import functools
from pathlib import PurePosixPath

from slmjax.config import SourceTreeConfig
from slmjax.config.sources import LANGUAGES

_VERSION_CONTROL = {".git", ".hg", ".svn", ".bzr", "CVS", "_darcs"}
_VENDORED = {
    *("node_modules", "bower_components", "jspm_packages", "vendor", "third_party", "third-party", "thirdparty"),
    *("3rdparty", "external", "extern", "site-packages", "dist-packages", "venv", "__pycache__", "Pods", "Carthage"),
}
_BUILT = (".min.js", ".min.css", ".bundle.js", ".map", "_pb2.py", ".pb.go", ".pb.h", ".pb.cc")
_LOCKS = {"package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "Cargo.lock", "poetry.lock"}
# People write shorter lines than this, on the average of a file.
_MINIFIED_LINE_BYTES = 200
_MINIFIED = (".js", ".mjs", ".cjs", ".css")


def skipped_path(config: SourceTreeConfig, name: str, size: int) -> str:
    """Why a file is passed over, as its path and size say; "" if it is not."""
    path = PurePosixPath(name)
    outer = set(path.parts[:-1])
    if outer & _VERSION_CONTROL:
        return "version_control"
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if outer & _VENDORED and not config.vendored:
        return "vendored"
    if path.name in _LOCKS or path.name.endswith(_BUILT):
        return "generated"
    if not {path.suffix, path.name} & _endings(config):
        return "other_language"
    return "huge" if size > config.max_file_bytes else ""


@functools.cache
def _endings(config: SourceTreeConfig) -> frozenset[str]:
    """Endings and names of the files that are wanted; of all languages unless some or extensions are named."""
    languages = LANGUAGES if not config.languages and not config.extensions else config.languages
    return frozenset(config.extensions).union(*(LANGUAGES[language] for language in languages))


def skipped_content(name: str, content: bytes) -> str:
    """Why a file is passed over, as what it holds says; "" if it is not."""
    if not content.strip():
        return "empty_file"
    if b"\0" in content[:8192]:
        return "binary"
    lines = content.count(b"\n") + 1
    return "minified" if name.endswith(_MINIFIED) and len(content) > _MINIFIED_LINE_BYTES * lines else ""
