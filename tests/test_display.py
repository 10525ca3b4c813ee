"""Operators, plans and results describe themselves once: text and HTML say the same, and HTML escapes all of it."""

import dataclasses
import html
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import jacops
from jacops import linalg
from jacops._display import Described, Description, Table, changed, listed, with_error
from jacops._runtime.memory import in_words
from jacops.linalg import Identity, Matrix

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X, Y = torch.randn(12, 4), torch.randint(3, (12,))
P = sum(p.numel() for p in NET.parameters())
PROBLEM = jacops.Problem(NET, F.cross_entropy, [(X[:5], Y[:5]), (X[5:], Y[5:])], l2=0.1)


def hessian() -> Any:
    return jacops.hessian(NET, F.cross_entropy, X, Y)


def jacobian(wrt: Any = "parameters") -> Any:
    return jacops.jacobian(NET, X, wrt)


def fisher(kind: Any) -> Any:
    return jacops.fisher(NET, F.cross_entropy, X, Y, kind=kind)


def influences(**options: Any) -> Any:
    wrapped = jacops.TorchTwiceDifferentiable(NET, F.cross_entropy)
    return jacops.compute_influences(wrapped, [(X, Y)], curvature="ggn", damping=0.5, **options)


def factors() -> Any:
    wrapped = jacops.TorchTwiceDifferentiable(NET, F.cross_entropy)
    return jacops.compute_influence_factors(wrapped, [(X, Y)], [(X[:2], Y[:2])], curvature="ggn", damping=0.5)


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[1:] - x[:-1] ** 2


def sparse_plan() -> Any:
    return jacops.sparse_plan(Chain(), torch.ones(30), wrt="inputs")


def fit() -> Any:
    t = torch.linspace(0, 2, 20).double()
    start = torch.tensor([1.0, 0.5]).double()
    return jacops.levenberg_marquardt(lambda p: p[0] * torch.exp(-p[1] * t), params=start, target=3 * torch.exp(-t))


OPERATORS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "hessian": (hessian, f"Hessian({P} × {P}, float32, cpu)", "d²loss / dθ²"),
    "ggn": (lambda: jacops.ggn(NET, F.cross_entropy, X, Y), f"GaussNewton({P} × {P}, float32, cpu)", "Jᵀ"),
    "fisher": (lambda: fisher("exact"), f"Fisher({P} × {P}, float32, cpu)", "model's labels"),
    "monte carlo": (lambda: fisher("monte_carlo"), f"MonteCarloFisher({P} × {P}", "drawn labels"),
    "empirical": (lambda: fisher("empirical"), f"EmpiricalFisher({P} × {P}", "data's labels"),
    "jacobian": (jacobian, f"Jacobian(36 × {P}, float32, cpu)", "df / dθ"),
    "input jacobian": (lambda: jacobian("inputs"), "Jacobian(36 × 48, float32, cpu)", "df / dx"),
    "sample gradients": (lambda: jacops.sample_gradients(NET, F.cross_entropy, X, Y), f"LayerFactors(12 × {P}", "loss"),
    "hessian of data": (PROBLEM.hessian, f"Hessian({P} × {P}, float32, cpu)", "d²loss / dθ²"),
    "ggn of data": (PROBLEM.ggn, f"GaussNewton({P} × {P}", "Jᵀ"),
    "fisher of data": (lambda: PROBLEM.fisher("empirical"), f"EmpiricalFisher({P} × {P}", "data's labels"),
    "rows of data": (PROBLEM.sample_gradients, f"SampleGradients(12 × {P}", "every sample"),
    "transpose": (lambda: jacobian().T, f"Operator({P} × 36, float32, cpu)", ": Jacobianᵀ"),
    "multiple": (lambda: 2 * hessian(), "Operator(", ": 2 · Hessian"),
    "sum": (lambda: hessian() + 0.1 * Identity(hessian().domain), "Operator(", ": Hessian + 0.1 · Identity"),
    "product": (lambda: jacobian().T @ jacobian(), "Operator(", ": Jacobianᵀ · Jacobian"),
    "nested": (lambda: 3 * (hessian() + PROBLEM.ggn()), "Operator(", ": 3 · (Hessian + GaussNewton)"),
    "inverse": (lambda: jacops.inverse(PROBLEM.ggn(), "cg", damping=0.5), "Inverse(", ": (GaussNewton + 0.5 I)⁻¹"),
    "matrix": (lambda: Matrix(torch.eye(3).double()), "Matrix(3 × 3, float64, cpu)", "72 B held"),
}
RESULTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "problem": (lambda: PROBLEM, ("Problem(mean over data", f"{P} of {P} parameters", "l2 0.1", "0.weight (6, 4)")),
    "plan": (lambda: jacops.plan(jacops.compute_jacobian, NET, X), ("Plan for compute_jacobian", "→ ", "sweeps")),
    "plan of dense": (lambda: jacops.plan(hessian().dense), ("Plan for Hessian.dense", "result 10.2 KiB")),
    "solution": (
        lambda: jacops.solve(PROBLEM.ggn(), torch.ones(2, P), "cg", damping=0.5),
        (f"Solution(2 × {P}, float32, cpu)", "2 converged, worst residual", "damping 0.5"),
    ),
    "influences": (influences, ("Influences(12 × 12, float32, cpu): up", "+ s_test", "test sample", "… 7 more")),
    "perturbations": (lambda: influences(influence_type="perturbation"), ("(12 × 12 × 4,", ": perturbation")),
    "factors": (factors, (f"InfluenceFactors(2 × {P}, float32, cpu)", "ggn, damping 0.5", "converged")),
    "contributions": (
        lambda: jacops.contributions(NET[0], X),
        ("Contributions(12 samples, 6 outputs, 4 features)", "mean |contribution|"),
    ),
    "verification": (lambda: jacops.contributions(NET[0], X).verification, ("relative error", "range of Z")),
    "eigenpairs": (
        lambda: linalg.eigenpairs(PROBLEM.ggn(), 10),
        (f"Eigenpairs(10 of {P}, converged)", "eigenvalue", "… 2 more"),
    ),
    "density": (lambda: linalg.spectral_density(hessian(), 4, 10), ("SpectralDensity(51", "4 of 10 steps")),
    "check": (lambda: jacops.check(NET, X), ("Check(central difference: passed",)),
    "pattern": (lambda: sparse_plan().pattern, ("Pattern(29 × 30, 58 entries, reusable)", "⢦")),
    "sparse plan": (sparse_plan, ("SparsePlan(29 × 30): 1 sweep instead of 29", "58 entries", "1 backward")),
    "sparse jacobian": (
        lambda: sparse_plan().evaluate(Chain(), torch.ones(30)),
        ("SparseJacobian(29 × 30, float32, scipy csr): 58 entries", "error bound"),
    ),
    "torch sparse jacobian": (
        lambda: sparse_plan().evaluate(Chain(), torch.ones(30), layout="coo"),
        ("SparseJacobian(29 × 30, float32, sparse_coo): 58 entries",),
    ),
    "projection": (
        lambda: jacops.results.Projection(torch.ones(2, 5), torch.zeros(5)),
        ("Projection(5 features to 2 inputs, float32)",),
    ),
    "fit": (fit, ("LeastSquaresResult(", "objective: ", "taken", "forward passes")),
}
ALL = {**{name: make for name, (make, *_) in OPERATORS.items()}, **{name: make for name, (make, _) in RESULTS.items()}}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_carries_the_name_of_what_it_is(name: str) -> None:
    make, head, formula = OPERATORS[name]
    operator = make()
    title, *more = repr(operator).splitlines()
    assert title.startswith(head)
    assert formula in repr(operator)
    assert operator.name == head.partition("(")[0]
    assert not set(re.findall(r"LinearizedMap|Product|Scaled|SumOver|StackOver|_Scores", repr(operator)))
    assert all(line.startswith("  ") and ": " in line for line in more)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_states_its_facts(name: str) -> None:
    make, facts = RESULTS[name]
    said = repr(make())
    for fact in facts:
        assert fact in said


@pytest.mark.parametrize("name", ALL)
def test_reprs_are_short_and_html_says_the_same(name: str) -> None:
    found = ALL[name]()
    lines = repr(found).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 160
    shown = found._repr_html_()
    assert shown.startswith("<div>")
    assert re.sub(r"<(\w+)[^>]*>|</(\w+)>", "", shown).count("<") == 0
    opened, closed = re.findall(r"<(\w+)", shown), re.findall(r"</(\w+)", shown)
    assert sorted(opened) == sorted(closed)
    plain = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())
    seconds = r"\d+\.\d+ s\b"
    for fact in found._describe().facts:
        assert " ".join(re.sub(seconds, "", fact[1]).split()) in " ".join(re.sub(seconds, "", plain).split())
    assert found._describe().title in plain


def test_the_routes_taken_and_what_was_proved_are_shown() -> None:
    J = jacobian()
    assert "route: not yet used" in repr(J)
    J @ torch.ones(P)
    assert re.search(r"\n  push: .*, proved: adjoint\n", repr(J))
    unproved = jacops.jacobian(NET, X, checks="never")
    unproved @ torch.ones(P)
    assert "push: " in repr(unproved)
    assert "proved: matches plain" not in repr(unproved)
    G = jacops.ggn(NET, F.cross_entropy, X, Y)
    G @ torch.ones(P)
    for words in ("Jacobian push: ", "Jacobian pull: ", "Hessian product: ", "known to be: symmetric, positive semi"):
        assert repr(G).count(words) == 1


def test_messages_name_the_operator() -> None:
    v = torch.full((P,), math.nan)
    with pytest.raises(jacops.errors.NonFiniteError, match=r"^Hessian: in `v`"):
        hessian() @ v


class Hostile(Described):
    def _describe(self) -> Description:
        bad = "<script>alert('&')</script>"
        table = Table((bad, "n"), [(bad, "1"), (bad,)], caption=bad)
        return Description(bad, [(bad, bad)], [table], picture=bad)


def test_html_escapes_every_text() -> None:
    shown = Hostile()._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 8
    assert shown.count("&#x27;&amp;&#x27;") == 8
    assert repr(Hostile()).count("<script>") == 8


def test_names_of_parameters_are_escaped() -> None:
    model = nn.ModuleDict({"<b>": nn.Linear(2, 1)})
    model.forward = lambda x: model["<b>"](x)
    shown = jacops.jacobian(model, torch.ones(3, 2))._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;.weight" in shown


def test_a_table_aligns_numbers_at_their_end() -> None:
    table = Table(("name", "size"), [("a", "7"), ("long name", "1,250"), ("… 3 more",)])
    lines = Description("title", tables=[table]).text().splitlines()
    assert lines == ["title", "  name        size", "  a              7", "  long name  1,250", "  … 3 more"]


def test_a_labelled_table_repeats_its_words() -> None:
    table = Table(("#", "value", ""), [("1", "2.5", "rejected"), ("2", "10", "")], labelled=1)
    assert Description("t", tables=[table]).text().splitlines() == ["t", "  1  value 2.5  rejected", "  2  value  10"]


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (12, "12 B"), (1023, "1,023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (12 * 2**20, "12 MiB"),
     (2**30 - 1, "1,024 MiB"), (1.5 * 2**30, "1.5 GiB"), (123 * 2**40, "123 TiB"), (5000 * 2**40, "5,000 TiB")],
)  # fmt: skip
def test_sizes_stand_in_a_fitting_unit(size: float, words: str) -> None:
    assert in_words(size) == words


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(12.3456, 0.4, "12.3 ± 0.4"), (12.3456, 0.1234, "12.35 ± 0.12"), (-0.5, 0.0996, "-0.50 ± 0.10"),
     (3.0, 0.0, "3 (exact)"), (1.5e9, 2e6, "(1.5000 ± 0.0020)e+09"), (2e-7, 4e-9, "(2.00 ± 0.04)e-07"),
     (123456.0, 0.4, "123456.0 ± 0.4"), (0.0, 0.5, "0.0 ± 0.5"),
     (math.nan, 1.0, "nan ± 1"), (1.0, math.inf, "1 ± inf")],
)  # fmt: skip
def test_an_estimate_reads_as_a_number_with_its_error(value: float, error: float, words: str) -> None:
    assert with_error(value, error) == words
    assert repr(linalg.Estimate(value, error)) == words


@hypothesis.settings(deadline=None, max_examples=300, derandomize=True)
@hypothesis.given(value=st.floats(-1e12, 1e12), error=st.floats(1e-9, 1e9))
def test_what_is_read_is_the_number_up_to_a_fraction_of_its_error(value: float, error: float) -> None:
    hypothesis.assume(error >= 1e-14 * abs(value))  # below that an error is no more than rounding of the number
    found = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)\)?(?:e([+-]\d+))?", with_error(value, error))
    assert found is not None
    power = Fraction(10) ** int(found[3] or 0)
    assert abs(Fraction(found[1]) * power - Fraction(value)) <= Fraction(error) / 6
    assert abs(Fraction(found[2]) * power - Fraction(error)) <= Fraction(error) / 6


def test_estimates_read_as_numbers() -> None:
    operator = PROBLEM.ggn()
    drawn = linalg.trace(operator, probes=10)
    assert repr(drawn) == with_error(*drawn)
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", repr(drawn))
    assert "at most" in repr(linalg.spectral_norm(operator))
    assert repr(linalg.diagonal(operator, 4)).startswith(f"DiagonalEstimate({P} entries")


def test_a_wrapped_model_says_how_many_parameters_there_are() -> None:
    wrapped = jacops.TorchTwiceDifferentiable(NET, F.cross_entropy)
    assert repr(wrapped) == f"TorchTwiceDifferentiable({sum(p.numel() for p in NET.parameters())} parameters)"


def test_recipes_show_what_differs_from_the_default() -> None:
    assert changed(jacops.solvers.CG()) == "CG()"
    assert changed(dataclasses.replace(jacops.solvers.CG(), max_steps=7)) == "CG(max_steps=7)"
    assert "solver: CG(max_steps=7)" in repr(jacops.inverse(PROBLEM.ggn(), jacops.solvers.CG(max_steps=7)))


def test_many_names_are_shortened() -> None:
    assert listed([f"n{i}" for i in range(6)]) == "n0, n1, n2, n3, n4, n5"
    assert listed([f"n{i}" for i in range(9)]) == "n0, n1, n2, n3, n4, … 4 more"


def test_the_table_of_influences_names_the_strongest() -> None:
    found = influences()
    row = next(line for line in repr(found).splitlines() if line.split()[:1] == ["1"])
    order = found.values[1].argsort(descending=True).tolist()
    assert re.findall(r"#(\d+)", row) == [str(i) for i in [*order[:3], *order[::-1][:3]]]
    assert f"#{order[0]} {float(found.values[1, order[0]]):+.2g}" in row


def test_the_html_of_a_fit_has_parameters_and_every_step() -> None:
    found = fit()
    shown = found._repr_html_()
    assert "x = [3, 1]" in shown
    assert shown.count("<tr>") == len(found._whole().facts) + 1 + 1 + len(found.log)  # parameter, header, steps


def test_the_html_of_a_fit_folds_its_steps_from_ten_on() -> None:
    def rosenbrock(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    short, long = (jacops.levenberg_marquardt(rosenbrock, params=torch.tensor(x)) for x in ([1.0, 1.0], [-1.2, 1.0]))
    assert len(short.log) < 10 <= len(long.log)
    assert "<details>" not in short._repr_html_()
    assert f"<details><summary>{len(long.log)} steps: " in long._repr_html_()
    assert long._repr_html_().count("<tr>") == len(long._whole().facts) + 1 + 1 + len(long.log)
