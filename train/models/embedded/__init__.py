"""The embedded model: SmolLM2-135M-Instruct in a small LLaVA, fetched, assembled, quantised and published."""
