"""Every parameter has exactly one rule."""

import numpy as np
import pytest

from slmjax.optim import group_of, groups, label_tree


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("embed_VD", "embedding"),
        ("unembed_VD", "embedding"),
        ("final_norm/gain_D", "vector"),
        ("layers/0/mixer/w_q_DNH", "matrix"),
        ("layers/0/mixer/w_o_NHD", "matrix"),
        ("layers/0/norm/b_D", "vector"),
        ("layers/0/mixer/b_q_NH", "vector"),
        ("layers/0/mixer/sinks_N", "vector"),
        ("layers/0/feed_forward/w_gate_EDF", "matrix"),
        ("layers/0/feed_forward/router_DE", "router"),
        ("layers/0/feed_forward/balance_bias_E", "frozen"),
    ],
)
def test_group_of(path, group):
    assert group_of(path) == group


@pytest.mark.parametrize("path", ["layers/weird", "layers/0/w_q", "gain", "my_embed_VD", "layers/0/w_q_DNH/extra"])
def test_a_leaf_without_a_rule_is_named(path):
    with pytest.raises(ValueError, match=f"parameter '{path}' must match exactly one rule"):
        label_tree({"embed_VD": np.zeros(1)} | {path: np.zeros(1)})


def test_a_leaf_with_two_rules_is_named(monkeypatch):
    monkeypatch.setitem(groups.GROUPS, "other", r"w_q_\w+")
    with pytest.raises(ValueError, match=r"'w_q_DNH' .* got \['matrix', 'other'\]"):
        group_of("w_q_DNH")
