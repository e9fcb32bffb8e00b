"""The decoder: `init`, `apply`, `logits`, `specs`, `make_cache`, and accounting from the config alone."""

from slmjax.model.accounting import causal_visible_keys, count_parameters, flops_per_token, packed_visible_keys
from slmjax.model.cache import make_cache
from slmjax.model.initialise import init
from slmjax.model.spec import ParamSpec
from slmjax.model.transformer import Output, Params, apply, logits, specs, table

__all__ = [
    "Output",
    "ParamSpec",
    "Params",
    "apply",
    "causal_visible_keys",
    "count_parameters",
    "flops_per_token",
    "init",
    "logits",
    "make_cache",
    "packed_visible_keys",
    "specs",
    "table",
]
