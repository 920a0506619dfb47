"""What a run's figures look like to a person."""
