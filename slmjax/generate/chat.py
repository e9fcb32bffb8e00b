"""A conversation with an instruction-tuned run, on the terminal or through a pipe."""

import contextlib
import io
import sys
from collections import abc
from collections.abc import Iterable, Sequence

import jax
from rich.console import Console
from rich.markup import escape

from slmjax.config import GenerationConfig, RunConfig
from slmjax.data.conversations import Message, render_prompt
from slmjax.data.tokenizer import Tokenizer
from slmjax.generate.decode import Generator
from slmjax.generate.sample import make_generator, stop_ids
from slmjax.generate.text import printable, stream_text
from slmjax.train.restore import load_run


class Conversation:
    """The turns so far, and the model that answers.

    Attributes:
      messages: what the model sees; grows by a question and an answer with each `reply`.
      dropped: messages that the last `reply` left out of the context, oldest first.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        *,
        stop_ids: Sequence[int],
        key: jax.Array,
    ):
        self.messages: list[Message] = []
        self.dropped = 0
        self._generator, self._tokenizer, self._config = generator, tokenizer, config
        self._stop_ids, self._key = stop_ids, key

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages = []

    def reply(self, text: str) -> abc.Generator[str, None, None]:
        """Returns the answer to `text`, piece by piece; what has been taken of it is remembered.

        The oldest turns are forgotten while the prompt would leave too little room for an answer.

        Raises:
          ValueError: `text` is empty, or alone too long for the context; the conversation is as before.
        """
        messages = [*self.messages, Message(role="user", content=text)]
        context = self._generator.context_length
        room = min(self._config.max_new_tokens, context // 2)
        prompt = render_prompt(messages, self._tokenizer)
        while len(prompt) > context - room and len(messages) > 1:
            messages = messages[2:]
            prompt = render_prompt(messages, self._tokenizer)
        self._key, key = jax.random.split(self._key)
        pieces = self._generator.stream([prompt], config=self._config, key=key, stop_ids=self._stop_ids)
        self.dropped = len(self.messages) + 1 - len(messages)
        return self._answer(messages, (rows[0] for rows in pieces))

    def _answer(self, messages: list[Message], pieces: Iterable[list[int]]) -> abc.Generator[str, None, None]:
        answer = ""
        try:
            for piece in stream_text(pieces, self._tokenizer):
                answer += piece
                yield piece
        finally:  # also when the reader stops in the middle
            # The template has no empty turns: a question without an answer is forgotten.
            self.messages = [*messages, Message(role="assistant", content=answer)] if answer.strip() else messages[:-1]


def chat(run_config: RunConfig, *, seed: int = 0, step: int | None = None, console: Console | None = None) -> None:
    """Talks with the run until /quit or the end of input; /reset starts anew. Ctrl-C ends an answer, then the chat.

    Args:
      run_config: an instruction-tuned run; its `generation` says how to draw.
      seed: of the draws.
      step: checkpoint to use; None is the newest whole one.
      console: where to print.

    Raises:
      ValueError: the run has no checkpoint, or its tokenizer no chat symbols.
    """
    console = console or Console(highlight=False)
    loaded = load_run(run_config, step=step)
    conversation = Conversation(
        make_generator(loaded, run_config, chunk_tokens=4),
        loaded.tokenizer,
        run_config.generation,
        stop_ids=stop_ids(loaded, instruct=True),
        key=jax.random.key(seed),
    )
    console.print(f"[dim]{escape(run_config.output_dir)}, step {loaded.step}; /reset starts anew, /quit ends")
    with contextlib.suppress(ImportError):  # absent on Windows; where present it gives input() editing and history
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one wrong byte must not end the conversation
    while True:
        try:
            line = console.input("[bold]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not sys.stdin.isatty():
            console.print(printable(line), markup=False)  # so that the transcript of a pipe holds both sides
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            console.print("[dim](the conversation starts anew)")
        elif line.startswith("/"):
            console.print(f"(unknown command {line}; there are /reset and /quit)", style="dim", markup=False)
        elif line:
            _answer(conversation, line, console)


def _answer(conversation: Conversation, line: str, console: Console) -> None:
    try:
        pieces = conversation.reply(line)
    except ValueError as error:
        console.print(f"({error})", style="dim", markup=False)
        return
    if conversation.dropped:
        console.print(f"[dim](the context is full: the oldest {conversation.dropped} messages are forgotten)")
    shown = False
    try:
        for piece in pieces:
            shown = shown or bool(piece.strip())
            console.print(printable(piece), end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("[dim] (stopped)", end="")
    finally:
        pieces.close()
    console.print("" if shown else "[dim](no answer)")
