"""The names of dimensions, of logical axes and of mesh axes. One table each, for the whole project.

Dimension key, the suffix of array names (`q_BTNH`), after Noam Shazeer's shape suffixes (2024):

  B batch row        T query position      S key position       D model width
  N query head       K key/value head      G = N // K           H head width
  F feed-forward     V vocabulary          E expert             L stored layer (leading, in stacked weights)

A suffix is the logical shape, never the sharding; scalars and trees have none.
"""

# Logical axes of parameters; parallel/rules.py maps them to mesh axes.
LAYERS = "layers"
VOCAB = "vocab"
EMBED = "embed"
MLP = "mlp"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
EXPERT = "expert"
NORM = "norm"

# Logical axes of activations: their own names, because FSDP shards a weight's `embed` but not an activation's.
BATCH = "batch"
LENGTH = "length"
ACT_EMBED = "act_embed"

# Mesh axes.
DATA = "data"
FSDP = "fsdp"

# The mesh axes that divide the rows of a batch.
BATCH_MESH_AXES = (DATA, FSDP)
