"""Offline: raw text -> filtered, deduplicated, split, tokenised stores and a manifest. `run.run(config)` does all."""
