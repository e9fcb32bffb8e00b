import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import config as c
from slmjax import model
from slmjax.generate.decode import Generator

V = 40
ATTENTION = c.AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=c.RopeConfig())
LAYER = c.LayerConfig(mixer=ATTENTION, feed_forward=c.FeedForwardConfig(hidden=32), norm=c.RMSNormConfig())
MODEL = c.ModelConfig(
    vocab_size=V,
    width=16,
    pattern=(LAYER,),
    repeats=2,
    final_norm=c.RMSNormConfig(),
)


def with_attention(**fields):
    return dataclasses.replace(LAYER, mixer=dataclasses.replace(ATTENTION, **fields))


MOE = dataclasses.replace(LAYER, feed_forward=c.MoEConfig(num_experts=4, top_k=2, hidden=16, shared_hidden=8))
MODELS = {
    "grouped queries": MODEL,
    "window, qk norm, sinks, softcaps": dataclasses.replace(
        MODEL,
        pattern=(with_attention(window=5), with_attention(qk_norm=c.RMSNormConfig(), sinks=True, softcap=20.0)),
        repeats=1,
        logit_softcap=10.0,
    ),
    "mixture of experts, repeated blocks": dataclasses.replace(
        MODEL, prefix=(LAYER,), pattern=(MOE,), block_repeats=2, tied_embeddings=False
    ),
}
PROMPTS = [[2, 7, 9], [2, *range(5, 27)], [2], [2, 11, 12, 13, 14, 15, 16, 17]]
GREEDY = c.GenerationConfig(max_new_tokens=12, temperature=0.0)


@functools.cache
def params_of(name):
    """Numpy's random numbers, since initialising would compile a program for each model."""
    rng = np.random.default_rng(1)
    specs = model.specs(MODELS[name])
    return jax.tree.map(lambda spec: jnp.asarray(rng.normal(scale=0.5, size=spec.shape), jnp.float32), specs)


def generator(**fields):
    return Generator(params_of("grouped queries"), MODEL, **{"context_length": 64, "chunk_tokens": 5, **fields})


@pytest.fixture(scope="module")
def plain():
    return generator()


@jax.jit
def full_logits(tokens_BT):
    params = params_of("grouped queries")
    return model.logits(params, MODEL, model.apply(params, MODEL, tokens_BT).hidden_BTD)


def check_greedy(completions, tolerance):
    """Each token is the likeliest after all before it by the full forward pass, but for rounding."""
    rows_BT = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt, completion in zip(rows_BT, PROMPTS, completions, strict=True):
        assert len(completion) == 12
        row[: len(prompt) + 12] = prompt + completion
    for row, prompt, completion in zip(np.asarray(full_logits(rows_BT)), PROMPTS, completions, strict=True):
        before = row[len(prompt) - 1 : len(prompt) + 11]
        np.testing.assert_allclose(before[np.arange(12), completion], before.max(-1), atol=tolerance)


def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward(plain):
    completions = plain.generate(PROMPTS, config=GREEDY, key=jax.random.key(0))
    assert len({tuple(completion) for completion in completions}) == 4
    check_greedy(completions, 1e-4)


@pytest.mark.parametrize(
    ("execution", "tolerance"),
    [
        # Logits of the order of 10 from activations of 8 bits; the runner-up is typically 1 away.
        (c.ExecutionConfig(compute_dtype="bfloat16"), 0.5),
        (c.ExecutionConfig(attention="chunked", layers="unroll", remat="full"), 1e-4),
    ],
)
def test_greedy_generation_however_it_is_run(execution, tolerance):
    completions = generator(execution=execution).generate(PROMPTS, config=GREEDY, key=jax.random.key(0))
    check_greedy(completions, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_full_forward(name):
    config, params = MODELS[name], params_of(name)
    tokens_BT = jax.random.randint(jax.random.key(2), (3, 20), 0, V)
    lengths_B = jnp.array([4, 11, 1])

    @jax.jit
    def full():
        return model.logits(params, config, model.apply(params, config, tokens_BT).hidden_BTD)

    @jax.jit
    def prefill():
        # Rows are padded on the right, with tokens of no meaning.
        padded_BT = jnp.where(jnp.arange(12)[None] < lengths_B[:, None], tokens_BT[:, :12], 39)
        return model.apply(params, config, padded_BT, cache=model.make_cache(config, 3, 24)).cache

    @jax.jit
    def step(cache, positions_B):
        token_B1 = jnp.take_along_axis(tokens_BT, positions_B[:, None], axis=1)
        output = model.apply(params, config, token_B1, positions_BT=positions_B[:, None], cache=cache)
        return output.cache, model.logits(params, config, output.hidden_BTD)[:, 0]

    expected_BTV, cache = np.asarray(full()), prefill()
    for offset in range(9):
        positions_B = lengths_B + offset
        cache, logits_BV = step(cache, positions_B)
        expected_BV = expected_BTV[np.arange(3), positions_B]
        # float32, sums in another order; logits are of the order of 10.
        np.testing.assert_allclose(logits_BV, expected_BV, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(plain, temperature):
    config = dataclasses.replace(GREEDY, temperature=temperature)
    key = jax.random.key(3)
    together = plain.generate(PROMPTS, config=config, key=key)
    others = plain.generate([PROMPTS[0], [2, 3, 4], [2, 30], [2] * 20], config=config, key=key)
    assert together[0] == others[0]
    if temperature == 0:
        assert [plain.generate([prompt], config=config, key=key)[0] for prompt in PROMPTS] == together


def test_draws_follow_the_key_and_not_the_chunks(plain):
    config = c.GenerationConfig(max_new_tokens=12, temperature=1.0, top_p=0.95)
    first, again, other = (plain.generate(PROMPTS, config=config, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert generator(chunk_tokens=12).generate(PROMPTS, config=config, key=jax.random.key(0)) == first


def test_top_1_is_greedy(plain):
    top_1 = c.GenerationConfig(max_new_tokens=12, temperature=3.0, top_k=1)
    key = jax.random.key(0)
    assert plain.generate(PROMPTS, config=top_1, key=key) == plain.generate(PROMPTS, config=GREEDY, key=key)


def test_a_stop_token_ends_its_row_and_is_left_out(plain):
    whole = plain.generate(PROMPTS, config=GREEDY, key=jax.random.key(0))
    stop = whole[1][6]
    stopped = plain.generate(PROMPTS, config=GREEDY, key=jax.random.key(0), stop_ids=[stop, 39])
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert stopped == expected
    assert len(stopped[1]) <= 6


def test_stream_yields_chunks_and_ends_when_all_rows_have(plain):
    pieces = list(plain.stream(PROMPTS, config=GREEDY, key=jax.random.key(0)))
    assert [[len(row) for row in rows] for rows in pieces] == [[5] * 4, [5] * 4, [2] * 4]
    joined = [[token for rows in pieces for token in rows[i]] for i in range(4)]
    assert joined == plain.generate(PROMPTS, config=GREEDY, key=jax.random.key(0))


def test_the_context_limits_each_row(plain):
    long = c.GenerationConfig(max_new_tokens=1000, temperature=0.0)
    completions = plain.generate([[2] * 60, [2] * 63, [2] * 10], config=long, key=jax.random.key(0))
    assert [len(completion) for completion in completions] == [4, 1, 54]


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    flat = c.GenerationConfig(max_new_tokens=50, temperature=100.0)
    completions = generator(num_ids=3).generate([[2], [2]], config=flat, key=jax.random.key(0))
    assert set(completions[0] + completions[1]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[2], []], "prompt 1 has no tokens"),
        ([[2] * 64], "prompt 0 has 64 tokens, which leaves no room in a context of 64"),
    ],
)
def test_bad_prompts_are_refused_at_once(plain, prompts, message):
    with pytest.raises(ValueError, match=message):
        plain.stream(prompts, config=GREEDY, key=jax.random.key(0))
