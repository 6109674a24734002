"""Runs: training by a config, checkpoints, exported predictions, plots and reports.

The modules are doors of their own: who writes a report imports no training.
"""
