"""What OpenAI's API has and vLLM's server has not: stored chat completions."""
