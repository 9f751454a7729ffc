"""What happens around a run: the output directory, the log and the report, the state to resume from."""
