"""Text as tokens: bytes, byte-pair encoding, or a tokenizer file.

`data_module.py` is what the data sets stand on, `tokenizers.py` turns bytes into tokens and back,
`windows.py` cuts a stream of tokens into samples, `token_files.py` keeps it on disk; `raw_bytes.py`
reads files and archives.
"""
