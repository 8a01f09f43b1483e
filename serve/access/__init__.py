"""Who calls, what they may do, and how much of it: keys, roles and limits, the same on both wires."""
