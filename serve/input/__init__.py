"""What comes in from outside, checked before anything else reads it: bodies, pictures, addresses.

Nothing is imported here, so that each part can be used without the others. No module of it imports vllm.
"""
