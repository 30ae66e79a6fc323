"""The folder of one run: its names, locks, record, result, and how a run goes on in it."""
