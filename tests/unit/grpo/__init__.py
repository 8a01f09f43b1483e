"""GRPO: groups from a sampler, the loss against the papers, what stops a training."""
