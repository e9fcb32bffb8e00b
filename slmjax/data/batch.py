"""What a training step reads."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of packed documents; every field is a numpy or JAX array of shape (B, T).

    Attributes:
      tokens: int32 ids, 0 (pad) where `documents` is 0.
      targets: int32, the next token; of no meaning where the weight is 0.
      weights: float32, 0 where nothing is to be learned: padding, a document's last token, the user's turns.
      documents: int32, 1, 2, ... within a row and not decreasing; 0 is padding. None where they are not kept apart.
      positions: int32, index within the document; of the whole document, also when a row begins inside one.
    """

    tokens: Any
    targets: Any
    weights: Any
    documents: Any
    positions: Any
