"""Cached generation: the prompts in one forward pass, then one token at a time.

Prompts of different lengths share a batch: they are padded on the right, and slot s of the cache holds position s of
its row. What the padding leaves in the slots behind a prompt is never seen: a query sees only slots up to its own
position, and each of those has been overwritten by the token generated there.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import model
from slmjax.config import ExecutionConfig, GenerationConfig, ModelConfig
from slmjax.generate.sampling import Sampling, sample

_NOTHING = -1  # in place of a token where a row has ended


class DecodeState(NamedTuple):
    """What a chunk of generation hands to the next one.

    Attributes:
      logits_BV: of the next token.
      position_B: slot that the next token will take.
      end_B: slot at which a row ends, whatever it says.
      done_B: whether a row has ended.
      keys_B: random key of each row; folded with the slot it gives the key of one token.
    """

    cache: list
    logits_BV: jax.Array
    position_B: jax.Array
    end_B: jax.Array
    done_B: jax.Array
    keys_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "execution", "capacity"))
def _prefill(
    params: model.Params,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    end_B: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    execution: ExecutionConfig,
    capacity: int,
) -> DecodeState:
    B = prompts_BT.shape[0]
    cache = model.make_cache(config, B, capacity, jnp.dtype(execution.compute_dtype))
    output = model.apply(params, config, prompts_BT, cache=cache, execution=execution)
    last_B1D = jnp.take_along_axis(output.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return DecodeState(
        cache=output.cache or [],
        logits_BV=model.logits(params, config, last_B1D)[:, 0],
        position_B=lengths_B,
        end_B=end_B,
        done_B=lengths_B >= end_B,
        keys_B=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B)),
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "sampling", "stop_ids", "num_ids", "chunk_tokens"),
    donate_argnames="state",
)
def _decode(
    params: model.Params,
    state: DecodeState,
    *,
    config: ModelConfig,
    execution: ExecutionConfig,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    num_ids: int,
    chunk_tokens: int,
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after up to `chunk_tokens` tokens a row, and the tokens; fewer if all rows have ended."""

    def unfinished(carry) -> jax.Array:
        step, state, _ = carry
        return (step < chunk_tokens) & ~jnp.all(state.done_B)

    def one_token(carry):
        step, state, tokens_BC = carry
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.position_B)
        token_B = sample(state.logits_BV[:, :num_ids], keys_B, sampling)
        done_B = state.done_B | jnp.isin(token_B, jnp.array(stop_ids, jnp.int32))
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, _NOTHING, token_B))
        output = model.apply(
            params,
            config,
            token_B[:, None],
            positions_BT=state.position_B[:, None],
            cache=state.cache,
            execution=execution,
        )
        done_B = done_B | (state.position_B + 1 >= state.end_B)
        state = DecodeState(
            cache=output.cache or [],
            logits_BV=model.logits(params, config, output.hidden_BTD)[:, 0],
            # A row that has ended goes on overwriting one slot of its own, which is within the capacity.
            position_B=jnp.where(done_B, state.position_B, state.position_B + 1),
            end_B=state.end_B,
            done_B=done_B,
            keys_B=state.keys_B,
        )
        return step + 1, state, tokens_BC

    tokens_BC = jnp.full((state.done_B.shape[0], chunk_tokens), _NOTHING, jnp.int32)
    _, state, tokens_BC = jax.lax.while_loop(unfinished, one_token, (jnp.zeros((), jnp.int32), state, tokens_BC))
    return state, tokens_BC


class Generator:
    """Continues prompts with one set of parameters.

    Args:
      params: float32 parameters; a copy of the matrices in `execution.compute_dtype` is kept.
      config: the model.
      context_length: prompt and continuation together are at most this long.
      execution: how to run it.
      num_ids: ids from here on are never generated: those that the tokenizer does not know.
      chunk_tokens: tokens that the device makes between two looks of the host, as `stream` yields them.
    """

    def __init__(
        self,
        params: model.Params,
        config: ModelConfig,
        *,
        context_length: int,
        execution: ExecutionConfig | None = None,
        num_ids: int | None = None,
        chunk_tokens: int = 16,
    ):
        execution = execution or ExecutionConfig()
        # cuDNN has no mask for a cache; the other choices have.
        attention = "auto" if execution.attention == "cudnn" else execution.attention
        self._execution = dataclasses.replace(execution, attention=attention, remat="none")
        self._params = _cast_once(params, jnp.dtype(execution.compute_dtype))
        self._config = config
        self._num_ids = config.vocab_size if num_ids is None else min(num_ids, config.vocab_size)
        self._chunk_tokens = chunk_tokens
        self.context_length = context_length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        config: GenerationConfig,
        key: jax.Array,
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Returns the continuation of each prompt; arguments and errors are those of `stream`."""
        continuations = [[] for _ in prompts]
        for pieces in self.stream(prompts, config=config, key=key, stop_ids=stop_ids):
            for continuation, piece in zip(continuations, pieces, strict=True):
                continuation += piece
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        config: GenerationConfig,
        key: jax.Array,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[list[list[int]]]:
        """Yields the next tokens of each prompt, a few at a time, until every row has ended.

        A row ends before a token of `stop_ids`, after `config.max_new_tokens`, or when the context is full. Draws
        depend on `key`, the row's number and the position alone, not on the other rows.

        Raises:
          ValueError: there is no prompt, or one is empty or leaves no room in the context.
        """
        if len(prompts) == 0:
            raise ValueError("there is no prompt; to begin from nothing give one with bos alone")
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} has no tokens; start it at least with bos")
            if len(prompt) >= self.context_length:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, which leaves no room in a context of "
                    f"{self.context_length}; shorten it"
                )
        return self._stream(prompts, config, key, tuple(stop_ids))

    def _stream(self, prompts, config: GenerationConfig, key: jax.Array, stop_ids: tuple[int, ...]):
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        end_B = np.minimum(lengths_B + config.max_new_tokens, self.context_length)
        prompts_BT = np.zeros((len(prompts), _bucket(lengths_B.max(), self.context_length)), np.int32)
        for row, prompt in enumerate(prompts):
            prompts_BT[row, : len(prompt)] = prompt
        state = _prefill(
            self._params,
            jnp.asarray(prompts_BT),
            jnp.asarray(lengths_B),
            jnp.asarray(end_B),
            key,
            config=self._config,
            execution=self._execution,
            capacity=_bucket(end_B.max(), self.context_length),
        )
        while not np.all(state.done_B):
            state, tokens_BC = _decode(
                self._params,
                state,
                config=self._config,
                execution=self._execution,
                sampling=Sampling.of(config),
                stop_ids=stop_ids,
                num_ids=self._num_ids,
                chunk_tokens=self._chunk_tokens,
            )
            yield [row[row != _NOTHING].tolist() for row in np.asarray(tokens_BC)]


def _bucket(length: int, limit: int) -> int:
    """Rounds up to a power of two, at least 64, so that few lengths are compiled; at most `limit`."""
    return min(max(64, 1 << (int(length) - 1).bit_length()), limit)


def _cast_once(params: model.Params, dtype: jnp.dtype) -> model.Params:
    """Returns matrices and tables in `dtype`, as the forward pass would cast them for each token; same results."""

    def one(path, leaf):
        name = path[-1].key
        return leaf.astype(dtype) if name.startswith("w_") or name in ("embed_VD", "unembed_VD") else leaf

    return jax.tree_util.tree_map_with_path(one, params)
