"""vLLM inside our process: how it is launched, who may use it, and which version answers.

Nothing is imported here, so that light modules (`versions`) stay light.
"""
