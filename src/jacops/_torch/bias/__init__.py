"""Bias parts: a forward followed operation by operation, with what no input feature carries beside each value."""
