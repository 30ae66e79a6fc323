"""Strategies that write a weight as a product of smaller tensors."""
