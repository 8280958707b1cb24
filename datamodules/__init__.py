"""Data modules: labelled loaders for fine-tuning and tests, label-free streams for learning a merge."""
