"""Evaluation: sets of questions with known answers, asked of a version through vLLM, scored, and compared."""
