"""Where documents and conversations come from."""

import dataclasses
from typing import Literal

from slmjax.config.check import positive, require
from slmjax.config.quality import GeneratedFilesSourceConfig

# Programming languages: the endings of their files, or their whole names.
LANGUAGES: dict[str, tuple[str, ...]] = {
    "assembly": (".asm", ".s", ".S"),
    "c": (".c", ".h"),
    "c++": (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
    "c#": (".cs",),
    "clojure": (".clj", ".cljs"),
    "css": (".css", ".scss"),
    "cuda": (".cu", ".cuh"),
    "dart": (".dart",),
    "docker": ("Dockerfile",),
    "elixir": (".ex", ".exs"),
    "erlang": (".erl", ".hrl"),
    "fortran": (".f", ".f90", ".f95"),
    "go": (".go",),
    "haskell": (".hs",),
    "html": (".html", ".htm"),
    "java": (".java",),
    "javascript": (".js", ".jsx", ".mjs", ".cjs"),
    "julia": (".jl",),
    "kotlin": (".kt", ".kts"),
    "lean": (".lean",),
    "lisp": (".lisp", ".el", ".scm"),
    "lua": (".lua",),
    "make": (".mk", "Makefile", "GNUmakefile", "CMakeLists.txt", ".cmake"),
    "markdown": (".md", ".markdown", ".rst"),
    "ocaml": (".ml", ".mli"),
    "perl": (".pl", ".pm"),
    "php": (".php",),
    "python": (".py", ".pyi", ".pyx"),
    "r": (".r", ".R"),
    "ruby": (".rb", "Rakefile"),
    "rust": (".rs",),
    "scala": (".scala",),
    "shell": (".sh", ".bash", ".zsh"),
    "solidity": (".sol",),
    "sql": (".sql",),
    "swift": (".swift",),
    "tex": (".tex", ".bib"),
    "typescript": (".ts", ".tsx"),
    "verilog": (".v", ".sv", ".vhd"),
    "zig": (".zig",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesSourceConfig:
    """Text from files: every jsonl line, parquet row, or whole .txt, .md file is a document.

    Attributes:
      paths: files, directories (searched in depth), globs, or fsspec addresses of any of these; environment variables
        and ~ are expanded. Of a directory that `datasets` saved, the files that hold its rows.
      name: of this source in identifiers and in the manifest.
      format: "auto" goes by the extension (.jsonl, .ndjson, .parquet, .arrow, .txt, .md, each but the tables also .gz
        and .zst); the others read every file that way, whatever it is called.
      text_field: field of the text in jsonl and tables; "a.b" is the field b of the field a.
      id_field: field that identifies a document, also on which side of the split it falls; None numbers the documents
        of a file and splits by the hash of their text.
      max_record_bytes: longer lines and files go to quarantine.
    """

    paths: tuple[str, ...]
    name: str = "files"
    format: Literal["auto", "jsonl", "parquet", "arrow", "text"] = "auto"
    text_field: str = "text"
    id_field: str | None = None
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")

    @property
    def given_ids(self) -> bool:
        """Whether ids come from the data, where nothing makes sure that they differ."""
        return self.id_field is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarcSourceConfig:
    """Pages of web archives: what a server answered with status 200 as HTML or plain text, and texts made from it.

    Attributes:
      paths, max_record_bytes: as in FilesSourceConfig.
      format: "auto" reads .warc and .wet, also .gz and .zst; "warc" every file.
      main_content: leave out navigation, advertisements and the like, by simple rules; else all that a page shows.
      url_ids: documents are called by their addresses, which also decide the side of the split; of several with one
        address the first is kept. Else they are numbered.
    """

    paths: tuple[str, ...]
    name: str = "web"
    format: Literal["auto", "warc"] = "auto"
    main_content: bool = True
    url_ids: bool = False
    max_record_bytes: int = 8 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")

    @property
    def given_ids(self) -> bool:
        """As in FilesSourceConfig."""
        return self.url_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTreeConfig:
    """Code: every file of a directory of repositories is a document, called by its path.

    What is passed over is counted: hidden files and version control, vendored and minified code, lock files, binaries.

    Attributes:
      paths: as in FilesSourceConfig.
      languages: keys of `LANGUAGES`; () is all of them, or none if there are extensions.
      extensions: others to read, such as (".proto",).
      vendored: read node_modules, third_party and their like as well.
      max_file_bytes: larger files are passed over.
    """

    paths: tuple[str, ...]
    name: str = "code"
    languages: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    vendored: bool = False
    max_file_bytes: int = 1 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one directory, glob or address, got ()")
        unknown = sorted(set(self.languages) - set(LANGUAGES))
        require(not unknown, self, f"languages must be of {sorted(LANGUAGES)}, got {unknown}; others by extensions")
        wrong = [extension for extension in self.extensions if not extension.startswith(".")]
        require(not wrong, self, f"extensions begin with a dot, got {wrong}")
        positive(self, "max_file_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSourceConfig:
    """A dataset of the Hugging Face hub.

    Without `revision` and `files` it is read as the hub has converted it to parquet, or where it has not, or only in
    part, from the files of the repository whose paths have the split in them.

    Attributes:
      dataset: "owner/name".
      config: of the dataset, also called subset; None is "default", or the only one.
      split: "partial-train" is the part of a large one that the hub has converted.
      revision: branch, tag or commit of the repository; None is the newest. A commit makes runs repeatable.
      files: globs in the repository, in place of config and split.
      text_field, id_field, max_record_bytes: as in FilesSourceConfig.
    """

    dataset: str
    name: str = "hub"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: tuple[str, ...] = ()
    text_field: str = "text"
    id_field: str | None = None
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        parts = self.dataset.split("/")
        require(len(parts) == 2 and all(parts), self, f'dataset must be "owner/name", got {self.dataset!r}')
        positive(self, "max_record_bytes")

    @property
    def given_ids(self) -> bool:
        """As in FilesSourceConfig."""
        return self.id_field is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonLibrarySourceConfig:
    """The modules of the running interpreter's own standard library; no download.

    `include_tests` adds the test packages, about one and a half times the size of the rest.
    """

    name: str = "python"
    include_tests: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationFilesSourceConfig:
    """Conversations from jsonl or parquet: lists of messages, or an instruction (perhaps with an input) and an output.

    `slmjax.data.conversations.parse_conversation` knows the usual names of the fields; others are named here. Equal
    first user turns fall on the same side of the split.

    Attributes:
      paths, format, max_record_bytes: as in FilesSourceConfig.
      messages_field: field with a list of {"role": "system" | "user" | "assistant", "content": text}.
      instruction_field: field of the question where it is not instruction, prompt or question; needs output_field.
      output_field: field of its answer.
    """

    paths: tuple[str, ...]
    name: str = "conversations"
    format: Literal["auto", "jsonl", "parquet", "arrow"] = "auto"
    messages_field: str = "messages"
    instruction_field: str | None = None
    output_field: str | None = None
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        require(
            (self.instruction_field is None) == (self.output_field is None),
            self,
            f"instruction_field and output_field go together, got {self.instruction_field!r}, {self.output_field!r}",
        )
        positive(self, "max_record_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonFunctionsSourceConfig:
    """Instruction pairs from the running interpreter's standard library: signature and docstring -> function.

    A module's functions fall on the same side of the split as the module itself in PythonLibrarySourceConfig, given the
    same SplitConfig.

    Attributes:
      instruction: first line of every prompt.
      max_prompt_chars: longer prompts (of which the first paragraph of the docstring is a part) are left out.
      max_answer_chars: longer functions are left out.
    """

    name: str = "python_functions"
    include_tests: bool = False
    instruction: str = "Write a Python function."
    max_prompt_chars: int = 600
    max_answer_chars: int = 1200

    def __post_init__(self):
        positive(self, "max_prompt_chars", "max_answer_chars")


TextSourceConfig = (
    FilesSourceConfig
    | WarcSourceConfig
    | SourceTreeConfig
    | HubSourceConfig
    | PythonLibrarySourceConfig
    | GeneratedFilesSourceConfig
)
ConversationSourceConfig = ConversationFilesSourceConfig | PythonFunctionsSourceConfig
