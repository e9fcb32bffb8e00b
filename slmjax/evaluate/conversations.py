"""How much a question helps with its answer under a trained run: the IFD score, for choosing instruction data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from slmjax.config import RunConfig
from slmjax.data.conversations import render
from slmjax.data.tokenizer import ASSISTANT
from slmjax.evaluate.likelihood import token_nll
from slmjax.evaluate.packed import PackedModel, TokenSequence


class AnswerScorer:
    """A checkpoint that scores the answers of conversations: instruction-following difficulty.

    Li et al. 2023, arXiv:2308.12032; with a small model in place of the one to be tuned it is Superfiltering (Li et al.
    2024, arXiv:2402.00530).

    Attributes:
      identity: of all that the scores depend on besides the conversations.
    """

    def __init__(
        self, run_config: RunConfig, *, step: int | None = None, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Loads a checkpoint; the arguments and errors are those of `PackedModel`."""
        self._model = PackedModel(run_config, step=step, batch_size=batch_size, mesh=mesh)
        self.identity = f"ifd {self._model.identity}"
        self._nll = self._model.compiled(token_nll)

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, np.ndarray]:
        """Returns loss (nats a token of the answers after all turns before), answer_loss (each answer by itself), ifd.

        ifd = exp(loss - answer_loss) is the ratio of perplexities: near 1 the questions do not help, above 1 they
        mislead. Tokens are those that training learns, the end of each answer among them; several answers of a
        conversation are taken together. `tokens` is their number. What lies beyond a row's length, where training cuts
        too, counts on neither side; a conversation of which no answer is left has the losses and the ifd inf.
        """
        sequences: list[TokenSequence] = []
        owners: list[tuple[int, bool]] = []  # conversation, and whether its questions are there
        tokens = np.zeros(len(conversations), np.int64)
        for number, messages in enumerate(conversations):
            whole, answers = self._sequences(messages)
            tokens[number] = int(whole.weights.sum())
            if tokens[number]:
                sequences += [whole, *answers]
                owners += [(number, True), *[(number, False)] * len(answers)]
        nats = np.zeros((len(conversations), 2))
        for places, nll_BT in self._model.run(self._nll, sequences):
            for place in places:
                number, asked = owners[place.sequence]
                nats[number, int(asked)] += nll_BT[place.row, place.positions].sum(dtype=np.float64)
        alone, given = (np.where(tokens > 0, nats[:, i] / np.maximum(tokens, 1), np.inf) for i in range(2))
        with np.errstate(over="ignore"):
            ifd = np.where(tokens > 0, np.exp(np.where(tokens > 0, given, 0) - np.where(tokens > 0, alone, 0)), np.inf)
        return {"loss": given, "answer_loss": alone, "ifd": ifd, "tokens": tokens}

    def _sequences(self, messages: Sequence[Mapping[str, Any]]) -> tuple[TokenSequence, list[TokenSequence]]:
        """The conversation, and each answer by itself as far as it is learned in the former: bos, mark, answer."""
        tokenizer, length = self._model.tokenizer, self._model.row_length
        ids, learned = render(messages, tokenizer)
        tokens = np.array(ids[: length + 1], np.int32)
        weights = np.array(learned[1 : length + 1], np.float32)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
        head = [tokenizer.bos_id, tokenizer.control_id(ASSISTANT)]
        answers = []
        for start, end in edges.reshape(-1, 2).tolist():
            # Within a row with its head, of which the conversation has at least as much before the answer.
            answer = tokens[start + 1 : end + 1]
            alone = np.concatenate([np.array(head, np.int32), answer])
            answers.append(TokenSequence(alone, np.array([0.0] + [1.0] * len(answer), np.float32)))
        return TokenSequence(tokens, weights), answers
