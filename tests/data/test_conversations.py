import pytest

from slmjax.data.conversations import learned_bytes, parse_conversation, render, render_prompt
from slmjax.data.tokenizer import train_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <|end|>?"},
    {"role": "assistant", "content": "A märk."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "\n ok "},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        ["What is it? Be brief. Thanks, a mark. " * 5], tmp_path_factory.mktemp("t") / "t.model", vocab_size=330
    )


def test_template_and_learned_tokens(tokenizer):
    ids, weights = render(TALK, tokenizer)
    controls = {
        tokenizer.control_id(name): name
        for name in ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    }
    shape = [controls[token_id] for token_id in ids if token_id in controls]
    turns = [
        name for role in ("system", "user", "assistant", "user", "assistant") for name in (f"<|{role}|>", "<|end|>")
    ]
    assert shape == ["<s>", *turns, "</s>"]
    assert tokenizer.decode(ids) == "".join(message["content"] for message in TALK)
    learned = [token_id for token_id, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(learned) == "A märk.\n ok "
    assert [controls[token_id] for token_id in learned if token_id in controls] == ["<|end|>", "<|end|>"]
    assert set(weights) == {0, 1}
    assert learned_bytes(TALK) == len("A märk.\n ok ".encode())


@pytest.mark.parametrize("turns", [2, 4])
def test_a_prompt_is_a_prefix_of_the_conversation_up_to_the_first_learned_token(tokenizer, turns):
    prompt = render_prompt(TALK[:turns], tokenizer)
    ids, weights = render(TALK[: turns + 1], tokenizer)
    assert ids[: len(prompt)] == prompt
    assert weights[len(prompt)] == 1
    assert weights[len(prompt) - 1] == 0


PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [{**m, "name": "x"} for m in TALK], "id": 3}, TALK),
        ({"instruction": "q", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, PAIR[1]]),
        ({"prompt": "q", "completion": "a"}, PAIR),
        ({"question": "q", "answer": "a", "system": "s"}, [{"role": "system", "content": "s"}, *PAIR]),
    ],
)
def test_parses_the_common_forms(record, messages):
    assert parse_conversation(record) == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"needs the field messages, or .*; got the fields \['text'\]"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "message 0 must have the fields role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'; known are system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [PAIR[1]]}, "message 0 should be the user's, got role 'assistant'"),
        ({"messages": [PAIR[0], PAIR[0]]}, "message 1 should be the assistant's"),
        ({"messages": [*PAIR, TALK[0]]}, "message 2 should be the user's, got role 'system'"),
        ({"messages": [TALK[0]]}, "nothing else"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 must have text as its content, got 3"),
        ({"instruction": "q", "output": " \n"}, "message 1, the assistant's, is empty"),
        ({"question": None, "answer": "a"}, "message 0 must have text"),
    ],
)
def test_what_is_no_conversation_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        parse_conversation(record)


def test_nothing_to_learn_and_no_question(tokenizer):
    with pytest.raises(ValueError, match="no assistant message"):
        render(TALK[:2], tokenizer)
    with pytest.raises(ValueError, match="must be the user's, got role 'assistant'"):
        render_prompt(TALK[:3], tokenizer)
