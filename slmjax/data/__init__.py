"""Training-time input: tokenizers, token stores, conversations, packing, mixtures and the loader."""
