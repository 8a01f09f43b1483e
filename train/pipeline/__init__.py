"""The job's stages in order: snapshot, train, merge, quantize, verify, publish, rollout."""
