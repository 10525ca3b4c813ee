"""Parts that need an optional package, which is imported when they are called and never before."""
