"""The house rules that a machine can keep: layers, cycles, optional packages, docstrings, file size."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import jacops

SRC = Path(__file__).parents[1] / "src"
LAYERS = [  # imports point downwards only: from a later row to an earlier one, or within a row without a cycle
    {
        "errors",
        "_cached",
        "_space",
        "_interop",
        "_encoding",
        "_saving",
        "_tables",
        "_finite",
        "_checksums",
        "_digests",
        "_display",
        "_figures",
        "_keywords",
        "_function",
        "_hooks",
        "_lazy",
        "_familiar_names",
        "_lanczos",
        "_trees",
        "_requirements",
        "_words",
        "_array_inputs",
    },  # 0 ground
    {"_runtime", "_progress", "_ladder", "_torch", "_jax"},  # backends
    {
        "_operators",
        "_options",
        "_picks",
        "_framework",
        "_recorded_loss",
        "_derivatives",
        "_curvature_products",
        "_sharded",
        "_per_sample",
        "_sample_inputs",
        "_fisher",
        "_second_order",
        "sparse",
        "charts",
        "_features",
        "_projections",
        "_data",
        "_fetching",
        "_sharing",
        "_shuffling",
        "_loaders",
    },  # 1
    {"solvers", "_estimators", "_planning", "_checks"},  # 2 methods
    {
        "_objective",
        "_mixed",
        "_passes",
        "_reduction",
        "_problem",
        "_problem_parts",
        "_one_batch",
    },  # 3 problem
    {
        "_jacobian_checks",
        "_jacobian_layout",
        "_dense_by_plan",
        "_jacobians",
        "_kronecker",
        "_products",
        "_attribution",
        "attribution",
        "_attribution_page",
        "_attribution_plot",
        "_attribution_tables",
        "_contributions",
        "_decomposition",
        "_integrated",
        "_influence",
        "influence",
        "_lens",
        "fit",
        "store",
        "_stored_rows",
        "linalg",
        "results",
        "testing",
        "_extras",
        "_saved_files",
    },  # 4 faces
    {"__init__"},
]
GROUND = {
    "errors",
    "_cached",
    "_space",
    "_interop",
    "_encoding",
    "_saving",
    "_tables",
    "_progress",
    "_finite",
    "_checksums",
    "_digests",
    "_keywords",
    "_function",
    "_hooks",
    "_lazy",
    "_lanczos",
    "_trees",
    "_requirements",
    "_words",
    "_runtime",
    "_ladder",
}
INSIDE = ["model", "sweeps", "bias", "layers", "routes", "samples", "protocol"]  # of _torch, as LAYERS
OPTIONAL = {"sklearn", "matplotlib", "jinja2", "pypose", "zarr", "jax", "pandas", "transformers", "qdldl", "rslab"}
LAZY = OPTIONAL | {"scipy", "safetensors"}
MAX_LINES = 400
MAX_BODY = 35  # lines of a function, docstring and blank lines left out
MAX_PARAMETERS = 6  # of a function that is not public
MAX_RECORDERS = 3  # functions that construct a linearisation

# What does not keep these rules yet, by rule and place; an entry that is no longer needed fails, too.
EXCEPTIONS = {
    ("linearisation", "_influence._torch.TorchTwiceDifferentiable.mvp"),
    ("linearisation", "_torch.bias.local_linear._by_rows"),
    ("linearisation", "_torch.routes.row_cotangents._linearized"),
    ("linearisation", "_torch.samples.nested.JacobianFunction.__call__"),
    ("linearisation", "_torch.samples.runs.Runner._linearized"),
    ("linearisation", "_torch.sweeps.record.record_at_outputs"),
    ("long", "_estimators._density.spectral_density"),
    ("long", "_influence._influences.compute_influences"),
    ("long", "_jacobians.modjac"),
    ("long", "solvers._minres._iterated"),
    ("long", "solvers._refine.refined"),
    ("long", "sparse._jacobian.jacobian"),
    ("parameters", "_runtime.norms.batch_norm"),
    ("parameters", "_runtime.norms.instance_norm"),
    ("parameters", "_torch.samples.batch.Samples.__init__"),
    ("parameters", "_torch.sweeps.linearization.Linearization.__init__"),
    ("parameters", "sparse._point.record_point"),
}


class Import(NamedTuple):
    target: str  # dotted, absolute
    where: str  # path:line
    when: str  # "load": when the module is imported; "call": inside a function; "types": only for the type checker


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(SRC.glob("jacops/**/*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imports(module: str, node: ast.AST, when: str = "load") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        where = f"{FILES[module].relative_to(SRC)}:{getattr(child, 'lineno', 0)}"
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, where, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            dots = child.level - (FILES[module].name == "__init__.py")  # how many names a relative import drops
            parents = module.split(".")[: len(module.split(".")) - dots] if child.level else []
            base = [*parents, *filter(None, [child.module])]
            yield from (Import(".".join([*base, alias.name]), where, when) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from imports(module, ast.Module(child.body, []), "types")
            yield from imports(module, ast.Module(child.orelse, []), when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and when == "load":
            yield from imports(module, child, "call")
        else:
            yield from imports(module, child, when)


def part(module: str) -> str:
    """Where a module stands in LAYERS: `jacops._operators._base` -> `operators`, `jacops` -> `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def home(target: str) -> str | None:
    """The module a dotted name lives in: `jacops._operators.Matrix` -> `jacops._operators`; None outside jacops."""
    while target and target not in FILES:
        target = target.rpartition(".")[0]
    return target or None


IMPORTS = [(module, found) for module, tree in TREES.items() for found in imports(module, tree)]
INNER = [(module, to, found) for module, found in IMPORTS if (to := home(found.target))]


def check_acyclic(edges: list[tuple[str, str]]) -> None:
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for source, target in edges:
        sorter.add(source, target)
    try:
        sorter.prepare()
    except CycleError as error:
        raise AssertionError("import cycle: " + " <- ".join(error.args[1])) from None


def test_every_module_has_a_place() -> None:
    lost = sorted({part(module) for module in FILES} - set(LEVEL))
    assert not lost, f"place {lost} in LAYERS of tests/test_architecture.py"


def test_imports_point_downwards() -> None:
    upward = [
        f"{found.where}: {part(module)} imports {part(to)}, which stands above it"
        for module, to, found in INNER
        if LEVEL.get(part(to), 0) > LEVEL.get(part(module), len(LAYERS))
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycle() -> None:
    """Imports inside functions included, what only the type checker reads left out."""
    check_acyclic([(module, to) for module, to, found in INNER if found.when != "types" and module != to])
    check_acyclic([(part(module), part(to)) for module, to, _ in INNER if part(module) != part(to)])


def test_the_torch_backend_is_built_in_layers() -> None:
    def level(module: str) -> int:
        return INSIDE.index(module.split(".")[2])

    inside = [(m, to, found) for m, to, found in INNER if m.count(".") > 1 and m.startswith("jacops._torch.")]
    upward = [
        f"{found.where}: {m} imports {to}, which stands above it"
        for m, to, found in inside
        if to.startswith("jacops._torch.") and level(to) > level(m)
    ]
    assert not upward, "\n".join(upward)
    ground = [
        f"{found.where}: {m} imports {to}" for m, to, found in INNER if part(m) in GROUND and part(to) not in GROUND
    ]
    assert not ground, "\n".join(ground)


def test_only_the_protocols_are_imported_from_outside_the_backends() -> None:
    strays = [
        f"{found.where}: import it from {inside}protocol"
        for module, to, found in INNER
        for inside in ("jacops._torch.", "jacops._jax.")
        if not module.startswith(inside) and to.startswith(inside) and to != f"{inside}protocol"
    ]
    assert not strays, "\n".join(strays)


def test_the_protocols_give_nothing_that_nobody_takes() -> None:
    for inside in ("_torch", "_jax"):
        protocol = f"jacops.{inside}.protocol"
        given = {found.target.rpartition(".")[2] for found in imports(protocol, TREES[protocol])} - {"annotations"}
        elsewhere = [f for module, f in IMPORTS if not module.startswith(f"jacops.{inside}.")]
        taken = {f.target.rpartition(".")[2] for f in elsewhere if f.target.startswith(f"{protocol}.")}
        assert not given - taken, f"{protocol}: {sorted(given - taken)}"


def test_operations_are_named_in_the_tables_of_rules_alone() -> None:
    homes = ("layers.rules.", "sweeps.node_rules", "sweeps.second_rules", "sweeps.linear_nodes", "bias.")
    strays = [
        f"{FILES[module].relative_to(SRC)}:{node.lineno}: {node.value}"
        for module, tree in TREES.items()
        if module.startswith("jacops._torch.") and not f"{module.removeprefix('jacops._torch.')}.".startswith(homes)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and str(node.value).endswith("Backward0")
    ]
    assert not strays, "\n".join(strays)


def test_class_names_have_one_home() -> None:
    homes: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    several = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not several, several


def test_optional_packages_stay_at_home() -> None:
    strays = []
    for module, found in IMPORTS:
        package = found.target.split(".")[0]
        if package == "jax" and "jax" not in module:  # its own modules load only for who has it
            strays.append(f"{found.where}: jax outside the modules named after it")
        elif package in OPTIONAL - {"jax"} and found.when == "load":
            strays.append(f"{found.where}: {package} is optional, import it inside the function that needs it")
    assert not strays, "\n".join(strays)


def test_import_loads_no_optional_package_nor_a_heavy_one() -> None:
    code = f"import sys, jacops; print(sorted(set(sys.modules) & {LAZY!r}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_assert_in_src() -> None:
    asserts = [
        f"{FILES[module].relative_to(SRC)}:{node.lineno}: raise a typed error instead of assert"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not asserts, "\n".join(asserts)


def test_files_stay_short() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    long = {module: length for module, length in lengths.items() if length > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines, split by meaning: {long}"


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its place: `_ladder.route.answer`, `space.Space.of`."""

    def within(node: ast.AST, place: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            inner = f"{place}.{child.name}" if named else place
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield inner, child
            yield from within(child, inner)

    for module, tree in TREES.items():
        yield from within(tree, module.removeprefix("jacops."))


FUNCTIONS = list(functions())


def nodes(function: ast.AST) -> Iterator[ast.AST]:
    """What stands in a function itself, functions inside it left out."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from nodes(child)


def named(node: ast.AST, *names: str) -> bool:
    """Whether a name or an attribute is one of these."""
    return isinstance(node, ast.Name | ast.Attribute) and getattr(node, "id", getattr(node, "attr", "")) in names


def check_exceptions(rule: str, places: set[str]) -> None:
    """Compare what breaks a rule with what is known to."""
    known = {place for of, place in EXCEPTIONS if of == rule}
    assert not places - known, f"{rule}: {sorted(places - known)}"
    assert not known - places, f"{rule}: take out of EXCEPTIONS what keeps the rule now: {sorted(known - places)}"


def test_functions_stay_short() -> None:
    def length(place: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        module = home(f"jacops.{place}") or "jacops"
        source = FILES[module].read_text(encoding="utf-8").splitlines()
        text = function.body[0] if ast.get_docstring(function) is not None else None
        docstring = range(text.lineno, (text.end_lineno or text.lineno) + 1) if text is not None else range(0)
        lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
        return sum(1 for i in lines if i not in docstring and source[i - 1].strip())

    check_exceptions("long", {place for place, function in FUNCTIONS if length(place, function) > MAX_BODY})


def test_private_functions_have_few_parameters() -> None:
    def is_private(place: str) -> bool:
        module, *names = place.split(".")
        backend = module in ("_runtime", "_ladder", "_torch", "_jax")
        return backend or any(name.startswith("_") and not name.startswith("__") for name in names)

    def many(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        return len([name for name in names if name not in ("self", "cls")])

    spaces = [getattr(jacops, name) for name in jacops.__all__ if inspect.ismodule(getattr(jacops, name))]
    exported = {*jacops.__all__, *(name for space in spaces for name in space.__all__)}
    long = {place for place, function in FUNCTIONS if many(function) > MAX_PARAMETERS and is_private(place)}
    check_exceptions("parameters", {place for place in long if place.rpartition(".")[2] not in exported})


def test_few_places_construct_a_linearisation() -> None:
    places = {
        place
        for place, function in FUNCTIONS
        if any(isinstance(node, ast.Call) and named(node.func, "Linearization") for node in nodes(function))
    }
    known = {place for rule, place in EXCEPTIONS if rule == "linearisation"}
    check_exceptions("linearisation", places & known)
    assert len(places - known) <= MAX_RECORDERS, sorted(places - known)


def test_proofs_have_no_string_keys() -> None:
    asked = ("needs", "remember", "refuse", "refused", "refusal")

    def is_worded(node: ast.AST) -> bool:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and named(node.func, *asked)):
            return False
        keys = node.args[:2] if node.func.attr == "refuse" else node.args  # its third one is the reason, in words
        return any(isinstance(key, ast.Constant) and str(key.value) for key in keys)

    worded = {place for place, function in FUNCTIONS if any(map(is_worded, nodes(function)))}
    check_exceptions("string key", worded)


def test_one_module_catches_failed_routes() -> None:
    failures = ("RouteFailedError", "RouteWrongError", "RouteNotFiniteError")

    def catches(node: ast.AST) -> bool:
        if isinstance(node, ast.ExceptHandler):
            return node.type is not None and any(named(part, *failures) for part in ast.walk(node.type))
        suppressed = isinstance(node, ast.Call) and named(node.func, "suppress")
        return suppressed and any(named(part, *failures) for part in ast.walk(node))

    places = {place for place, function in FUNCTIONS if any(map(catches, nodes(function)))}
    check_exceptions("catches", {place for place in places if not place.startswith("_ladder.")})


def test_public_names_have_docstrings() -> None:
    def silent(name: str) -> bool:
        thing = getattr(jacops, name)
        text = (thing.__doc__ or "").strip()
        from_dataclass = inspect.isclass(thing) and text.startswith(f"{name}(")
        return (inspect.isclass(thing) or inspect.isroutine(thing)) and (not text or from_dataclass)

    assert jacops.__all__, "jacops/__init__.py names nothing in __all__"
    mute = sorted(filter(silent, jacops.__all__))
    assert not mute, f"public names without a docstring: {mute}"
