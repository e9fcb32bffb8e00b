"""Where documents and conversations come from."""

import dataclasses
from typing import Literal

from slmjax.config.check import positive, require
from slmjax.config.quality import GeneratedFilesSourceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesSourceConfig:
    """Text from files: every jsonl line, parquet row, or whole .txt, .md file is a document.

    Attributes:
      paths: files, directories (searched in depth), globs, or fsspec addresses of any of these; environment variables
        and ~ are expanded.
      name: of this source in identifiers and in the manifest.
      format: "auto" goes by the extension (.jsonl, .ndjson, .parquet, .txt, .md, each but parquet also .gz and .zst);
        the others read every file that way, whatever it is called.
      text_field: field of the text in jsonl and parquet.
      id_field: field that identifies a document, also on which side of the split it falls; None numbers the documents
        of a file and splits by the hash of their text.
      max_record_bytes: longer lines and files go to quarantine.
    """

    paths: tuple[str, ...]
    name: str = "files"
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    text_field: str = "text"
    id_field: str | None = None
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")


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
    format: Literal["auto", "jsonl", "parquet"] = "auto"
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


TextSourceConfig = FilesSourceConfig | PythonLibrarySourceConfig | GeneratedFilesSourceConfig
ConversationSourceConfig = ConversationFilesSourceConfig | PythonFunctionsSourceConfig
