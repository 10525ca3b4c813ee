"""How torch is run here: state restored after a call, noise drawn in private, memory, tolerances, chunks."""
