"""Data sets, one file each: a class and its facts, and one `conf/data/NAME.yaml`.

`spec.py` says what a sample is, `data_module.py` serves samples, `batching.py` has their order;
`images/` is what image data sets stand on.
"""
