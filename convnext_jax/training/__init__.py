"""Training: configuration, recipe, step, evaluation, checkpoints and the loop that joins them."""
