"""Facts of the ranks of a job, tests of their sums, problems and remedies.

The entry point is `hpc_bnn.doctor.examine`.
"""
