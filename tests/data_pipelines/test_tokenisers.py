"""The verbs of `slmjax tokenizer`: evaluate, trim, import."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from data_pipelines.tokenizers.evaluation import ALL, evaluate
from data_pipelines.tokenizers.samples import Samples
from data_pipelines.tokenizers.trimming import count_tokens, trim, trim_file
from slmjax.cli import app, main
from slmjax.data.sentencepieces import ModelProto
from slmjax.data.tokenizer import Tokenizer, train_tokenizer

ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog returns to the quicker foxes at 12 o'clock.\n" * 3
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, und der Hund kehrt zurück: 12 Uhr.\n" * 3
RARE = "zymurgy zymurgy ŒŒ\n"
RECORDS = [
    {"id": "web/1", "text": ENGLISH, "language": "en"},
    {"id": "web/2", "text": GERMAN, "language": "de"},
    {"source": "notes", "text": RARE},
    {"text": 3},
    {"id": "web/3"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenisers")
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    texts = [ENGLISH, GERMAN, "zymurgy " * 9]
    train_tokenizer(texts, root / "bpe.model", vocab_size=400)
    train_tokenizer(texts, root / "unigram.model", vocab_size=360, model_type="unigram")
    return root


def samples(root):
    return Samples([str(root / "data.jsonl")])


def run(*arguments):
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"})


def test_evaluation_counts_what_a_loop_counts(root):
    tokenizers = [Tokenizer.load(root / name) for name in ("bpe.model", "unigram.model")]
    read = samples(root)
    for tokenizer, evaluation in zip(tokenizers, evaluate(tokenizers, read), strict=True):
        assert set(evaluation.groups) == {
            *((ALL, ""), ("source", "web"), ("source", "notes")),
            *(("language", name) for name in ("en", "de", "unknown")),
        }
        ids = {text: tokenizer.encode(text) for text in (ENGLISH, GERMAN, RARE)}
        german = evaluation.groups["language", "de"]
        assert (german.documents, german.tokens, german.words) == (1, len(ids[GERMAN]), len(GERMAN.split()))
        assert german.bytes_per_token == len(GERMAN.encode()) / len(ids[GERMAN])
        assert german.tokens_per_word == len(ids[GERMAN]) / len(GERMAN.split())
        rare = evaluation.groups["source", "notes"]
        assert rare.byte_tokens == sum(tokenizer.piece(i).startswith("<0x") for i in ids[RARE]) == 4
        web, everything = evaluation.groups["source", "web"], evaluation.groups[ALL, ""]
        assert (web.documents, everything.documents, everything.failures) == (2, 3, 0)
        assert everything.tokens == web.tokens + rare.tokens == sum(map(len, ids.values()))
        used = set().union(*ids.values())
        kinds = [tokenizer.kind(i) for i in range(tokenizer.vocab_size)]
        expected = [i for i, kind in enumerate(kinds) if kind in ("piece", "symbol") and i not in used]
        assert evaluation.unused == expected
    assert read.rejected == {"wrong_type": 1, "missing_field": 1}


def test_failures_are_counted(root, tmp_path):
    (tmp_path / "spaces.txt").write_text("the  quick fox")
    (tmp_path / "plain.txt").write_text("the quick fox")
    proto = ModelProto.FromString((root / "bpe.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    groups = evaluate([Tokenizer(proto.SerializeToString())], Samples([str(tmp_path)]))[0].groups
    assert {name: counts.failures for (_, name), counts in groups.items() if name.endswith(".txt")} == {
        "spaces.txt": 1,
        "plain.txt": 0,
    }


def test_evaluate_prints_tables_and_writes_json(root, tmp_path):
    output = tmp_path / "e.json"
    models = [root / "bpe.model", root / "unigram.model"]
    result = run("evaluate", *models, "--data", root / "data.jsonl", "--output", output)
    assert result.exit_code == 0
    for shown in ("bpe.model", "unigram.model", "notes", "de", "0 of 3", "not read: 1 missing_field, 1 wrong_type"):
        assert shown in result.output
    written = json.loads(output.read_text("utf-8"))
    assert [entry["path"] for entry in written["tokenizers"]] == [str(model) for model in models]
    assert written["tokenizers"][0]["groups"][0]["documents"] == 3


@pytest.mark.parametrize("name", ["bpe.model", "unigram.model"])
def test_trimming_drops_what_is_unused_and_keeps_the_tokens_of_the_data(root, name):
    model = (root / name).read_bytes()
    tokenizer = Tokenizer(model)
    counts = count_tokens(tokenizer, [[ENGLISH], [RARE]])
    assert counts.sum() == len(tokenizer.encode(ENGLISH)) + len(tokenizer.encode(RARE))
    trimmed = trim(model, counts)
    smaller = Tokenizer(trimmed.model)
    assert smaller.vocab_size == tokenizer.vocab_size - len(trimmed.dropped) < tokenizer.vocab_size
    assert trimmed.num_unused == len(trimmed.dropped)
    for text in (ENGLISH, RARE):
        pieces = [[each.piece(i) for i in each.encode(text)] for each in (tokenizer, smaller)]
        assert pieces[0] == pieces[1]
    assert smaller.decode(smaller.encode(GERMAN)) == GERMAN
    kept = {smaller.piece(i) for i in range(smaller.vocab_size)}
    for i in range(tokenizer.vocab_size):
        if tokenizer.kind(i) != "piece":
            assert tokenizer.piece(i) in kept
    assert not kept & set(trimmed.dropped)
    assert trim(model, counts).model == trimmed.model


@pytest.mark.parametrize("name", ["bpe.model", "unigram.model"])
def test_trimming_to_a_size_drops_the_least_used_and_loses_no_text(root, name):
    model = (root / name).read_bytes()
    tokenizer = Tokenizer(model)
    counts = count_tokens(tokenizer, [[ENGLISH, GERMAN]])
    trimmed = trim(model, counts, vocab_size=330)
    smaller = Tokenizer(trimmed.model)
    assert 326 <= smaller.vocab_size <= 330
    for text in (ENGLISH, GERMAN, RARE, "\u2581 Ω"):
        assert smaller.decode(smaller.encode(text)) == text
    assert len(smaller.encode(ENGLISH)) > len(tokenizer.encode(ENGLISH))
    most = tokenizer.piece(int(np.argmax(counts)))
    assert most not in trimmed.dropped
    assert (smaller.pad_id, smaller.bos_id, smaller.eos_id) == (0, 2, 3)
    smaller.control_id("<|user|>")


@pytest.mark.parametrize("name", ["bpe.model", "unigram.model"])
def test_spaces_come_back_even_where_no_text_held_one(root, name):
    model = (root / name).read_bytes()
    trimmed = trim(model, count_tokens(Tokenizer(model), [["dog"]]))
    smaller = Tokenizer(trimmed.model)
    assert trimmed.num_unused == len(trimmed.dropped) > 0
    assert "\u2581" not in trimmed.dropped
    for text in ("dog", ENGLISH, "  a \u2581 "):
        assert smaller.decode(smaller.encode(text)) == text


def test_every_piece_of_a_trimmed_bpe_can_be_made(root):
    model = (root / "bpe.model").read_bytes()
    tokenizer = Tokenizer(model)
    smaller = Tokenizer(trim(model, count_tokens(tokenizer, [[ENGLISH, GERMAN]]), vocab_size=350).model)
    for i in range(smaller.vocab_size):
        text = smaller.piece(i).replace("\u2581", " ")
        if smaller.kind(i) == "piece" and len(tokenizer.encode(text)) == 1:
            assert smaller.encode(text) == [i]


def test_trim_says_what_it_costs_and_refuses_what_cannot_be(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "small.model"
    result = run("trim", root / "bpe.model", output, "--data", root / "data.jsonl", "--vocab-size", 340)
    assert result.exit_code == 0
    assert "400 -> 340 ids: 60 pieces dropped" in " ".join(result.output.split())
    assert Tokenizer.load(output).sha256 in result.output
    for size in (200, 400):
        with pytest.raises(ValueError, match=rf"at least \d+ .* less than 400, the size now; got {size}"):
            trim_file(root / "bpe.model", tmp_path / "x.model", samples(root), vocab_size=size)
    (tmp_path / "empty.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match="no texts to count pieces in; 1 records were rejected"):
        trim_file(root / "bpe.model", tmp_path / "x.model", Samples([str(tmp_path / "empty.jsonl")]))
    with pytest.raises(ValueError, match="no texts to evaluate on; 1 records"):
        evaluate([Tokenizer.load(output)], Samples([str(tmp_path / "empty.jsonl")]))
    assert not (tmp_path / "x.model").exists()
    arguments = ["tokenizer", "evaluate", str(tmp_path / "no.model"), "--data", str(root)]
    monkeypatch.setattr("sys.argv", ["slmjax", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "cannot read the tokenizer model" in capsys.readouterr().err


def test_import_writes_a_file_that_loads(root, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([ENGLISH], trainer)
    library.save(str(tmp_path / "in.json"))
    output = tmp_path / "out.json"
    arguments = ["--token", "bos=<|endoftext|>", "--data", root / "data.jsonl"]
    result = run("import", tmp_path / "in.json", output, *arguments)
    assert result.exit_code == 0
    tokenizer = Tokenizer.load(output)
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    assert "bos: <|endoftext|>" in result.output
    assert "pad: <pad> (added)" in result.output
    assert tokenizer.sha256 in result.output
    assert tokenizer.decode(tokenizer.encode(GERMAN)) == GERMAN
    with pytest.raises(ValueError, match="must end with"):
        run("import", tmp_path / "in.json", tmp_path / "out.model")
    with pytest.raises(ValueError, match=r"ROLE=TOKEN, got 'bos'"):
        run("import", tmp_path / "in.json", output, "--token", "bos")
    with pytest.raises(ValueError, match=r"out\.json is a tokenizer\.json, and only SentencePiece"):
        run("trim", output, tmp_path / "x.model", "--data", root / "data.jsonl")
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        run("import", tmp_path / "none.json", output)
    with pytest.raises(ValueError, match=r"^cannot list .*none\.jsonl"):
        run("import", tmp_path / "in.json", output, "--data", tmp_path / "none.jsonl")
