"""The chat template: conversations as token ids, with the assistant's turns marked as what is learned.

    <s> [<|system|> text <|end|>] (<|user|> text <|end|> <|assistant|> text <|end|>)+ </s>

The marks are control ids, which text can never spell.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from slmjax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer

_MARKS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
# Question and answer fields of the usual single-turn data sets (Alpaca, completion sets, GSM8K).
_PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation, from bos to eos as a token store wants them, and whether each is learned.

    Learned are the assistant's text and the <|end|> after it: (ids, weights), of equal length, weights 0 or 1.

    Raises:
      ValueError: as `check_answered`.
    """
    check_answered(messages)
    ids, weights = _render_turns(messages, tokenizer)
    return [*ids, tokenizer.eos_id], [*weights, 0]


def render_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Ids from bos to the mark after which the assistant answers; a prefix of what `render` gives with the answer.

    Raises:
      ValueError: as `check_messages`, or the last message is not the user's.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message of a prompt must be the user's, got role {messages[-1]['role']!r}")
    return [*_render_turns(messages, tokenizer)[0], tokenizer.control_id(ASSISTANT)]


def _render_turns(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids, weights = [tokenizer.bos_id], [0]
    end = tokenizer.control_id(END)
    for message, text_ids in zip(messages, tokenizer.encode_batch([m["content"] for m in messages]), strict=True):
        ids += [tokenizer.control_id(_MARKS[message["role"]]), *text_ids, end]
        weights += [0] + [int(message["role"] == "assistant")] * (len(text_ids) + 1)
    return ids, weights


def learned_bytes(messages: Sequence[Mapping[str, Any]]) -> int:
    """UTF-8 bytes of the assistant's text: what bits per byte of a conversation are counted over."""
    return sum(len(message["content"].encode()) for message in messages if message["role"] == "assistant")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a conversation is one: an optional system message, then user and assistant in turn.

    Raises:
      ValueError: naming the message and what is wrong with it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
        raise ValueError(f"messages must be a list of at least one message, got {_short(messages)}")
    expected = "user"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"message {i} must have the fields role and content, got {_short(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in _MARKS:
            raise ValueError(f"message {i} has the unknown role {_short(role)}; known are {', '.join(_MARKS)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} must have text as its content, got {_short(content)}")
        if not content.strip():
            raise ValueError(f"message {i}, the {role}'s, is empty")
        if role == "system" and i == 0:
            continue
        if role != expected:
            raise ValueError(f"message {i} should be the {expected}'s, got role {role!r}: user and assistant alternate")
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] == "system":
        raise ValueError("the conversation has a system message and nothing else")


def check_answered(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a conversation is one that something can be learned from.

    Raises:
      ValueError: as `check_messages`, or no turn is the assistant's.
    """
    check_messages(messages)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message, so there is nothing to learn from it")


def parse_conversation(record: Mapping[str, Any]) -> list[Message]:
    """Messages of one record: {"messages": [{"role", "content"}, ...]}, or a pair of question and answer.

    Pairs are instruction (with an optional `input`, added after a blank line) and output, prompt and completion,
    question and answer; an optional `system` field becomes the system message.

    Raises:
      ValueError: no known form, or as `check_messages`.
    """
    if "messages" in record:
        check_messages(record["messages"])
        return [Message(role=message["role"], content=message["content"]) for message in record["messages"]]
    for question, answer in _PAIRS:
        if question in record and answer in record:
            messages = [
                Message(role="user", content=record[question]),
                Message(role="assistant", content=record[answer]),
            ]
            if record.get("system"):
                messages.insert(0, Message(role="system", content=record["system"]))
            check_messages(messages)
            if record.get("input"):
                messages[-2]["content"] += f"\n\n{record['input']}"
            return messages
    forms = " or ".join(f"{question} and {answer}" for question, answer in _PAIRS)
    raise ValueError(f"a conversation needs the field messages, or {forms}; got the fields {sorted(map(str, record))}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
