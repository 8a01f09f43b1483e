"""Where GRPO's groups come from: prompts, the policy as an adapter beside the live version, batches of groups."""
