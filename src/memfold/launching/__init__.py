"""Many runs of `train.py`, several at a time: started, watched, resumed and stopped."""
