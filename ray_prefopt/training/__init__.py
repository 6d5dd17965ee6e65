"""Training on Ray: step, loop, checkpoints, workers, and what each command does."""
