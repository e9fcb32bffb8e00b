"""Rules on the turns of conversations."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.stages import language
from data_pipelines.stages.texts import Texts
from slmjax.config import ConversationFilterConfig, LanguageFilterConfig

_FENCE = re.compile(r"(?m)^[ \t]*(?:```|~~~)")
_FENCED = re.compile(r"(?ms)^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)")
_INLINE = re.compile(r"`[^`\n]+`")
_STRUCTURED = re.compile(r"\s|[-*+\u2022] |\d+[.)] |#|\||>")
_STOPS_INSIDE = frozenset(",;-\u2013\u2014([{/=+&")
_COUNTS = (
    *("role_errors", "empty_turns", "echoes", "refusals", "boilerplate", "placeholders", "marks"),
    *("open_fences", "unfinished", "language_changes"),
    *("shortest_question", "longest_question", "shortest_answer", "longest_answer"),
)

Messages = Sequence[Mapping[str, Any]]


def measure(config: ConversationFilterConfig, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns the attributes of conversations after their ids."""
    conversations = batch.column("messages").to_pylist()
    measured = [_measure_one(config, messages) for messages in conversations]
    if config.languages:
        for attributes, changes in zip(measured, _language_changes(config, conversations), strict=True):
            attributes["language_changes"] = changes
    columns: dict[str, pa.Array] = {
        name: pa.array([attributes[name] for attributes in measured], pa.int64()) for name in _COUNTS
    }
    columns["copied_share"] = pa.array([attributes["copied_share"] for attributes in measured], pa.float64())
    return pa.record_batch({"id": batch.column("id"), **columns})


def _measure_one(config: ConversationFilterConfig, messages: Messages) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    found["role_errors"] = role_errors([message["role"] for message in messages])
    copied, question = 0.0, ""
    words: dict[str, list[int]] = {"user": [], "assistant": []}
    for message in messages:
        role, text = message["role"], message["content"]
        words.setdefault(role, []).append(len(text.split()))
        found["empty_turns"] += not any(character.isalnum() for character in text)
        found["open_fences"] += len(_FENCE.findall(text)) % 2
        prose = _INLINE.sub(" ", _FENCED.sub(" ", text)) if "`" in text or "~~~" in text else text
        found["placeholders"] += sum(len(pattern.findall(prose)) for pattern in _compiled(config.placeholders))
        found["marks"] += sum(len(pattern.findall(prose)) for pattern in _compiled(config.marks))
        if role == "assistant":
            small = text.lower().replace("\u2019", "'").strip()
            asked, answered = question.lower().split(), text.lower().split()
            found["echoes"] += answered == asked
            found["refusals"] += small.startswith(_lowered(config.refusals))
            found["boilerplate"] += any(phrase in small for phrase in _lowered(config.boilerplate))
            found["unfinished"] += is_unfinished(config, text)
            copied = max(copied, copied_share(asked, answered, config.copied_words))
        elif role == "user":
            question = text
    found["copied_share"] = copied
    for name, role in (("question", "user"), ("answer", "assistant")):
        found[f"shortest_{name}"], found[f"longest_{name}"] = min(words[role], default=0), max(words[role], default=0)
    return found


def role_errors(roles: Sequence[str]) -> int:
    """How many turns are not whose turn it is, the missing last answer among them."""
    turns = list(roles[1:] if roles and roles[0] == "system" else roles)
    expected, wrong = "user", 0
    for role in turns:
        wrong += role != expected
        expected = "assistant" if role == "user" else "user"
    return wrong + (not turns or turns[-1] != "assistant")


def copied_share(question: Sequence[str], answer: Sequence[str], run: int) -> float:
    """Share of the words of `answer` in runs of `run` words that also stand in `question`."""
    if len(answer) < run or len(question) < run:
        return 0.0
    known = {tuple(question[i : i + run]) for i in range(len(question) - run + 1)}
    copied = np.zeros(len(answer), bool)
    for i in range(len(answer) - run + 1):
        if tuple(answer[i : i + run]) in known:
            copied[i : i + run] = True
    return float(copied.mean())


def is_unfinished(config: ConversationFilterConfig, answer: str) -> bool:
    """Whether an answer breaks off; see the config."""
    text = answer.rstrip()
    if config.ending is not None:
        return re.search(rf"(?:{config.ending})\Z", text) is None
    if len(text.split()) < config.finished_words:
        return False
    last_line = text[text.rfind("\n") + 1 :]
    if _FENCE.match(last_line) or _STRUCTURED.match(last_line):
        return False
    return text[-1].isalpha() or text[-1] in _STOPS_INSIDE


@functools.cache
def _lowered(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(phrase.lower() for phrase in phrases)


@functools.cache
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern, ...]:
    return tuple(map(re.compile, patterns))


def _language_changes(config: ConversationFilterConfig, conversations: Sequence[Messages]) -> np.ndarray:
    """Of each conversation, how many answers are in another language than their question."""
    pairs: list[tuple[int, str, str]] = []
    for number, messages in enumerate(conversations):
        question = ""
        for message in messages:
            if message["role"] == "user":
                question = message["content"]
            elif message["role"] == "assistant":
                pairs.append((number, question, message["content"]))
    changes = np.zeros(len(conversations), np.int64)
    if pairs:
        numbers, questions, answers = (list(column) for column in zip(*pairs, strict=True))
        asked, answered = (language.measure(LanguageFilterConfig(), Texts.of(texts)) for texts in (questions, answers))
        sure = [np.asarray(each["language_score"].to_numpy()) >= config.language_score for each in (asked, answered)]
        differ = np.array(asked["language"].to_pylist()) != np.array(answered["language"].to_pylist())
        np.add.at(changes, numbers, differ & sure[0] & sure[1])
    return changes
