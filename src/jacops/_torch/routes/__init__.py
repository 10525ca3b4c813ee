"""Ways to matrices, diagonals and rows by parameters, each proved against products."""
