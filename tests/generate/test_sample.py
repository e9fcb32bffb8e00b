import io
import json

import pytest
from rich.console import Console
from trained_run import make_trained_run

from slmjax.generate.sample import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("sample"))


def quiet():
    return Console(file=io.StringIO(), width=100, highlight=False)


def kept(run):
    with open(f"{run.output_dir}/samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_samples_are_printed_and_appended(run):
    console = quiet()
    first = sample(run, ["def add_1(x):\n", ""], seed=3, console=console)
    second = sample(run, ["def"], seed=3, step=10, console=quiet())
    assert kept(run) == first + second
    assert [record["prompt"] for record in kept(run)] == ["def add_1(x):\n", "", "def"]
    assert [record["checkpoint_step"] for record in kept(run)] == [20, 20, 10]
    assert all(0 < record["tokens"] <= 8 for record in first)
    assert first[0]["temperature"] == 1.0
    assert first[0]["seed"] == 3
    shown = console.file.getvalue()
    assert "def add_1(x):\n" in shown
    assert "step 20, temperature 1" in shown


def test_the_same_seed_gives_the_same_samples(run):
    first, again, other = (sample(run, ["def "], seed=seed, console=quiet()) for seed in (0, 0, 1))
    assert first == again
    assert first[0]["completion"] != other[0]["completion"]


def test_instruct_wraps_the_prompt_in_a_turn(run):
    prompt = ["def add_1(x):\n"]
    wrapped = sample(run, prompt, instruct=True, console=quiet())
    assert wrapped[0]["instruct"] is True
    assert wrapped[0]["completion"] != sample(run, prompt, console=quiet())[0]["completion"]
    with pytest.raises(ValueError, match="the user's, is empty"):
        sample(run, [""], instruct=True, console=quiet())


def test_a_prompt_longer_than_the_context_is_an_error_and_nothing_is_kept(run):
    before = kept(run)
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, which leaves no room in a context of 64"):
        sample(run, ["short", "long " * 100], console=quiet())
    assert kept(run) == before
