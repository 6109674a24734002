"""What the ranks of a job find on their nodes, tests of their sums, and remedies. The door is `hpc_bnn.doctor.examine`."""
