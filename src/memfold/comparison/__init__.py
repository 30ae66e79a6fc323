"""A comparison of methods by one plan: the same budget of choices, then the same seeds for each."""
