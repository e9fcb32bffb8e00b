import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from slmjax import config as c
from slmjax.config.resolved import to_json
from slmjax.page import number
from slmjax.report.plots import COLOURS, Line, line_plot, smooth, thin
from slmjax.report.read import Series, read_run
from slmjax.report.report import write_report


def run_config(**changes):
    layer = c.LayerConfig(
        mixer=c.AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=32, rope=c.RopeConfig()),
        feed_forward=c.FeedForwardConfig(hidden=512),
        norm=c.RMSNormConfig(),
    )
    fields = dict(
        output_dir="runs/quickstart",
        steps=1200,
        model=c.ModelConfig(vocab_size=4096, width=192, pattern=(layer,), repeats=12, final_norm=c.RMSNormConfig()),
        input=c.InputConfig(
            tokenizer="tokenizer.model",
            stages=(c.MixtureStageConfig(sources=(c.TokenSourceConfig(path="train"),)),),
            batch_size=16,
            sequence_length=256,
        ),
        optimizer=c.AdamWConfig(peak_lr=2e-3),
        schedule=c.WSDScheduleConfig(),
        checkpoint=c.CheckpointConfig(every_steps=100),
    )
    return c.RunConfig(**{**fields, **changes})


def metrics_lines(steps=1200):
    rng = np.random.default_rng(0)
    for step in range(10, steps + 1, 10):
        line = {
            "step": step,
            "loss": 2.2 + 5.8 * float(np.exp(-step / 150)) + 0.1 * rng.normal(),
            "learning_rate": 2e-3 * min(step / 100, 1, max((steps - step) / 240, 0)),
            "grad_norm": float(np.exp(0.3 * rng.normal())),
            "tokens_per_second": 12_400 + 300 * rng.normal(),
            "mfu": 0.31,
        }
        yield json.dumps(line)
        if step % 300 == 0:
            loss = 2.35 + 5.8 * float(np.exp(-step / 150))
            scores = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 2.2}
            yield json.dumps({"step": step, **{f"python/{name}": value for name, value in scores.items()}})


PROMPT = "def <script>alert('x')</script> & \"co\":\n"


def write_run(path, **changes):
    path.mkdir(parents=True)
    samples = [
        {
            "prompt": PROMPT,
            "completion": "    return 1 < 2\n",
            "temperature": 0.8,
            "top_k": 40,
            "checkpoint_step": 1200,
        },
        {"prompt": "Say <b>hi</b>.", "completion": "hi", "temperature": 0.0, "checkpoint_step": 1200, "instruct": True},
    ]
    scores = {"python/loss": 1.07, "python/perplexity": 2.92, "python/bits_per_byte": 1.731}
    baselines = {"python": {"gzip -9": 2.0412, "zstd -19": 1.87, "xz -9": 1.7702, "order-4 bytes": 2.2511}}
    evaluation = {"step": 1200, "metrics": scores, "baselines": baselines}
    versions = {"slmjax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "devices": "1 x cpu", "commit": "abc"}
    files = {
        "config.json": json.dumps(to_json(run_config(**changes))),
        "metrics.jsonl": "\n".join(metrics_lines()) + "\n",
        "samples.jsonl": "".join(json.dumps(sample) + "\n" for sample in samples),
        "evaluation.json": json.dumps(evaluation),
        "versions.json": json.dumps(versions),
    }
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def write_data(path):
    def step(name, documents, size, dropped):
        kept = {"documents": documents, "bytes": size}
        return {"step": name, "source": "python", "kept": kept, "dropped": dropped}

    steps = [
        step("read", 1490, 21_000_000, {"not UTF-8": 3, "too long": 7}),
        step("LengthFilter", 1400, 20_700_000, {"min_chars": 85, "max_chars": 5}),
        step("NearDedup", 1310, 19_000_000, {"near duplicate": 90}),
    ]
    splits = {
        "train": {"documents": 1240, "bytes": 18_000_000, "tokens": 5_454_545, "bytes_per_token": 3.3},
        "held_out": {"documents": 70, "bytes": 1_000_000, "tokens": 303_030, "bytes_per_token": 3.3},
    }
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"steps": steps, "splits": splits, "vocab_size": 4096}))
    return path


class Checker(HTMLParser):
    """Balanced tags, unique ids, and everything that would be loaded from elsewhere."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.external, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#"):
                self.external.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(path):
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.external == []
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    assert "@import" not in text
    return " ".join(" ".join(checker.text).split()), checker.tags


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    run, data = write_run(root / "quickstart"), write_data(root / "corpus")
    return root, write_report([run], root / "out" / "report.html", data_dirs=[data])


def test_the_page_is_whole_and_loads_nothing(written):
    _, path = written
    text, tags = check(path)
    assert tags.count("svg") == 4
    for expected in (
        "Training report: quickstart",
        "Loss, nats a token",
        "held out: python",
        "Learning rate",
        "Throughput",
        "Gradient norm",
        "1 x cpu",
        "31.0%",
        "1,200 of 1,200 steps, 4,915,200 tokens",
    ):
        assert expected in text


def test_scores_stand_next_to_the_baselines_in_order(written):
    text, _ = check(written[1])
    names = ["this model", "xz -9", "zstd -19", "gzip -9", "order-4 bytes"]
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    assert "1.731" in text
    assert "2.251" in text


def test_funnel_gives_counts_and_reasons(written):
    text, _ = check(written[1])
    assert "Source python: 1,500 records" in text
    assert "90 (6.0%) max_chars 5" not in text  # most frequent reason first
    assert "90 (6.0%) min_chars 85, max_chars 5" in text
    assert "5,454,545" in text


def test_samples_are_escaped_and_the_prompt_is_marked(written):
    html = written[1].read_text(encoding="utf-8")
    assert "<mark>def &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;co&quot;:\n</mark>" in html
    assert "    return 1 &lt; 2" in html
    assert "<mark>Say &lt;b&gt;hi&lt;/b&gt;.</mark>\n\nhi" in html
    assert "<script" not in html


def test_the_same_input_gives_the_same_bytes(written):
    root, path = written
    again = write_report([root / "quickstart"], root / "again.html", data_dirs=[root / "corpus"])
    assert again.read_bytes() == path.read_bytes()


def test_several_runs_have_an_overview(written, tmp_path):
    root, _ = written
    other = write_run(tmp_path / "instruct")
    text, tags = check(write_report([root / "quickstart", other], tmp_path / "report.html"))
    assert tags.count("svg") == 8
    assert "python 1.731" in text


def test_missing_and_torn_files_are_said(written, tmp_path):
    run = tmp_path / "torn"
    run.mkdir()
    lines = list(metrics_lines(100))
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"step": 60, "lo\n' + lines[6] + '\n{"step": 80')
    (run / "config.json").write_text('{"class": "RunConfig", ')
    (run / "evaluation.json").write_text("[1]")
    data = tmp_path / "corpus"
    data.mkdir()
    (data / "manifest.json").write_text('{"steps": [{"step": "read"}]}')
    text, _ = check(write_report([run], tmp_path / "report.html", data_dirs=[data, tmp_path]))
    for expected in (
        "metrics.jsonl: 2 damaged lines left out (6, 8)",
        "config.json cannot be read",
        "evaluation.json holds no object",
        "samples.jsonl is missing",
        "corpus: manifest.json has an unknown form",
        "manifest.json is missing",
        "Not evaluated.",
        "No samples.",
    ):
        assert expected in text


def test_a_config_of_another_version_is_said_and_shown(tmp_path):
    run = write_run(tmp_path / "old")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "flux_capacitor": 88}))
    text, _ = check(write_report([run], tmp_path / "report.html"))
    assert "config.json is of another version of slmjax" in text
    assert '"flux_capacitor": 88' in text


def test_directories_are_called_by_the_path_given(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    assert "Training report: runs/base" in check(write_report(["runs/base"], "report.html"))[0]
    monkeypatch.chdir(tmp_path / "runs" / "base")
    assert "Training report: base" in check(write_report(["."], "report.html"))[0]


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run directory"):
        write_report([], tmp_path / "report.html")


def test_a_directory_that_does_not_exist_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no such directory: .*rnu, .*dtaa"):
        write_report([tmp_path, tmp_path / "rnu"], tmp_path / "report.html", data_dirs=[tmp_path / "dtaa"])
    assert not (tmp_path / "report.html").exists()


def test_a_step_logged_twice_counts_once_and_non_finite_values_are_left_out(tmp_path):
    lines = ['{"step": 2, "loss": 5.0}', '{"step": 1, "loss": NaN}', '{"step": 2, "loss": 4.0, "note": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1, "mfu": 0.5, "accepted": true}']))
    metrics = read_run(tmp_path).metrics
    assert metrics["loss"].steps.tolist() == [2]
    assert metrics["loss"].values.tolist() == [4.0]
    assert metrics["mfu"].values.tolist() == [0.5]
    assert "note" not in metrics


def test_values_that_no_plot_can_show_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        for value in ("1" + "0" * 400, "1e308", "-1e308", "1e400", "null"):
            file.write(f'{{"step": 5, "loss": {value}}}\n{{"step": 1{"0" * 110}, "loss": 1.0}}\n')
    check(write_report([run], tmp_path / "report.html"))
    assert 5 not in read_run(run).metrics["loss"].steps.tolist()


def test_a_sample_that_utf8_cannot_hold_is_shown_escaped(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"prompt": "x", "completion": "lone \\ud800"}\n')
    assert "lone \\ud800" in check(write_report([run], tmp_path / "report.html"))[0]


def test_a_report_that_cannot_be_written_names_its_file_and_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "report.html").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"cannot write .*report\.html: Is a directory"):
        write_report([run], tmp_path / "report.html")
    assert sorted(tmp_path.iterdir()) == before


def test_smoothing_keeps_a_constant_and_follows_the_definition():
    flat = smooth(Series(np.arange(100), np.full(100, 3.0)))
    np.testing.assert_allclose(flat.values, 3.0, rtol=1e-12)
    values = np.random.default_rng(0).normal(size=200)
    smoothed = smooth(Series(np.arange(200), values)).values
    for i in (0, 3, 100, 199):
        weights = np.exp(-0.5 * ((np.arange(200) - i) / 4) ** 2)
        assert np.isclose(smoothed[i], (weights * values).sum() / weights.sum(), rtol=1e-12)
    assert smooth(Series(np.array([5]), np.array([2.0]))).values.tolist() == [2.0]


@pytest.mark.parametrize("count", [1, 1999, 2000, 2001, 12_345])
def test_long_curves_are_thinned_and_keep_their_end(count):
    series = thin(Series(np.arange(count), np.arange(count) * 2.0))
    assert min(count, 1000) <= len(series.steps) <= 2000
    assert series.steps[-1] == count - 1
    assert (np.diff(series.steps) > 0).all()
    assert (series.values == series.steps * 2.0).all()


def test_plot_is_xml_with_the_page_colour_and_odd_names():
    series = Series(np.array([1, 2]), np.array([1.0, 2.0]))
    svg = line_plot("a", "<$x_1$ & y>", [Line("p$q$r_1", series, "points", COLOURS[0])] * 2)
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "<$x_1$ & y>"
    assert "currentColor" in svg
    assert "p$q$r_1" in svg
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
    assert references
    assert set(references) <= {element.get("id") for element in root.iter()}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000345678, "0.0003457"), (1234567, "1,234,567"), (2.0, "2"), (3.14159, "3.142"), (float("nan"), "nan")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
