"""Which key a query sees: one small value for causal, windowed, packed and cached attention.

Every mask here lets each query see one contiguous run of keys, so all that a fast implementation needs is the half-open
range [k_start, k_end) of each query, and from those which tiles of keys a tile of queries touches.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# int32 arrays; numpy where the mask does not depend on the batch, so that bounds are constants of the program.
IntArray = Any

_NO_DOCUMENT_AFTER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Causality, window and documents of one attention; the same for all its heads.

    Attributes:
      causal: a query sees no key after its own index.
      window: a query sees a key only if their indices are less than this apart (causal: itself and the window - 1 keys
        before it); None is no limit.
      q_documents_BT: int32 document of each query, 0 for padding, which sees nothing. Documents other than 0 must not
        decrease along a row, and padding must not lie inside one. None is one document, and then the keys' too.
      k_documents_BS: the same of each key; padding is seen by nobody.
      q_index_BT: int32 index of each query in the sequence of keys, for cached decoding; None is 0, 1, ...
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_documents_BT: jax.Array | None = None
    k_documents_BS: jax.Array | None = None
    q_index_BT: jax.Array | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"AttentionMask: window must be at least 1 or None, got {self.window}")
        if (self.q_documents_BT is None) != (self.k_documents_BS is None):
            missing = "q_documents_BT" if self.q_documents_BT is None else "k_documents_BS"
            raise ValueError(f"AttentionMask: give documents of queries and of keys or neither; {missing} is None")


def dense(mask: AttentionMask, B: int, T: int, S: int) -> jax.Array:
    """Returns the boolean mask_BTS, straight from the definition: the yardstick of `ranges`, too large for real use."""
    q_index_BT1 = jnp.broadcast_to(jnp.arange(T) if mask.q_index_BT is None else mask.q_index_BT, (B, T))[:, :, None]
    distance_BTS = q_index_BT1 - jnp.arange(S)[None, None, :]
    mask_BTS = jnp.ones((B, T, S), bool)
    if mask.causal:
        mask_BTS &= distance_BTS >= 0
    if mask.window is not None:
        mask_BTS &= jnp.abs(distance_BTS) < mask.window
    if mask.q_documents_BT is not None and mask.k_documents_BS is not None:
        q_documents_BT1, k_documents_B1S = mask.q_documents_BT[:, :, None], mask.k_documents_BS[:, None, :]
        mask_BTS &= (q_documents_BT1 == k_documents_B1S) & (q_documents_BT1 != 0)
    return mask_BTS


def ranges(mask: AttentionMask, B: int, T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Returns int32 (k_start_BT, k_end_BT): query t of row b sees the keys k_start <= s < k_end.

    A query that sees nothing has k_start == k_end. Time and memory are linear in T and S, up to a logarithm.
    """
    q_index_BT = jnp.arange(T, dtype=jnp.int32)[None, :] if mask.q_index_BT is None else mask.q_index_BT
    k_start_BT, k_end_BT = _limits(mask, q_index_BT, S)
    if mask.q_documents_BT is not None and mask.k_documents_BS is not None:
        # The last document begun at or before a key, and the first one not ended before it: both ascend along the row
        # whether padding leads, trails or lies between documents.
        begun_BS = jax.lax.cummax(mask.k_documents_BS, axis=1)
        unended_BS = jnp.where(mask.k_documents_BS == 0, _NO_DOCUMENT_AFTER, mask.k_documents_BS)
        unended_BS = jax.lax.cummin(unended_BS, axis=1, reverse=True)
        first_BT = jax.vmap(lambda keys_S, q_T: jnp.searchsorted(keys_S, q_T, side="left"))(
            begun_BS, mask.q_documents_BT
        )
        last_BT = jax.vmap(lambda keys_S, q_T: jnp.searchsorted(keys_S, q_T, side="right"))(
            unended_BS, mask.q_documents_BT
        )
        k_start_BT = jnp.maximum(k_start_BT, first_BT)
        k_end_BT = jnp.where(mask.q_documents_BT == 0, 0, jnp.minimum(k_end_BT, last_BT))
    k_start_BT = jnp.clip(k_start_BT, 0, S)
    k_end_BT = jnp.clip(k_end_BT, k_start_BT, S)
    return (
        jnp.broadcast_to(k_start_BT, (B, T)).astype(jnp.int32),
        jnp.broadcast_to(k_end_BT, (B, T)).astype(jnp.int32),
    )


def static_ranges(mask: AttentionMask, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranges due to causality and window alone, as numpy arrays (k_start_T, k_end_T).

    They hold for every row if the queries' indices are 0, 1, ..., and documents can only narrow them.
    """
    k_start_T, k_end_T = _limits(mask, np.arange(T, dtype=np.int32), S)
    k_start_T = np.clip(k_start_T, 0, S)
    return k_start_T, np.clip(k_end_T, k_start_T, S)


def _limits(mask: AttentionMask, q_index_BT: IntArray, S: int) -> tuple[IntArray, IntArray]:
    """Returns the ranges due to causality and window, not yet clipped to the keys that there are."""
    if mask.window is None:
        k_start_BT, k_end_BT = q_index_BT * 0, q_index_BT * 0 + S
    else:
        k_start_BT, k_end_BT = q_index_BT - (mask.window - 1), q_index_BT + mask.window
    return k_start_BT, (q_index_BT + 1 if mask.causal else k_end_BT)
