"""The mathematics of pruning on plain tensors: statistics, ordering, budget projection, calibration.

Nothing here knows gymnasium, MLflow, transformers or files: all of it can be checked against a slow, obvious reference.
"""
