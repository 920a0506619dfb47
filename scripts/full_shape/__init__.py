"""The parts of scripts/demo_full_shape. They import neither torch nor the stages, which run in their own processes."""
