"""Stages of a recipe: the tower with labels, conversations, preferences; each resumable, each leaves a delta."""
