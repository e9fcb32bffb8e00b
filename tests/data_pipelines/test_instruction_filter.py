"""Rules on the turns of conversations: what each finds and leaves, alone and in a pipeline."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines import stages
from data_pipelines.run import run
from data_pipelines.stages import conversation
from slmjax.config import (
    ConversationFilesSourceConfig,
    ConversationFilterConfig,
    ExactDedupConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    MaskPersonalDataConfig,
    PipelineConfig,
    SplitConfig,
    TrainTokenizerConfig,
)
from slmjax.gin_loader import load

QUIET = Console(file=io.StringIO())
CONFIG = ConversationFilterConfig()
LONG = (
    "The river rises in the hills, turns to the south and reaches the sea after two hundred miles, where ships wait for"
)


def talk(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def batch_of(conversations):
    ids = [f"c{i}" for i in range(len(conversations))]
    return pa.record_batch({"id": pa.array(ids), "messages": pa.array(conversations)})


def rule(messages, config=CONFIG):
    """The first rule that a conversation breaks."""
    return stages.failed_rules(config, conversation.measure(config, batch_of([messages])))[0]


@pytest.mark.parametrize(
    ("expected", "messages"),
    [
        ("", talk("What is the capital of France?", "Paris.")),
        ("", talk("What is 3 + 4?", "7")),
        ("", talk("Hi", "Hello! How can I help?", "Tell me a joke", "Why did the duck cross?\n\n- ask it\n- or not")),
        ("", [{"role": "system", "content": "Be short."}, *talk("Say it", "It.")]),
        ("max_role_errors", talk("Hi", "Hello", "And?")),
        ("max_role_errors", [{"role": "assistant", "content": "Hello"}, *talk("Hi", "Yes")]),
        ("max_role_errors", [*talk("Hi", "Yes"), {"role": "system", "content": "Be short."}]),
        ("max_empty_turns", talk("What now?", "...")),
        ("max_echoes", talk("Add two  and Two", "add two and two")),
        ("max_copied_share", talk(f"Rewrite: {LONG} cargo.", f"{LONG} cargo.")),
        ("max_refusals", talk("Write a poem", "I\u2019m sorry, but that is beyond me.")),
        ("max_boilerplate", talk("Do you like it?", "Well, as an AI language model I do not eat.")),
        ("max_placeholders", talk("Write a letter", "Dear [INSERT NAME HERE], hello.")),
        ("max_placeholders", talk("Write to {{ customer_name }}", "Dear Ann")),
        ("max_placeholders", talk("Write a letter", "Dear <name>, hello.")),
        ("", talk("Make a link", "It is [your text](https://a.example) as I said.")),
        ("", talk("Use Jinja", "```jinja\nHello {{ name }}\n```\nand `{{ inline }}` too.")),
        ("", talk("Half of it?", r"It is $\frac{{1}}{2}$.")),
        ("max_marks", talk("Hi", "Hello<|im_end|>")),
        ("max_marks", talk("[INST] Hi", "Hello")),
        ("max_marks", talk("Hi", "Fine. ### Response: Fine.")),
        ("max_marks", talk("Hi", "<\uff5cAssistant\uff5c>Hello")),
        ("", talk("What does ChatML look like?", "Like this: `<|im_start|>user`.")),
        ("max_open_fences", talk("Code?", "```python\nprint(1)")),
        ("", talk("Code?", "```python\nprint(1)\n```")),
        ("max_unfinished", talk("Tell me about the river.", LONG)),
        ("max_unfinished", talk("Tell me about the river.", f"{LONG} cargo, fish,")),
        ("", talk("Tell me about the river.", f"{LONG} cargo.")),
        ("", talk("Tell me about the river.", f"{LONG} cargo.\n\n1. The source")),
        ("", talk("Write words", "one two three")),
        ("", talk("Write a function.", "def f(x):\n" + "    x += 1\n" * 9 + "    return x")),
    ],
)
def test_each_rule_finds_what_it_is_for(expected, messages):
    assert rule(messages) == expected


def test_bounds_on_words_are_of_every_turn():
    messages = talk("one two three", "four five", "six", "seven eight nine ten")
    measured = conversation.measure(CONFIG, batch_of([messages])).to_pylist()[0]
    named = [measured[f"{side}_{what}"] for what in ("question", "answer") for side in ("shortest", "longest")]
    assert named == [1, 3, 2, 4]
    assert rule(messages, dataclasses.replace(CONFIG, min_shortest_question=2)) == "min_shortest_question"
    assert rule(messages, dataclasses.replace(CONFIG, max_longest_answer=3)) == "max_longest_answer"


def test_an_ending_that_every_answer_must_have():
    config = dataclasses.replace(CONFIG, ending=r"#### -?[\d,.]+")
    assert rule(talk("1 + 1?", "One and one.\n#### 2\n"), config) == ""
    assert rule(talk("1 + 1?", "One and one."), config) == "max_unfinished"
    assert rule(talk("1 + 1?", "#### 2 is the answer"), config) == "max_unfinished"


def test_the_share_that_is_copied():
    assert conversation.copied_share("abcdef", "xabcydef", 3) == pytest.approx(6 / 8)
    assert conversation.copied_share("ab", "ab", 3) == 0.0
    assert conversation.copied_share("ab", "abx", 1) == pytest.approx(2 / 3)


def test_languages_of_question_and_answer():
    pytest.importorskip("py3langid")
    english = "Where does the river rise, and how long does it take the water to reach the sea from there?"
    german = "Der Fluss entspringt in den Bergen und braucht mehrere Wochen, bis sein Wasser das Meer erreicht."
    conversations = [talk(english, german), talk(english, f"{LONG} cargo."), talk(german, german[:40], english, german)]
    config = ConversationFilterConfig(languages=True, language_score=0.8)
    changes = conversation.measure(config, batch_of(conversations)).column("language_changes").to_pylist()
    assert changes == [1, 0, 1]
    unmeasured = conversation.measure(CONFIG, batch_of(conversations)).column("language_changes").to_pylist()
    assert unmeasured == [0, 0, 0]


def test_languages_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[data\]'"):
        stages.check_installed([ConversationFilterConfig(languages=True)])
    stages.check_installed([CONFIG])


texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60)
roles = st.sampled_from(["system", "user", "assistant"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(roles, texts), min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_conversation_is_measured_and_others_do_not_matter(conversations):
    messages = [[{"role": role, "content": text} for role, text in turns] for turns in conversations]
    together = conversation.measure(CONFIG, batch_of(messages)).drop_columns(["id"]).to_pylist()
    alone = [conversation.measure(CONFIG, batch_of([each])).drop_columns(["id"]).to_pylist()[0] for each in messages]
    assert together == alone


def config_of(root, rows, *filters, **changes):
    (root / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = PipelineConfig(
        output_dir=str(root / "data"),
        sources=(ConversationFilesSourceConfig(paths=(str(root / "talks.jsonl"),)),),
        stages=filters,
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.0),
        num_workers=1,
    )
    return dataclasses.replace(config, **changes)


def reasons(config, root):
    run(config, console=QUIET)
    rows = pq.read_table(next((root / "data/work/decisions").iterdir())).to_pylist()
    return [row["reason"] for row in rows]


ROWS = [
    {"question": "What is the height of the tower?", "answer": "The tower is 300 metres high."},
    {"question": "what is the height of  the tower?", "answer": "It is 300 metres high, with its antenna 330."},
    {"question": "Where is it?", "answer": "Write to <EMAIL> or a.b@example.org, please."},
    {"question": "Where is he?", "answer": "As an AI language model, I do not know."},
    {"messages": talk("What is the height of the tower?", "300 metres.", "And its weight?", "7,300 tonnes.")},
]


def test_conversations_in_a_pipeline(tmp_path):
    filters = (
        MaskPersonalDataConfig(kinds=("email",)),
        LengthFilterConfig(min_words=2),
        ConversationFilterConfig(placeholders=("<EMAIL>",)),
        ExactDedupConfig(by="question", survivor="longest"),
    )
    found = reasons(config_of(tmp_path, ROWS, *filters), tmp_path)
    assert found == [
        "exact_dedup.duplicate_question",
        None,
        "conversation_filter.max_placeholders",
        "conversation_filter.max_refusals",
        None,
    ]
    rows = pq.read_table(next((tmp_path / "data/work/attributes/conversation_filter").iterdir())).to_pylist()
    assert rows[2]["placeholders"] == 2  # the messages are measured as they were masked

    marker = next((tmp_path / "data/work/markers/conversation_filter").iterdir())
    before = marker.stat().st_mtime_ns
    looser = (*filters[:2], dataclasses.replace(filters[2], max_refusals=None, max_boilerplate=None), filters[3])
    found = reasons(config_of(tmp_path, ROWS, *looser), tmp_path)
    assert found[3] is None
    assert marker.stat().st_mtime_ns == before  # bounds do not change what is measured


def test_what_does_not_fit_is_refused(tmp_path):
    texts = (FilesSourceConfig(paths=("x",)),)
    for stage in (CONFIG, ExactDedupConfig(by="question")):
        with pytest.raises(ValueError, match="look at questions and answers, but sources has texts"):
            config_of(tmp_path, ROWS, stage, sources=texts)
    with pytest.raises(ValueError, match=r"marks has '\(', which is no regular expression"):
        ConversationFilterConfig(marks=("(",))
    with pytest.raises(ValueError, match=r"refusals must not be blank, got \('sorry', ' '\)"):
        ConversationFilterConfig(refusals=("sorry", " "))
    for name in ("max_copied_share", "language_score"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1, got nan"):
            ConversationFilterConfig(**{name: float("nan")})
    with pytest.raises(ValueError, match="MaskPersonalDataConfig changes texts and must come before Conversation"):
        config_of(tmp_path, ROWS, CONFIG, MaskPersonalDataConfig())


def test_the_ready_config_runs(tmp_path):
    config_of(tmp_path, ROWS)
    bindings = [
        f'PipelineConfig.output_dir = "{tmp_path}/data"',
        "PipelineConfig.sources = (@ConversationFilesSourceConfig(),)",
        f'ConversationFilesSourceConfig.paths = ("{tmp_path}/talks.jsonl",)',
        "PipelineConfig.tokenizer = @TrainTokenizerConfig()",
        "TrainTokenizerConfig.vocab_size = 340",
        "PipelineConfig.split = @SplitConfig()",
        "SplitConfig.held_out_fraction = 0.0",
        "PipelineConfig.num_workers = 1",
    ]
    config = load([Path(__file__).parents[2] / "configs/data/instruction.gin"], bindings).config
    assert reasons(config, tmp_path) == [
        "exact_dedup.duplicate_question",
        None,
        None,
        "conversation_filter.max_refusals",
        None,
    ]
