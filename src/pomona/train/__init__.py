"""A run by a recipe that loses nothing: stages, checkpoints, progress."""
