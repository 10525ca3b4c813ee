"""Names that other libraries have for arguments of least squares, and what to do instead."""

from __future__ import annotations

# What SciPy's `least_squares` and PyPose's `LM` and `GN` have, where no keyword has the same meaning.
FAMILIAR = {
    "args": "Pass what the model is called with as `input`: a tuple is unpacked.",
    "diff_step": "Derivatives are exact, so there is no step to choose; `jacobian` selects how they are stored.",
    "jac": "Derivatives are exact; `jacobian` selects how they are stored.",
    "jac_sparsity": "Pass `jacobian='sparse'`: the pattern is found from the model.",
    "kwargs": "Pass what the model is called with as `input`: a mapping gives keyword arguments.",
    "max": "Steps are limited by `strategy`; a damping has no upper limit to choose.",
    "max_iter": "Did you mean `max_steps`?",
    "method": "Did you mean `solver`, how the equations of a step are solved, or levenberg_marquardt's `strategy`?",
    "min": "The first damping is levenberg_marquardt's `damping`; there is no lower limit to choose.",
    "prior": "A prior is one more output: return `(residual, x - mean)`, and its precision in `weight=[None, ...]`.",
    "reject": "The call ends where no step helps; `max_steps` and `max_nfev` limit how many are tried.",
    "tr_options": "Did you mean `solver`? It takes a `StepSolver` with its options.",
    "tr_solver": "Did you mean `solver`?",
    "vectorize": "Jacobians are always taken for many rows at once; leave it out.",
}
FAMILIAR |= {"max_iterations": FAMILIAR["max_iter"], "priors": FAMILIAR["prior"]}
