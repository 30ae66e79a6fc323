"""The comparison of the STABLE-RPS paper: every method, ratio and seed on every experiment."""
