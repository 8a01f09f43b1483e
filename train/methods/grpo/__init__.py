"""GRPO: groups of answers from the serving engine, TRL's loss on a LoRA of the language model."""
