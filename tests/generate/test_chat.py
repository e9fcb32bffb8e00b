import io
import sys

import jax
import pytest
from rich.console import Console
from trained_run import make_trained_run

from slmjax.config import GenerationConfig
from slmjax.data.conversations import render_prompt
from slmjax.data.tokenizer import Tokenizer
from slmjax.generate.chat import Conversation, chat
from slmjax.generate.text import printable, stream_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(run):
    return Tokenizer.load(run.input.tokenizer)


class Parrot:
    """Stands in for a Generator: notes the prompt, and answers with fixed pieces of text."""

    def __init__(self, tokenizer, *pieces, context_length=64):
        self.context_length = context_length
        self.prompts = []
        self._pieces = [tokenizer.encode(piece) for piece in pieces]

    def stream(self, prompts, *, config, key, stop_ids):
        self.prompts += prompts
        return ([piece] for piece in self._pieces)


def conversation(parrot, tokenizer, max_new_tokens=10):
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    return Conversation(parrot, tokenizer, config, stop_ids=[], key=jax.random.key(0))


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_the_model_sees_the_turns_before(tokenizer):
    parrot = Parrot(tokenizer, "re", "turn")
    talk = conversation(parrot, tokenizer)
    assert "".join(talk.reply("x")) == "return"
    assert "".join(talk.reply("y")) == "return"
    assert talk.messages == turns("x", "return", "y", "return")
    assert parrot.prompts[1] == render_prompt(turns("x", "return", "y"), tokenizer)
    talk.reset()
    list(talk.reply("z"))
    assert parrot.prompts[2] == render_prompt(turns("z"), tokenizer)


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tokenizer):
    parrot = Parrot(tokenizer, "abc")
    talk = conversation(parrot, tokenizer, max_new_tokens=30)
    dropped = []
    for _ in range(4):
        list(talk.reply("x + 1 + 2"))
        dropped.append(talk.dropped)
    assert dropped[0] == 0
    assert dropped[-1] == 2  # from then on one exchange for each new one
    assert all(len(prompt) <= 64 - 30 for prompt in parrot.prompts)
    assert len(talk.messages) % 2 == 0


def test_a_message_too_long_for_the_context_leaves_the_conversation_alone(run, tokenizer):
    from slmjax.generate.sample import make_generator
    from slmjax.train.restore import load_run

    talk = conversation(make_generator(load_run(run), run), tokenizer)
    with pytest.raises(ValueError, match="leaves no room"):
        talk.reply("long " * 100)
    assert talk.messages == []


def test_an_answer_that_is_cut_short_is_remembered_as_far_as_it_was_read(tokenizer):
    talk = conversation(Parrot(tokenizer, "one ", "two"), tokenizer)
    pieces = talk.reply("x")
    assert next(pieces) == "one "
    pieces.close()
    assert talk.messages == turns("x", "one ")


def test_a_question_without_an_answer_is_forgotten(tokenizer):
    talk = conversation(Parrot(tokenizer, " ", ""), tokenizer)
    list(talk.reply("x"))
    assert talk.messages == []


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "naïve 😀 end"
    pieces = [[token] for token in tokenizer.encode(text)]
    assert any(token > 255 for (token,) in pieces)
    shown = list(stream_text(pieces, tokenizer))
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)
    cut = tokenizer.encode("😀")[:-1]
    assert "".join(stream_text([cut], tokenizer)).startswith("\ufffd")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\tc\nd\x07\x9b") == "a\ufffd[31mb\tc\nd\ufffd\ufffd"


def talk_through_a_pipe(run, monkeypatch, lines):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stdout", screen)  # input() writes its prompt there
    chat(run, console=Console(file=screen, width=80, highlight=False))
    return screen.getvalue()


def test_chat_through_a_pipe(run, monkeypatch):
    shown = talk_through_a_pipe(
        run, monkeypatch, "hello [red]\n\n/reset\n/what [bold]\n" + "long " * 100 + "\n/quit\nnever\n"
    )
    assert "step 20" in shown
    assert "hello [red]" in shown
    assert "the conversation starts anew" in shown
    assert "unknown command /what [bold]" in shown
    assert "leaves no room" in shown
    assert "never" not in shown


def test_bytes_that_are_no_text_do_not_end_the_chat(run, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"bad \xff\xfe\n/what\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    chat(run, console=Console(file=screen, width=80, highlight=False))
    assert "bad \ufffd" in screen.getvalue()
    assert "unknown command /what" in screen.getvalue()


def test_chat_ends_with_its_input(run, monkeypatch):
    assert "you>" in talk_through_a_pipe(run, monkeypatch, "")
