"""Files of scores beside files of documents: what a model that needs an accelerator says of every document."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from data_pipelines import tasks
from data_pipelines.documents import parquet_writer, read_batches
from data_pipelines.engines.local import LocalEngine
from data_pipelines.progress import Reporter
from data_pipelines.quality.document_columns import require_columns, require_messages, require_texts
from slmjax import files
from slmjax.data.conversations import check_answered
from slmjax.data.exclusive import only_user


def score_files(
    documents: Path,
    output: Path,
    score: Callable[[list[Any]], Mapping[str, Any]],
    *,
    identity: str,
    column: str = "text",
    console: Console | None = None,
) -> None:
    """Writes <output>/<shard>.parquet, with an id and the scores of every document, for each file of `documents`.

    Files that were finished by an earlier call with the same documents and the same `identity` are left as they are.

    Args:
      documents: directory of parquet files with the columns id and text, such as documents/ of a pipeline's output.
      output: directory to write to, not the same.
      score: from values of `column` to columns of the output, arrays with something for each value.
      identity: of everything that the scores depend on besides the documents.
      column: what is scored: the text, or the messages of conversations.
      console: where to print.

    Raises:
      ValueError: there are no such files, one is damaged, a document has no text or no conversation with an answer, or
        another process writes there.
    """
    found = sorted(documents.glob("*.parquet"))
    if not found:
        raise ValueError(f"{documents} has no parquet files; give the documents/ of a pipeline's output_dir")
    if output.resolve() == documents.resolve():
        raise ValueError(f"the scores of {documents} need a directory of their own")
    for path in found:
        require_columns(path, ("id", column), kind="documents" if column == "text" else "conversations")

    def score_file(task: tasks.Task) -> tasks.Done:
        started = time.monotonic()
        path, num_bytes = output / f"{task.name}.parquet", 0
        schema = pa.record_batch({"id": pa.array([], pa.string()), **score([])}).schema
        with parquet_writer(path, schema) as writer:
            for batch in read_batches(documents / path.name, ["id", column]):
                ids, values = batch.column("id"), batch.column(column)
                if column == "text":
                    require_texts(documents / path.name, ids, values)
                else:
                    require_messages(documents / path.name, ids, values, check_answered)
                scores = score(values.to_pylist())
                writer.write_batch(pa.record_batch({"id": ids, **scores}, schema=schema))
                num_bytes += values.nbytes
        return tasks.finish(task, [path], {"bytes": num_bytes}, started=started)

    with only_user(output):
        files.remove_partial(output)
        planned = [
            tasks.Task(
                root=output,
                step="score",
                name=path.stem,
                fingerprint=tasks.fingerprint(identity, column, files.sha256(path)),
            )
            for path in found
        ]
        with Reporter(console or Console(), output / "timings.json").step("score", len(planned)) as step:
            tasks.run_tasks(LocalEngine(1), score_file, planned, advance=step.advance)
