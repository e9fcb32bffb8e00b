"""The decoder against its definition written out in float64 numpy, option by option."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from slmjax import config as configs
from slmjax import model
from slmjax.model.plan import plan


def norm(x_D, config, weights):
    if isinstance(config, configs.LayerNormConfig):
        x_D = x_D - x_D.mean(-1, keepdims=True)
    x_D = x_D / np.sqrt((x_D**2).mean(-1, keepdims=True) + config.eps)
    return x_D * (weights.get("gain_D", 1.0) + weights.get("gain_offset_D", 0.0)) + weights.get("b_D", 0.0)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def rope(x_TNH, positions_T, config):
    rotated = int(x_TNH.shape[-1] * config.rotated_fraction)
    out = x_TNH.copy()
    for i in range(rotated // 2):
        frequency = config.theta ** (-2 * i / rotated)
        if config.scaling is not None:
            turns = config.scaling.original_length * frequency / (2 * math.pi)
            low, high = config.scaling.low_frequency_factor, config.scaling.high_frequency_factor
            smooth = min(max((turns - low) / (high - low), 0), 1)
            frequency = (1 - smooth) * frequency / config.scaling.factor + smooth * frequency
        cos, sin = np.cos(positions_T * frequency)[:, None], np.sin(positions_T * frequency)[:, None]
        a, b = x_TNH[..., i], x_TNH[..., i + rotated // 2]
        out[..., i], out[..., i + rotated // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(x_TD, config, weights, documents_T, positions_T):
    q, k, v = (np.einsum("TD,DNH->TNH", x_TD, weights[f"w_{n}"]) for n in ("q_DNH", "k_DKH", "v_DKH"))
    q, k, v = q + weights.get("b_q_NH", 0), k + weights.get("b_k_KH", 0), v + weights.get("b_v_KH", 0)
    if config.qk_norm is not None:
        for name, x in (("q_norm", q), ("k_norm", k)):
            flat = x.reshape(len(x), -1) if config.qk_norm_over == "full" else x
            x[...] = norm(flat, config.qk_norm, weights.get(name, {})).reshape(x.shape)
    if config.rope is not None:
        q, k = rope(q, positions_T, config.rope), rope(k, positions_T, config.rope)
    scale = config.scale or 1 / math.sqrt(config.head_dim)
    out = np.zeros_like(q)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        for t in range(len(x_TD)):
            seen = [
                s
                for s in range(t + 1)
                if documents_T[s] == documents_T[t] != 0 and (config.window is None or t - s < config.window)
            ]
            scores = np.array([q[t, head] @ k[s, shared] for s in seen]) * scale
            if config.softcap is not None:
                scores = config.softcap * np.tanh(scores / config.softcap)
            sink = np.exp(weights["sinks_N"][head]) if config.sinks else 0.0
            probabilities = np.exp(scores) / (np.exp(scores).sum() + sink)
            out[t, head] = sum(p * v[s, shared] for p, s in zip(probabilities, seen, strict=True))
    return np.einsum("TNH,NHD->TD", out, weights["w_o_NHD"]) + weights.get("b_o_D", 0)


def dense(x_TD, config, weights):
    up = x_TD @ weights["w_up_DF"] + weights.get("b_up_F", 0)
    if config.gated:
        up = ACTIVATIONS[config.activation](x_TD @ weights["w_gate_DF"] + weights.get("b_gate_F", 0)) * up
    else:
        up = ACTIVATIONS[config.activation](up)
    return up @ weights["w_down_FD"] + weights.get("b_down_D", 0)


def mixture(x_TD, config, weights, documents_T, report):
    logits = x_TD @ weights["router_DE"]
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = softmax if config.scoring == "softmax" else 1 / (1 + np.exp(-logits))
    out = np.zeros_like(x_TD)
    for t in range(len(x_TD)):
        chosen = np.argsort(-(scores[t] + weights.get("balance_bias_E", 0)))[: config.top_k]
        total = scores[t][chosen].sum() if config.normalise_top_k else 1.0
        for e in chosen:
            names = {"w_up_DF": "w_up_EDF", "w_down_FD": "w_down_EFD", "w_gate_DF": "w_gate_EDF"}
            expert = {name: weights[of][e] for name, of in names.items() if of in weights}
            out[t] += config.routed_scale * scores[t][e] / total * dense(x_TD[t], BiasFree(config), expert)
            report["load_E"][e] += documents_T[t] != 0
    if config.shared_hidden:
        out += dense(x_TD, BiasFree(config), weights["shared"])
    report["logits"] += list(logits[documents_T != 0])
    shares = scores / scores.sum(-1, keepdims=True)
    report["shares"] += list(shares[documents_T != 0])
    return out


def BiasFree(config):  # noqa: N802
    return configs.FeedForwardConfig(hidden=1, activation=config.activation, gated=config.gated)


def layer_forward(x_TD, config, weights, documents_T, positions_T, report):
    def maybe(name, h_TD):
        return norm(h_TD, config.norm, weights.get(name, {}))

    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    h = maybe("mixer_norm", x_TD) if before else x_TD
    y = attention(h, config.mixer, weights["mixer"], documents_T, positions_T)
    y = config.residual_scale * (maybe("mixer_out_norm", y) if after else y)
    if not config.parallel:
        x_TD = x_TD + y
        h = maybe("feed_forward_norm", x_TD) if before else x_TD
    if isinstance(config.feed_forward, configs.MoEConfig):
        z = mixture(h, config.feed_forward, weights["feed_forward"], documents_T, report)
    else:
        z = dense(h, config.feed_forward, weights["feed_forward"])
    z = config.residual_scale * (maybe("feed_forward_out_norm", z) if after else z)
    return x_TD + y + z if config.parallel else x_TD + z


def transcription(params, config, tokens_BT, documents_BT, positions_BT):
    """Returns hidden_BTD, logits_BTV, router loss and load {(group, layer): (L, E)}."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_BTD = params["embed_VD"][tokens_BT] * config.embedding_scale
    loss, load = 0.0, {}
    for i, group in enumerate(plan(config)):
        for stored in range(group.count):
            for j, layer in enumerate(group.unit):
                weights = jax.tree.map(lambda leaf, stored=stored: leaf[stored], params[f"group_{i}"][f"layer_{j}"])
                if config.share_feed_forward:
                    weights["feed_forward"] = params["shared_feed_forward"]
                for _ in range(config.block_repeats):
                    moe = layer.feed_forward
                    num_experts = getattr(moe, "num_experts", 0)
                    report = {"load_E": np.zeros(num_experts), "logits": [], "shares": []}
                    x_BTD = np.stack(
                        [
                            layer_forward(x_BTD[b], layer, weights, documents_BT[b], positions_BT[b], report)
                            for b in range(len(x_BTD))
                        ]
                    )
                    if num_experts:
                        load.setdefault((f"group_{i}", f"layer_{j}"), []).append(report["load_E"])
                        fraction_E = report["load_E"] / report["load_E"].sum()
                        balance = num_experts * (fraction_E * np.mean(report["shares"], axis=0)).sum()
                        z = np.mean([np.log(np.exp(row).sum()) ** 2 for row in report["logits"]])
                        loss += moe.balance_loss * balance + moe.router_z_loss * z
    hidden_BTD = norm(x_BTD, config.final_norm, params.get("final_norm", {}))
    logits_BTV = config.logit_scale * hidden_BTD @ params.get("unembed_VD", params["embed_VD"]).T
    if config.logit_softcap is not None:
        logits_BTV = config.logit_softcap * np.tanh(logits_BTV / config.logit_softcap)
    return hidden_BTD, logits_BTV, loss, load


MOE = configs.MoEConfig(num_experts=5, top_k=2, hidden=9)
SCALING = configs.Llama3RopeScalingConfig(factor=3.0, original_length=16)
GAINLESS = configs.RMSNormConfig(learned=False)
CASES = {
    "default": {},
    "multi-head": {"mixer": {"num_kv_heads": 4}},
    "multi-query": {"mixer": {"num_kv_heads": 1}},
    "window": {"mixer": {"window": 3}},
    "no position": {"mixer": {"rope": None}},
    "partial rope": {"mixer": {"rope": configs.RopeConfig(theta=50.0, rotated_fraction=1 / 3)}},
    "scaled rope": {"mixer": {"rope": configs.RopeConfig(theta=9.0, scaling=SCALING)}},
    "qk norm of heads": {"mixer": {"qk_norm": configs.RMSNormConfig(), "qk_norm_over": "head"}},
    "qk norm of all heads": {"mixer": {"qk_norm": configs.LayerNormConfig(bias=True), "qk_norm_over": "full"}},
    "softcap, scale, sinks": {"mixer": {"softcap": 1.5, "scale": 0.9, "sinks": True}},
    "biases": {"mixer": {"qkv_bias": True, "out_bias": True}, "feed_forward": {"bias": True}},
    "post": {"norm_placement": "post"},
    "sandwich, gains as offsets": {"norm_placement": "sandwich", "norm": configs.RMSNormConfig(offset=True)},
    "parallel": {"parallel": True, "residual_scale": 0.3},
    "parallel sandwich": {"parallel": True, "norm_placement": "sandwich"},
    "parallel post": {"parallel": True, "norm_placement": "post", "norm": GAINLESS},
    "layer norm, residual scale": {"norm": configs.LayerNormConfig(bias=True), "residual_scale": 0.22},
    "geglu": {"feed_forward": {"activation": "gelu"}},
    "plain relu2 with biases": {"feed_forward": {"activation": "relu2", "gated": False, "bias": True}},
    "reglu and plain tanh-gelu": [{"feed_forward": {"activation": "relu"}},
                                  {"feed_forward": {"activation": "gelu_tanh", "gated": False}}],
    "mixture": {"feed_forward": MOE},
    "mixture, sigmoid, shared, bias": {
        "feed_forward": dataclasses.replace(
            MOE, scoring="sigmoid", shared_hidden=7, routed_scale=2.5, balance_bias_rate=0.01, activation="relu2"
        )
    },
    "mixture, weights not normalised, not gated": {
        "feed_forward": dataclasses.replace(MOE, normalise_top_k=False, gated=False, top_k=3)
    },
}  # fmt: skip
MODELS = {
    "default": {"repeats": 2},
    "plain relu2 with biases": {
        "repeats": 2, "tied_embeddings": False, "embedding_scale": 4.0, "logit_scale": 0.5, "logit_softcap": 2.0,
        "final_norm": configs.LayerNormConfig(bias=True),
    },
    "mixture": {"repeats": 2, "block_repeats": 2},
    "reglu and plain tanh-gelu": {"repeats": 2, "layers": "scan"},
    "window": {"repeats": 1, "share_feed_forward": True, "prefix": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_pass_is_the_transcription(name, tiny_layer, tiny_model, random_params):
    layers = CASES[name] if isinstance(CASES[name], list) else [CASES[name]]
    fields = dict(MODELS.get(name, {"repeats": 1}))
    execution = configs.ExecutionConfig(layers=fields.pop("layers", "unroll"))
    prefix = tuple(tiny_layer() for _ in range(fields.pop("prefix", 0)))
    config = tiny_model(*(tiny_layer(**layer) for layer in layers), prefix=prefix, **fields)
    rng = np.random.default_rng(0)
    params = random_params(config)
    tokens_BT = rng.integers(config.vocab_size, size=(2, 9)).astype(np.int32)
    documents_BT = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    positions_BT = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0, 0]], np.int32)

    # Not compiled as a whole, since operations of equal shapes are compiled once for all cases.
    out = model.apply(
        params,
        config,
        tokens_BT,
        documents_BT=documents_BT,
        positions_BT=positions_BT,
        execution=execution,
    )
    logits_BTV = model.logits(params, config, out.hidden_BTD)
    hidden, logits, loss, load = transcription(params, config, tokens_BT, documents_BT, positions_BT)
    # float32 against float64 over two layers: 1e-5 of values of order one.
    np.testing.assert_allclose(out.hidden_BTD, hidden, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(logits_BTV, logits, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(out.router_loss, loss, rtol=1e-5)
    assert {(g, j) for g, layers in out.expert_load.items() for j in layers} == set(load)
    for (group, layer), expected in load.items():
        expected_LE = np.reshape(expected, (-1, config.block_repeats, len(expected[0]))).sum(1)
        np.testing.assert_array_equal(out.expert_load[group][layer], expected_LE)
        valid = (documents_BT > 0).sum()
        assert (np.sum(expected_LE, axis=1) == valid * config.block_repeats * layers[0]["feed_forward"].top_k).all()
