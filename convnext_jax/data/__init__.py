"""Where training examples come from (`sources`) and how they become batches (`pipeline`).

Host side only: nothing here computes on an accelerator, and grain is imported in `pipeline` alone.
"""
