"""Runs: training by a config, checkpoints, exported predictions, plots and reports.

Import the modules one by one: a report does not import training.
"""
