"""Reward `preferences`: a linear head on the language model's own features, learnt from the store's pairs."""
