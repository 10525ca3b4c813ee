"""How torch is run here: state put back after a call, noise drawn in private, memory, tolerances, chunks."""
