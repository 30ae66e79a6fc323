"""Strategies that train few coordinates around random weights."""
