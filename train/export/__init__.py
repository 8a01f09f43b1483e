"""From an adapter to what the engine serves: merge, quantise, verify.

Comes in: a full-precision master and adapters. Goes out: a merged checkpoint, a GPTQ checkpoint, a probe.
Heavy imports (torch, transformers, gptqmodel) happen inside the functions that need them.
"""
