"""Named rivals side by side in one run: the same answer first, then the clock and the peak memory, as ratios."""
