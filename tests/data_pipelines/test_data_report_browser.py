"""report.html in a real browser: it draws, it says nothing on the console, and it fits a telephone."""

import io
import re
import shutil
import subprocess
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from data_pipelines.run import run
from slmjax.config import (
    ExactDedupConfig,
    FilesSourceConfig,
    LengthFilterConfig,
    PipelineConfig,
    RepetitionFilterConfig,
    SplitConfig,
    TrainTokenizerConfig,
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "<script>document.title = 'taken'</script></pre><img src=x onerror=\"document.title = 'taken'\">"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: apt-get install chromium"),
]


def browse(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Opens a page without a screen; returns what the browser prints and the lines on the console."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        check=True,
        timeout=120,
    )
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [" ".join(f"word{i * j % 97}" for j in range(20 + i)) for i in range(40)]
    texts += [texts[3], f"short {HOSTILE}", "نص قصير", "the same line\n" * 20]
    (folder / "in.jsonl").write_bytes(b"\n".join([b'{"broken', *(orjson.dumps({"text": text}) for text in texts)]))
    config = PipelineConfig(
        output_dir=str(folder / "out"),
        sources=(FilesSourceConfig(paths=(str(folder / "in.jsonl"),), name="a" * 300),),
        stages=(LengthFilterConfig(min_words=10), RepetitionFilterConfig(), ExactDedupConfig()),
        tokenizer=TrainTokenizerConfig(vocab_size=320),
        split=SplitConfig(held_out_fraction=0.2),
        num_workers=1,
    )
    run(config, console=Console(file=io.StringIO()))
    return folder / "out/report.html"


def test_it_is_shown_whole_and_nothing_in_it_runs(report, tmp_path):
    dom, console = browse(report, tmp_path, "--dump-dom")
    assert console == []
    assert "<title>Data report: aaa" in dom
    assert "document.title = 'taken'" in dom.replace("&#x27;", "'")
    assert len(re.findall("<svg", dom)) == report.read_text().count("<svg")
    assert dom.rstrip().endswith("</html>")


def test_what_a_page_does_wrong_would_be_seen(tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text("<!DOCTYPE html><title>before</title><script>document.title = 'after'; nothing.here()</script>")
    dom, console = browse(page, tmp_path, "--dump-dom")
    assert "<title>after</title>" in dom
    assert any("nothing is not defined" in line for line in console)


@pytest.mark.parametrize("width", [1280, 500])  # the narrowest window that chromium makes
def test_nothing_is_wider_than_the_window(report, tmp_path, width):
    page = tmp_path / "measured.html"
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    text = text.replace("<details>", "<details open>")
    measure = "<script>document.title = `${document.documentElement.scrollWidth} ${innerWidth}`</script>"
    page.write_text(text.replace("</body>", f"{measure}</body>"), encoding="utf-8")
    dom, _ = browse(page, tmp_path, f"--window-size={width},900", "--dump-dom")
    found = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert found is not None
    assert int(found.group(1)) <= int(found.group(2)) == width


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_both_colour_schemes_are_drawn(report, tmp_path, scheme):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    options = (f"--screenshot={shot}", "--window-size=800,1400", f"--blink-settings=preferredColorScheme={scheme}")
    _, console = browse(report, tmp_path / "profile", *options)
    assert console == []
    pixels = imread(shot)[..., :3]
    background = pixels[2, 2]
    assert (background.mean() > 0.5) == (scheme == 1)
    drawn = (abs(pixels - background) > 0.05).any(axis=-1)
    assert 0.05 < drawn.mean() < 0.9
    assert drawn[1000:].any()  # below the funnel, too
