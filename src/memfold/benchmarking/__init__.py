"""Measure what strategies cost and save against the dense model; `scripts/benchmark.py` runs it.

`cases` say what is measured, `case` measures one of them in a process of its own, `runner` starts
the processes, `results` compares each case with its dense one, `tables` and `plots` show that.
"""
