"""Pruning: most weights are zero; what is kept is stored as values and their positions."""
