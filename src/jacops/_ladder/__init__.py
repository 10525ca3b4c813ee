"""Routes to a result, tried in order of cost: each is taken only where it is proved right."""
