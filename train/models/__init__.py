"""How a base model comes into the house: a folder that the user names, or the embedded model."""
