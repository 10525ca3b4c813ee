"""Models as functions: private copies, inputs, cuts, losses, and forwards followed operation by operation."""
