"""Image data sets that live as uint8 tensors, batched on the model's device.

`base.py` is the data module, `batching.py` the order and the augmentation of samples, `idx.py`,
`cifar_binary.py` and `image_folder.py` the file formats. A data set is one file that names a
class, its facts and its files, and one `conf/data/NAME.yaml`.
"""
