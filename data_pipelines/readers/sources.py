"""What each kind of source makes of an input file: documents, and rejects with their reasons."""

import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.documents import Document
from data_pipelines.readers import python_functions, source_trees
from data_pipelines.readers.inputs import InputFile, SourceConfig
from data_pipelines.readers.items import Record, Reject, Skip, excerpt, field
from data_pipelines.readers.records import no_file, read_bytes, read_records, read_text
from data_pipelines.readers.web_pages import Page, read_pages
from slmjax.config import (
    ConversationFilesSourceConfig,
    FilesSourceConfig,
    GeneratedFilesSourceConfig,
    HubSourceConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    SourceTreeConfig,
    WarcSourceConfig,
)
from slmjax.data.conversations import Message, check_messages, parse_conversation

Clean = Callable[[str], str]


def read_documents(source: SourceConfig, file: InputFile, clean: Clean) -> Iterator[Document | Reject | Skip]:
    """Documents of one file in order, every text passed through `clean`."""
    match source:
        case FilesSourceConfig() | HubSourceConfig():
            yield from _texts(source, file, clean)
        case WarcSourceConfig():
            yield from _pages(source, file, clean)
        case SourceTreeConfig():
            yield _source_file(source, file, clean)
        case GeneratedFilesSourceConfig():
            yield from _generated(source, file, clean)
        case ConversationFilesSourceConfig():
            yield from _conversations(source, file, clean)
        case PythonLibrarySourceConfig():
            text = _module(file)
            if isinstance(text, str):
                yield _document(f"{source.name}/{file.name}", file.name, text, clean, record=0)
            else:
                yield text
        case PythonFunctionsSourceConfig():
            text = _module(file)
            if isinstance(text, Reject):
                yield text
                return
            for name, question, answer in python_functions.pairs(text, source):
                messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
                yield _conversation(f"{source.name}/{file.name}:{name}", file.name, messages, clean, record=0)


def _texts(source: FilesSourceConfig | HubSourceConfig, file: InputFile, clean: Clean) -> Iterator[Document | Reject]:
    if file.format == "text":
        text = read_text(file, source.max_record_bytes)
        if isinstance(text, str):
            yield _document(f"{source.name}/{file.name}", None, text, clean, record=0)
        else:
            yield text
        return
    columns = [name for name in (source.text_field, source.id_field) if name]
    for item in read_records(file, columns, source.max_record_bytes, needs=source.text_field):
        if isinstance(item, Reject):
            yield item
            continue
        number, record, offset = item
        text = field(record, source.text_field)
        name = number if source.id_field is None else field(record, source.id_field)
        if text is None or name is None:
            missing = source.text_field if text is None else source.id_field
            detail = f"{missing!r} is null" if missing in record else f"no field {missing!r}, only {_names(record)}"
            yield _rejected(item, "missing_field", detail)
        elif not isinstance(text, str) or not isinstance(name, str | int):
            wrong, value = (source.id_field, name) if isinstance(text, str) else (source.text_field, text)
            yield _rejected(item, "wrong_type", f"{wrong!r} is not text but {type(value).__name__}")
        elif source.id_field is None:
            yield _document(f"{source.name}/{file.name}#{number}", None, text, clean, record=number, offset=offset)
        else:
            yield _document(f"{source.name}/{name}", str(name), text, clean, record=number, offset=offset)


def _pages(source: WarcSourceConfig, file: InputFile, clean: Clean) -> Iterator[Document | Reject | Skip]:
    if file.format != "warc":
        detail = "no web archive; name the format in the source's config, or move the file away"
        yield no_file() if file.format == "not_a_file" else Reject(0, "unsupported_extension", detail)
        return
    for item in read_pages(source, file):
        if not isinstance(item, Page):
            yield item
        elif not item.text.strip():
            yield Skip("page_without_text")
        else:
            name = item.url if source.url_ids and item.url else f"{file.name}#{item.number}"
            key = item.url or None
            yield _document(f"{source.name}/{name}", key, item.text, clean, record=item.number, offset=item.offset)


def _source_file(source: SourceTreeConfig, file: InputFile, clean: Clean) -> Document | Reject | Skip:
    if file.skipped:
        return Skip(file.skipped)
    content = read_bytes(file, source.max_file_bytes)
    if isinstance(content, Reject):
        return content
    if skipped := source_trees.skipped_content(file.name, content):
        return Skip(skipped)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Reject(0, "invalid_utf8", str(error), excerpt(content[max(0, error.start - 20) :]), error.start)
    return _document(f"{source.name}/{file.name}", None, text, clean, record=0)


def _generated(source: GeneratedFilesSourceConfig, file: InputFile, clean: Clean) -> Iterator[Document | Reject]:
    """Texts whose ids say which checkpoint made them from which prompt; the prompt is their key."""
    columns = (source.text_field, source.checkpoint_field, source.prompt_field)
    for item in read_records(file, columns, source.max_record_bytes):
        if isinstance(item, Reject):
            yield item
            continue
        number, record, offset = item
        text, checkpoint, prompt = (field(record, column) for column in columns)
        if not isinstance(text, str):
            reason = "missing_field" if text is None else "wrong_type"
            yield _rejected(item, reason, f"no text in {source.text_field!r}, only {_names(record)}")
        elif not all(isinstance(value, str | int) and str(value) for value in (checkpoint, prompt)):
            detail = f"{source.checkpoint_field} {checkpoint!r}, {source.prompt_field} {prompt!r}"
            yield Reject(number, "missing_provenance", detail, excerpt(text), offset)
        else:
            name = f"{source.name}/{checkpoint}/{prompt}#{file.name}:{number}"
            yield _document(name, str(prompt), text, clean, record=number, offset=offset)


def _conversations(source: ConversationFilesSourceConfig, file: InputFile, clean: Clean) -> Iterator[Document | Reject]:
    columns = ["messages", "instruction", "input", "output", "prompt", "completion", "question", "answer", "system"]
    named = [name for name in (source.messages_field, source.instruction_field, source.output_field) if name]
    for item in read_records(file, list(dict.fromkeys([*columns, *named])), source.max_record_bytes):
        if isinstance(item, Reject):
            yield item
            continue
        try:
            messages = parse_conversation(_rename(item.fields, source))
        except ValueError as error:
            yield _rejected(item, "bad_conversation", str(error))
            continue
        name = f"{source.name}/{file.name}#{item.number}"
        yield _conversation(name, None, messages, clean, record=item.number, offset=item.offset)


def _rename(record: Mapping[str, Any], source: ConversationFilesSourceConfig) -> Mapping[str, Any]:
    """Gives the fields of a record the names that `parse_conversation` knows."""
    if source.instruction_field is not None:
        names = {source.instruction_field: "instruction", source.output_field: "output"}
        known = {names[name]: value for name, value in record.items() if name in names}
        return {**known, **{name: record[name] for name in ("input", "system") if name in record}}
    if source.messages_field in record:
        return {"messages": record[source.messages_field]}
    return record


def _module(file: InputFile) -> str | Reject:
    """Text of a Python module, in the encoding that it declares."""
    content = b"".join(file.read())
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        return Reject(0, "invalid_encoding", str(error), excerpt(content))


def _rejected(item: Record, reason: str, detail: str) -> Reject:
    return Reject(item.number, reason, detail, excerpt(str(item.fields)), item.offset)


def _names(record: Mapping[str, Any]) -> list[str]:
    """Names of the fields, as many as people read."""
    return sorted(record)[:50]


def _document(
    name: str, key: str | None, text: str, clean: Clean, *, record: int, offset: int | None = None
) -> Document | Reject:
    problem = _problem(text)
    text = clean(text) if problem is None else text
    if problem is None and not text.strip():
        problem = "empty_text"
    if problem is not None:
        return Reject(record, problem, excerpt=excerpt(text), offset=offset)
    return Document(name, key or _digest(text), text)


def _conversation(
    name: str, key: str | None, messages: list[Message], clean: Clean, *, record: int, offset: int | None = None
) -> Document | Reject:
    text = "\n\n".join(message["content"] for message in messages)
    if problem := _problem(text):
        return Reject(record, problem, excerpt=excerpt(text), offset=offset)
    messages = [Message(role=message["role"], content=clean(message["content"])) for message in messages]
    try:
        check_messages(messages)
    except ValueError as error:  # a turn of control characters alone
        return Reject(record, "bad_conversation", str(error), excerpt(text), offset)
    if all(message["role"] != "assistant" for message in messages):
        return Reject(record, "bad_conversation", "no turn is the assistant's", excerpt(text), offset)
    first_user = next(message["content"] for message in messages if message["role"] == "user")
    text = "\n\n".join(message["content"] for message in messages)
    return Document(name, key or _digest(first_user), text, messages)


def _problem(text: str) -> str | None:
    """What no text may hold: null bytes come from binary files and wrong encodings, surrogates cannot be written."""
    if "\0" in text:
        return "null_byte"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone_surrogate"
    return None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
