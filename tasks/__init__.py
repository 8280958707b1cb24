"""Tasks: prediction, loss and metrics of each, fine-tuning of experts, and the benchmark over a suite."""
