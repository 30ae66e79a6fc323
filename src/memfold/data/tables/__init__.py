"""Tables: rows of numbers and categories, and what is to be predicted of each.

`data_module.py` is what the data sets stand on, `encoding.py` turns columns into numbers and codes.
"""
