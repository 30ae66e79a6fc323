"""Where the numbers of one run go: files, loggers, Weights & Biases."""
