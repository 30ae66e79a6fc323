"""Strategies that share weights across repeated layers."""
