"""Images as uint8 tensors, batched on the model's device.

`data_module.py` is what the data sets stand on, `augmentation.py` what happens to a batch, and
`idx.py`, `cifar_binary.py` and `decoded_files.py` are the file formats.
"""
