"""Languages are those that py3langid itself would say of the samples."""

import builtins
import collections

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import stages
from data_pipelines.stages import language
from data_pipelines.stages.texts import Texts
from slmjax.config import LanguageFilterConfig

py3langid = pytest.importorskip("py3langid.langid")

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody in the whole village was surprised to see it.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und niemand im ganzen Dorf war überrascht davon.",
    "fr": "Le renard brun et rapide saute par-dessus le chien paresseux, et personne au village n'en fut surpris.",
    "es": "El rápido zorro marrón salta sobre el perro perezoso y nadie en todo el pueblo se sorprendió al verlo.",
    "ru": "Быстрая коричневая лиса прыгает через ленивую собаку, и никто во всей деревне этому не удивился.",
    "ja": "素早い茶色の狐がのろまな犬を飛び越えたが、村の誰もそれを見て驚かなかったという話である。",
    "ar": "يقفز الثعلب البني السريع فوق الكلب الكسول ولم يتفاجأ أحد في القرية كلها لرؤية ذلك المشهد",
}
OTHERS = [
    "",
    " ",
    "\n\n",
    "12345",
    "SHOUTING IN ENGLISH IS STILL ENGLISH",
    "e\u0301te\u0301",
    "🙂🙂🙂",
    "a" * 47,
    "b" * 48,
    "c" * 49,
]


def measured(config: LanguageFilterConfig, texts: list[str]) -> list[tuple[str, float]]:
    rows = pa.record_batch(language.measure(config, Texts.of(texts))).to_pylist()
    return [(row["language"], row["language_score"]) for row in rows]


def test_languages_are_found_and_chosen():
    config = LanguageFilterConfig(only_language=("en", "de"))
    texts = list(TEXTS.values())
    assert [found for found, _ in measured(config, texts)] == list(TEXTS)
    batch = pa.record_batch(stages.attributes(config, Texts.of(texts)))
    assert stages.failed_rules(config, batch).tolist() == ["", "", *["only_language"] * (len(texts) - 2)]
    unsure = LanguageFilterConfig(only_language=None, min_language_score=1.0)
    assert "min_language_score" in stages.failed_rules(unsure, batch).tolist()
    anything = LanguageFilterConfig(only_language=None, min_language_score=None)
    assert stages.failed_rules(anything, batch).tolist() == [""] * len(texts)


def test_short_mixed_and_marked_up_texts():
    config = LanguageFilterConfig(only_language=None, min_language_score=0.5)
    english, german = "We walked for hours through the old town. ", "Wir gingen lange durch die alte Stadt. "
    texts = {
        "Where is the station?": "en",
        "Guten Morgen zusammen": "de",
        english * 3 + german: "en",  # most of it decides
        german * 3 + english: "de",
        f'<div class="note"><p>{german}</p></div>' * 3: "de",
        f"```\n{english * 3}\n```": "en",
        # Nothing to go by, or no language at all: the score says so, whatever the best guess is.
        "hi": None,
        "1 2 3": None,
        "🙂": None,
        "#include <stdio.h>\nint main(void) {\n  for (int i = 0; i < 3; i++) { f(a[i]); }\n  return 0;\n}\n": None,
        '{"a": [1, 2, {"b": null}], "c": true}' * 5: None,
    }
    batch = pa.record_batch(stages.attributes(config, Texts.of(list(texts))))
    kept = [rule == "" for rule in stages.failed_rules(config, batch)]
    found = [name if keep else None for name, keep in zip(batch.column("language").to_pylist(), kept, strict=True)]
    assert found == list(texts.values())


def test_the_model_says_the_same_as_the_package():
    loaded = py3langid.LanguageIdentifier.from_model_file(py3langid.MODEL_FILE, norm_probs=True)
    config = LanguageFilterConfig(sample_bytes=300, sample_parts=3)
    texts = [*TEXTS.values(), *OTHERS, *(text * 9 for text in TEXTS.values())]
    samples = language.take_samples(config, Texts.of(texts))
    for (found, score), sample in zip(measured(config, texts), samples, strict=True):
        expected, probability = loaded.classify(sample)
        if score == 0.0:  # nothing that the model knows
            assert found == "und"
            assert probability < 0.02  # all are as likely
        else:
            assert (found, score) == (expected, pytest.approx(probability, abs=1e-5))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("the Überé日1 ", max_size=90) | st.text(max_size=20), max_size=5))
def test_features_are_those_that_the_automaton_finds_one_byte_after_the_other(texts):
    model = language._model()
    samples = [text.encode() for text in texts]
    expected = []
    for sample in samples:
        state, found = 0, collections.Counter()
        for byte in sample:
            state = int(model.next_states[model.rows[state] + byte])
            found[int(model.features[state])] += 1
        del found[-1]
        expected.append(sorted(found.items()))
    counted = language._count_features(model, samples)
    assert [[*zip(*map(list, pair), strict=True)] for pair in counted] == expected


def test_other_documents_do_not_matter():
    texts = [*OTHERS, *TEXTS.values()]
    together = measured(LanguageFilterConfig(), texts)
    for (found, score), text in zip(together, texts, strict=True):
        assert [(found, pytest.approx(score, abs=1e-6))] == measured(LanguageFilterConfig(), [text])
    assert measured(LanguageFilterConfig(), []) == []


def test_samples_come_from_all_over_a_long_document():
    config = LanguageFilterConfig(sample_bytes=64, sample_parts=4)
    text = "é" * 500 + "b" * 500 + "c" * 500 + "日" * 500
    (sample,) = language.take_samples(config, Texts.of([text]))
    parts = sample.split("\n")
    assert len(parts) == 4
    assert set(parts[0]) == {"é"}
    assert set(parts[3]) == {"日"}
    assert set(parts[1] + parts[2]) <= set("ébc日")
    assert sum(len(part.encode()) for part in parts) <= 64
    assert language.take_samples(config, Texts.of(["short"])) == ["short"]
    assert (
        language.take_samples(LanguageFilterConfig(sample_parts=1), Texts.of([text]))[0] == text.encode()[:512].decode()
    )


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("py3langid"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"needs the package py3langid: pip install -e '.\[data\]'"):
        stages.check_installed([LanguageFilterConfig()])
    stages.check_installed([])
