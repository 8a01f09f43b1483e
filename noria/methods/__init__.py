"""Settings of training methods that have many, checked without torch; `train.methods` does what they say."""
