"""The processes of one run: ranks, whoever starts them, and the signals that end them."""
