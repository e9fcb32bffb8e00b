"""Words as datatrove counts them in English. What is expected was recorded from spaCy 3.8.18's blank English."""

# ruff: noqa: RUF001 (typographic characters are what is tested)
import pytest

from data_pipelines.stages import english

RULES = english.Rules()


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ("word", "word"),
        ("word,", "word|,"),
        ("(word).", "(|word|)|."),
        ('"Really?!"', '"|Really|?|!|"'),
        ("don't", "do|n't"),
        ("Don’t", "Do|n’t"),
        ("cannot", "can|not"),
        ("I'd've", "I|'d|'ve"),
        ("well", "well"),
        ("its", "its"),
        ("we're", "we|'re"),
        ("dog's", "dog|'s"),
        ("U.S.", "U.S."),
        ("e.g.", "e.g."),
        ("(e.g.", "(|e.g."),
        ("end.", "end|."),
        ("ABC.", "ABC|."),
        ("A.", "A."),
        ("a.", "a."),
        ("1.", "1|."),
        ("10km", "10|km"),
        ("5%", "5|%"),
        ("$5.99", "$|5.99"),
        ("US$5", "US$|5"),
        ("C++", "C++"),
        ("1+2", "1|+|2"),
        ("+1", "+1"),
        ("wait...", "wait|..."),
        ("...", "..."),
        ("a...b", "a|...|b"),
        ("well-known", "well|-|known"),
        ("2-3", "2|-|3"),
        ("x=1", "x=1"),
        ("key:value", "key|:|value"),
        ("and/or", "and/or"),
        ("this/that", "this|/|that"),
        ("one.Two", "one|.|Two"),
        ("a,b", "a|,|b"),
        ("1,000", "1,000"),
        ("http://example.com/a-b?c=d,", "http://example.com/a-b?c=d|,"),
        ("user@example.com", "user@example.com"),
        ("10.0.0.1", "10.0.0.1"),
        (":-)", ":-)"),
        ("(8)", "(|8)"),
        ("''word''", "''|word|''"),
        ("__init__", "_|_|init|_|_"),
        ("*emphasis*", "*|emphasis|*"),
        ("10am", "10|am"),
        ("snake_case()", "snake_case|(|)"),
        ("f(x)", "f(x|)"),
        ("—dash—", "—|dash|—"),
        ("naïve,", "naïve|,"),
        ("🙂🙂", "🙂|🙂"),
        ("x🙂y", "x|🙂|y"),
        ("°C.", "°|C|."),
    ],
)
def test_known_words(chunk, words):
    assert RULES.split(chunk) == words.split("|")


def test_nothing_is_lost_or_added():
    for chunk in ("'" * 44, "((((a))))", "a" * 1000, "....", "+", "'s", "$", "\u3000", "a.b.c.d", "-" * 30, "::", "!?"):
        assert "".join(RULES.split(chunk)) == chunk


def test_exceptions_are_their_pieces_together():
    exceptions = english.exceptions()
    assert len(exceptions) == 1343
    assert all("".join(pieces) == whole for whole, pieces in exceptions.items())
    assert all(RULES.split(whole) == list(pieces) for whole, pieces in exceptions.items())
