"""A run: its rows, its batches, its checkpoints, its cost, and the trainer that holds them together."""
