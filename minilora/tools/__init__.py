"""Tools: checks of checkpoints and runs, reports, memory plans, traces and plots."""
