"""The parts of `scripts/study_rounding`. They use the program's own functions, and the program does not use them."""
