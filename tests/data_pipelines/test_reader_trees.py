"""Source trees: code that somebody wrote becomes documents, everything else is counted by its reason."""

import collections
import os

import pytest

from data_pipelines.documents import Document
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.items import Reject, Skip
from data_pipelines.readers.sources import read_documents
from slmjax.config import SourceTreeConfig

TREE = {
    "one/main.py": b"print('one')\n",
    "one/lib/code.c": b"\xef\xbb\xbfint main() {}\n",
    "one/Makefile": b"all:\n\tcc\n",
    "one/.git/objects/ab/cdef": b"\x00\x01",
    "one/.github/workflow.py": b"x = 1\n",
    "one/.hidden.py": b"x = 1\n",
    "one/node_modules/left-pad/index.js": b"module.exports = 1\n",
    "one/web/jquery.min.js": b"!function(){}\n",
    "one/web/app.js": b"var a=1;" * 400,
    "one/web/page.js": b"var a = 1;\n" * 40,
    "one/package-lock.json": b"{}",
    "one/logo.png": b"\x89PNG",
    "two/empty/__init__.py": b"",
    "two/blob.py": b"\x00\x01\x02",
    "two/latin.py": b"# caf\xe9\n",
    "two/large.py": b"x = 1\n" * 300_000,
    "two/notes.proto": b"message A {}\n",
    "two/late_null.py": b"x = 1\n" * 2000 + b"\x00",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name, content in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    os.symlink(root / "nothing", root / "two/broken.py")
    os.symlink(root / "one", root / "two/loop.py")
    return root


def read(root, **fields):
    source = SourceTreeConfig(paths=(str(root),), **fields)
    items = [item for file in list_inputs(source) for item in read_documents(source, file, lambda text: text)]
    documents = {item.id: item.text for item in items if isinstance(item, Document)}
    rejects = {item.reason for item in items if isinstance(item, Reject)}
    return documents, rejects, collections.Counter(item.reason for item in items if isinstance(item, Skip))


def test_code_is_read_and_all_else_is_counted(tree):
    documents, rejects, skipped = read(tree)
    assert documents == {
        "code/one/Makefile": "all:\n\tcc\n",
        "code/one/lib/code.c": "int main() {}\n",
        "code/one/main.py": "print('one')\n",
        "code/one/web/page.js": "var a = 1;\n" * 40,
    }
    assert rejects == {"invalid_utf8", "null_byte", "not_a_file"}
    assert skipped == {
        "version_control": 1,
        "hidden": 2,
        "vendored": 1,
        "generated": 2,
        "minified": 1,
        "other_language": 2,
        "empty_file": 1,
        "binary": 1,
        "huge": 1,
    }


def test_languages_extensions_and_vendored_code_can_be_chosen(tree):
    assert set(read(tree, languages=("python",))[0]) == {"code/one/main.py"}
    assert set(read(tree, extensions=(".proto",))[0]) == {"code/two/notes.proto"}
    both = read(tree, languages=("c",), extensions=(".proto",))[0]
    assert set(both) == {"code/one/lib/code.c", "code/two/notes.proto"}
    vendored = read(tree, languages=("javascript",), vendored=True)[0]
    assert set(vendored) == {"code/one/node_modules/left-pad/index.js", "code/one/web/page.js"}
    assert "code/two/large.py" in read(tree, max_file_bytes=2 << 20)[0]


def test_a_change_of_what_is_passed_over_is_no_change_of_the_input(tree):
    source = SourceTreeConfig(paths=(str(tree),))
    before = list_inputs(source)
    (tree / "one/.git/objects/ab/cdef").write_bytes(b"other")
    assert list_inputs(source) == before
    assert all(file.size == 0 for file in before if file.skipped)


def test_the_config_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"languages must be of \['assembly', .* got \['cobol'\]"):
        SourceTreeConfig(paths=("x",), languages=("cobol",))
    with pytest.raises(ValueError, match=r"extensions begin with a dot, got \['proto'\]"):
        SourceTreeConfig(paths=("x",), extensions=("proto",))
