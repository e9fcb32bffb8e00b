"""Memory of stages over the whole corpus does not grow with the corpus."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.documents import Document, write_shards

SHARD_BYTES = 1 << 20
SCRIPT = """
import json, sys
from pathlib import Path
import pyarrow as pa
import dedup_corpus
from data_pipelines.documents import Shard
from slmjax.config import *

pa.set_cpu_count(1)
pa.set_io_thread_count(1)
dedup_corpus.read_verdicts = lambda *_: None  # all of them together would be more than the stage ever holds
shards = [Shard(**fields) for fields in json.load(sys.stdin)]
dedup_corpus.decide(Path(sys.argv[1]), shards, {"stage": eval(sys.argv[2])}, worker_bytes=8 << 20)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def documents(num_bytes: int) -> Iterator[Document]:
    """Of random words, every fifth one twice but for a word."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(20_000)])
    written = i = 0
    while written < num_bytes:
        text = " ".join(words[rng.integers(0, len(words), 300)])
        for name, copy in ((f"{i}", text), *([(f"{i}-copy", f"{text} end")] if i % 5 == 0 else [])):
            written += len(copy)
            yield Document(name, name, copy)
        i += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["ExactDedupConfig()", "NearDedupConfig()", "PassageDedupConfig(unit='line')", "SubstringDedupConfig()"]
)
def test_sixteen_times_the_corpus_takes_no_more_memory(tmp_path, stage):
    here = Path(__file__).parents[1]
    peaks = []
    for scale in (1, 16):
        root = tmp_path / str(scale)
        directory = root / "work" / "read"
        shards = list(
            write_shards(documents(scale * 3_000_000), directory, prefix="0", source="test", shard_bytes=SHARD_BYTES)
        )
        output = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(root), stage],
            input=json.dumps([vars(shard) for shard in shards]),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here / "support"), str(here.parent)])},
        ).stdout
        peaks.append(int(output) / 1024)
    assert peaks[1] < peaks[0] + 30, peaks  # MB; the larger corpus has 45 MB more text
