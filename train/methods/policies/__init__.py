"""Module policies on a loaded model: who trains, in which parameter groups, and the proof that nobody else does."""

from train.methods.policies.apply import ADAPTER, Applied, Row, apply_policies

__all__ = ["ADAPTER", "Applied", "Row", "apply_policies"]
