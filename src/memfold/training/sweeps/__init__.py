"""Many jobs, each in a process tree of its own, that survive what happens to sweeps."""
