"""What is kept of the traffic: taken down beside the answer, written by a thread of its own.

Nothing is imported here, so that each part can be used without the others.
"""
