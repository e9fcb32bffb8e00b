"""Which parameter gets which rule, by the name of its leaf. The one table to change when a new kind of weight comes."""

import re
from typing import Any

import jax

MATRIX = "matrix"  # hidden matrices: weight decay, and the only ones that Muon takes
EMBEDDING = "embedding"  # input and output tables: decay and learning rate as the config says, never Muon
VECTOR = "vector"  # norm gains, biases, attention sinks: no weight decay
ROUTER = "router"  # weight decay, never Muon: a router's rows are scores of experts, not a map between features
FROZEN = "frozen"  # moved by the model's own rule (loss-free balancing), never by the optimizer

# Matched against the whole leaf name, the last part of the path.
GROUPS = {
    MATRIX: r"w_[a-z0-9_]+_[A-Z]+",
    EMBEDDING: r"(un)?embed_[A-Z]+",
    VECTOR: r"(gain|b|b_[a-z0-9_]+|sinks)_[A-Z]+",
    ROUTER: r"router_[A-Z]+",
    FROZEN: r"balance_bias_[A-Z]+",
}


def group_of(path: str) -> str:
    """Returns the group of the parameter at `path`, such as "layers/0/mixer/w_q_DNH".

    Raises:
      ValueError: if no rule or more than one matches the leaf's name.
    """
    name = path.rsplit("/", 1)[-1]
    matches = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(
            f"parameter {path!r} must match exactly one rule of slmjax/optim/groups.py, got {matches or 'none'}; "
            f"name it after one of {GROUPS} or add a rule"
        )
    return matches[0]


def label_tree(params: Any) -> Any:
    """Returns the tree of `params` (arrays, shapes or specs; specs are leaves) with the group's name at each leaf."""

    def label(path, _):
        return group_of(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda node: hasattr(node, "logical_axes"))
