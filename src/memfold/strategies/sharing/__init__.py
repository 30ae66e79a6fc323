"""Randomised parameter sharing: every weight a signed, scaled view into one trained vector."""
