"""Many clients at once, for a while, on a real engine: nothing is lost, nothing grows, nobody is passed over."""
