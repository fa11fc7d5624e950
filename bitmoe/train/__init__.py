"""Training: starting ranks, the loop, schedules, checkpoints and what a run reports."""
