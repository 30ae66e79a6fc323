"""Many runs of `train.py` that belong together: a policy each, one runner, one way to start a run.

Nothing else starts trainings; a single run imports none of this.
"""
