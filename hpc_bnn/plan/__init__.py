"""Memory, time and communication of every grid, before a job runs."""
