"""LieTensors of PyPose: Jacobians held against differences along `Exp(d) X`, or an error that names what is wrong."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pypose as pp
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jacops
from jacops import JacopsWarning, modjac
from jacops._extras.lie import layout
from jacops._torch.sweeps.record import ModelRun
from jacops.errors import ModelStateError, NonFiniteError, NotDifferentiableError

GROUPS = {"SO3": 4, "SE3": 7, "Sim3": 8, "RxSO3": 5}  # widths of storage; a tangent is one narrower
EACH = pytest.mark.parametrize("group", GROUPS)
STEP = 1e-6


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(3)


# Models and their Jacobians by differences


class Model(nn.Module):
    """A function of named parameters: `function(model, *inputs)`."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, pp.Parameter(value) if isinstance(value, pp.LieTensor) else nn.Parameter(value))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.function(self, *args, **kwargs)


def drawn(kind: str, *shape: int, sigma: float = 0.7) -> pp.LieTensor:
    """Elements of a group ("SE3") or an algebra ("se3")."""
    return getattr(pp, f"randn_{kind}")(*shape, sigma=sigma, dtype=torch.float64)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lie(kind: str, values: Tensor) -> pp.LieTensor:
    return pp.LieTensor(values, ltype=getattr(pp, f"{kind}_type"))


def is_group(value: Tensor) -> bool:
    return isinstance(value, pp.LieTensor) and not value.ltype.on_manifold


def plain(value: Tensor) -> Tensor:
    return value.detach().as_subclass(Tensor).clone()


def moved(value: Tensor, d: Tensor) -> Tensor:
    """`Exp(d) X` for elements of a group, `x + d` for all else, as plain numbers."""
    if not is_group(value):
        return plain(value) + d
    algebra = type(value.ltype).__name__.removesuffix("Type").lower()
    return (lie(algebra, d).Exp() @ lie(type(value.ltype).__name__.removesuffix("Type"), plain(value))).tensor()


def tree(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def difference(above: Tensor, below: Tensor) -> Tensor:
    if not is_group(above):
        return plain(above) - plain(below)
    return (above @ below.Inv()).Log().tensor()


@torch.no_grad()
def by_differences(model: nn.Module, *inputs: Tensor) -> list[list[Tensor]]:
    """J[output][parameter] in tangent widths by central differences; right to about 1e-9."""

    def outputs(parameter: Tensor, values: Tensor) -> list[Tensor]:
        kept = plain(parameter)
        parameter.copy_(values)
        found = [o.clone() for o in tree(model(*inputs))]
        parameter.copy_(kept)
        return found

    columns = []
    for parameter in model.parameters():
        shape = (*parameter.shape[:-1], parameter.shape[-1] - 1) if is_group(parameter) else parameter.shape
        steps = STEP * torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
        ends = [[outputs(parameter, moved(parameter, sign * step)) for sign in (1, -1)] for step in steps]
        slopes = [[difference(a, b) / (2 * STEP) for a, b in zip(*end, strict=True)] for end in ends]
        stacked = [torch.stack(slope, -1) for slope in zip(*slopes, strict=True)]
        columns.append([s.reshape(*s.shape[:-1], *shape) for s in stacked])
    return [list(row) for row in zip(*columns, strict=True)]


def blocks(jacobian: Any) -> list[list[Tensor]]:
    """What modjac returns, as J[output][parameter]."""
    rows = jacobian if isinstance(jacobian, tuple) else (jacobian,)
    rows = rows if isinstance(rows[0], tuple) else (rows,)
    return [list(row) for row in rows]


def assert_same(found: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float = 1e-7) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for block, want in zip(row, wanted, strict=True):
            assert type(block) is Tensor
            assert block.shape == want.shape
            torch.testing.assert_close(block.detach(), want, atol=tolerance, rtol=tolerance)


def padded(found: list[list[Tensor]], model: nn.Module, *inputs: Tensor) -> list[list[Tensor]]:
    """Tangent blocks with the zeros of storage width put in."""
    outputs, widened = tree(model(*inputs)), []
    for row, output in zip(found, outputs, strict=True):
        widened.append([])
        for block, parameter in zip(row, model.parameters(), strict=True):
            wide = torch.zeros(*output.shape, *parameter.shape, dtype=block.dtype)
            wide[tuple(slice(n) for n in block.shape)] = block
            widened[-1].append(wide)
    return widened


def check_against_differences(model: nn.Module, *inputs: Tensor) -> None:
    expected = by_differences(model, *inputs)
    assert_same(blocks(modjac(model, inputs, vectorize=True, tangent=True)), expected)
    assert_same(blocks(modjac(model, inputs, vectorize=True)), padded(expected, model, *inputs))


def uses(function: Callable[..., Any]) -> set[str]:
    """Names that a function or anything it holds reads."""
    code = function.__code__
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return set(code.co_names).union(*(uses(part) for part in held if hasattr(part, "__code__")))


def model_of(function: Callable[[Model], Any], group: str, many: int = 2) -> Model:
    """The function with those of the parameters x, y (elements), a (algebra), p (points), r (numbers) that it names."""
    width = GROUPS[group]
    known = {"x": (group,), "y": (group,), "a": (group.lower(),), "p": 3, "r": width}
    named = [name for name in known if name in uses(function)]
    values = {n: drawn(*known[n], many) if isinstance(known[n], tuple) else numbers(many, known[n]) for n in named}
    return Model(function, **values)


def pypose_modjac(model: nn.Module, *inputs: Tensor) -> list[list[Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyPose warns about the shapes of its own gradients
        return blocks(pp.optim.functional.modjac(model, inputs or None))


# Everything PyPose gets right


def relative_pose(m: Model) -> Tensor:
    return (m.x[:-1].Inv() @ m.x[1:]).Log().tensor()


def averaged(m: Model) -> Tensor:
    return m.x.lview(1, 2).Log().tensor().mean(1)


RIGHT: dict[str, Callable[[Model], Any]] = {
    "Act": lambda m: m.x.Act(m.p),
    "Act broadcast": lambda m: m.x.unsqueeze(-2).Act(m.p),
    "Act homogeneous": lambda m: m.x.Act(torch.cat([m.p, m.p[:, :1]], -1)),
    "times": lambda m: m.x * m.p,
    "matrix": lambda m: m.x.matrix(),
    "Log": lambda m: m.x.Log(),
    "Exp": lambda m: m.a.Exp(),
    "Exp and Act": lambda m: m.a.Exp().Act(m.p),
    "Adj": lambda m: m.x.Adj(m.a),
    "Inv": lambda m: m.x.Inv(),
    "Inv and Adj": lambda m: m.x.Inv().Adj(m.a),
    "Jinvp": lambda m: m.x.Jinvp(m.a),
    "Mul": lambda m: m.x @ m.y,
    "Mul and Log": lambda m: (m.x @ m.y).Log(),
    "Retr": lambda m: m.x.Retr(m.a),
    "Retr and Log": lambda m: m.x.Retr(m.a).Log(),
    "plus": lambda m: (m.x + m.a).Log(),
    "itself": lambda m: m.x,
    "tensor": lambda m: m.x.tensor(),
    "tensor of Mul": lambda m: (m.x @ m.y).tensor(),
    "tensor of Exp": lambda m: m.a.Exp().tensor(),
    "tensor of algebra": lambda m: 2 * m.a.tensor(),
    "rotation": lambda m: m.x.rotation(),
    "rotation tensor": lambda m: m.x.rotation().tensor(),
    "rotation matrix": lambda m: m.x.rotation().matrix(),
    "rotation of Exp": lambda m: m.a.Exp().rotation().Log(),
    "cumprod": lambda m: m.x.cumprod(0),
    "cumprod right": lambda m: m.x.cumprod(0, left=False).Log(),
    "relative pose": relative_pose,
    "two outputs": lambda m: (m.x.Act(m.p), (m.x @ m.y).Log()),
    "averaged": averaged,
}


@EACH
@pytest.mark.parametrize("name", RIGHT)
def test_jacobian_is_the_derivative_along_the_retraction(group: str, name: str) -> None:
    check_against_differences(model_of(RIGHT[name], group))


@EACH
@pytest.mark.parametrize("lshape", [(), (1,), (2, 3)], ids=str)
def test_single_and_batched_elements(group: str, lshape: tuple[int, ...]) -> None:
    check_against_differences(Model(lambda m, p: (m.x.Act(p), m.x.Log()), x=drawn(group, *lshape)), numbers(3))


def in_place(m: Model) -> Tensor:
    row = m.y.clone()
    row[1] = m.x[0]
    return row.Log().tensor()


def gathered(m: Model) -> Tensor:
    buffer = torch.zeros(2, m.x.shape[-1], dtype=torch.float64)
    buffer[0], buffer[1] = m.x[2].tensor(), (m.x[0] @ m.y[0]).tensor()
    return pp.LieTensor(buffer, ltype=m.x.ltype).Log().tensor()


def chosen(m: Model) -> Tensor:
    mask = torch.tensor([[True], [False], [True]])
    return pp.LieTensor(torch.where(mask, m.x.tensor(), m.y.tensor()), ltype=m.x.ltype).Log().tensor()


def constant(like: pp.LieTensor) -> pp.LieTensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return drawn(type(like.ltype).__name__.removesuffix("Type"), *like.lshape)


def recomputed(m: Model) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return pp.LieTensor(x.index_select(0, torch.tensor([2, 0])), ltype=m.x.ltype).Log().tensor()

    return checkpoint(forward, m.x.tensor(), use_reentrant=False)


MOVES: dict[str, Callable[[Model], Tensor]] = {
    "index": lambda m: m.x[torch.tensor([2, 0, 2])].Log().tensor(),
    "mask": lambda m: m.x[torch.tensor([True, False, True])].Log().tensor(),
    "select": lambda m: m.x[1].Log().tensor(),
    "slice": lambda m: m.x[::2].Log().tensor(),
    "index_select": lambda m: torch.index_select(m.x, 0, torch.tensor([0, 2])).Log().tensor(),
    "gather": lambda m: m.x.gather(0, torch.tensor([[2] * m.x.shape[-1]])).Log().tensor(),
    "cat": lambda m: torch.cat([m.x, m.y]).Log().tensor(),
    "stack": lambda m: torch.stack([m.x, m.y], 1).Log().tensor(),
    "constant beside": lambda m: torch.stack([m.x, constant(m.x)], 1).Log().tensor(),
    "unbind": lambda m: m.x.unbind(0)[2].Log().tensor(),
    "split": lambda m: m.x.split([1, 2])[1].Log().tensor(),
    "chunk": lambda m: m.x.chunk(2)[0].Log().tensor(),
    "lview": lambda m: m.x.lview(1, 3).Log().tensor(),
    "transpose": lambda m: m.x.lview(1, 3).transpose(0, 1).Log().tensor(),
    "expand": lambda m: m.x[0].expand(2, -1).Log().tensor(),
    "repeat": lambda m: m.x[:1].repeat(2, 1).Log().tensor(),
    "flip": lambda m: m.x.tensor().flip(0),
    "where": chosen,
    "written in place": in_place,
    "gathered in a buffer": gathered,
    "recomputed": recomputed,
}


@EACH
@pytest.mark.parametrize("name", MOVES)
def test_elements_may_be_moved_about(group: str, name: str) -> None:
    check_against_differences(model_of(MOVES[name], group, 3))


@EACH
def test_no_elements_at_all(group: str) -> None:
    width = GROUPS[group]
    found = modjac(Model(lambda m: m.x.Log(), x=drawn(group, 0)), tangent=True)
    assert found.shape == (0, width - 1, 0, width - 1)
    assert modjac(Model(lambda m: m.x.tensor(), x=drawn(group, 0))).shape == (0, width, 0, width)


# The page's example, and PyPose's own numbers


class PoseTransform(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = pp.Parameter(pp.randn_so3(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.p.Exp() * x


def test_the_example_of_the_page() -> None:
    model, x = PoseTransform(), pp.randn_SO3()
    found = modjac(model, x, flatten=True)
    assert found.shape == (8, 6)
    assert type(found) is Tensor
    assert not found[[3, 7]].any()
    assert not found[:4, 3:].any()
    assert_same(blocks(modjac(model, x)), pypose_modjac(model, x), 1e-6)
    assert modjac(model, x).shape == (2, 4, 2, 3)
    assert modjac(model, x, flatten=True, tangent=True).shape == (6, 6)


SAME_AS_PYPOSE = [
    "Act",
    "matrix",
    "Log",
    "Exp",
    "Exp and Act",
    "Adj",
    "Inv",
    "Jinvp",
    "Mul",
    "rotation matrix",
    "two outputs",
]


@pytest.mark.parametrize("group", ["SO3", "SE3", "RxSO3"])  # for Sim3 see the series
@pytest.mark.parametrize("name", SAME_AS_PYPOSE)
def test_numbers_are_those_of_pypose_where_it_is_right(group: str, name: str) -> None:
    model = model_of(RIGHT[name], group)
    assert_same(blocks(modjac(model)), pypose_modjac(model), 1e-12)


# Options


def pose_graph(m: Model, points: Tensor) -> tuple[Tensor, pp.LieTensor]:
    return m.x.unsqueeze(-2).Act(points @ m.w), m.x[:-1].Inv() @ m.x[1:] @ m.a.Exp()


@EACH
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"vectorize": True},
        {"strategy": "forward-mode"},
        {"strategy": "forward-mode", "vectorize": True},
        {"strict": True},
    ],
    ids=str,
)
def test_every_route_gives_the_same_numbers(group: str, tangent: bool, options: dict[str, Any]) -> None:
    model = Model(pose_graph, x=drawn(group, 3), a=drawn(group.lower(), 2), w=numbers(3, 3))
    if options.get("strict"):
        model.function = lambda m, points: (m.x[:2] @ m.a.Exp()).unsqueeze(-2).Act(points @ m.w)
    points = numbers(4, 3)
    assert_same(
        blocks(modjac(model, points, tangent=tangent, **options)), blocks(modjac(model, points, tangent=tangent))
    )


@EACH
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_flatten_lays_the_blocks_side_by_side(group: str, tangent: bool, strategy: str) -> None:
    model = Model(pose_graph, x=drawn(group, 3), a=drawn(group.lower(), 2), w=numbers(3, 3))
    points = numbers(4, 3)
    found = modjac(model, points, flatten=True, tangent=tangent, strategy=strategy)
    outputs = [
        o.numel() - tangent * is_group(o) * o.lshape.numel() if is_group(o) else o.numel() for o in model(points)
    ]
    rows = [
        torch.cat([block.reshape(many, -1) for block in row], 1)
        for many, row in zip(outputs, blocks(modjac(model, points, tangent=tangent)), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(rows))
    assert found.shape[1] == 3 * (GROUPS[group] - tangent) + 2 * (GROUPS[group] - 1) + 9


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"strategy": "forward-mode"}, {"tangent": True}], ids=str)
def test_modes_of_the_caller_change_nothing(mode: Callable[[], Any], options: dict[str, Any]) -> None:
    model, points = Model(pose_graph, x=drawn("SE3", 3), a=drawn("se3", 2), w=numbers(3, 3)), numbers(4, 3)
    expected = blocks(modjac(model, points, **options))
    with mode():
        found = blocks(modjac(model, points, **options))
    assert_same(found, expected)
    assert expected[0][0].any()


@EACH
@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"strategy": "forward-mode"}], ids=str)
def test_parameters_made_in_inference_mode(group: str, options: dict[str, Any]) -> None:
    x, a, points = drawn(group, 3), drawn(group.lower(), 2), numbers(4, 3)
    expected = blocks(modjac(Model(pose_graph, x=x, a=a, w=torch.eye(3, dtype=torch.float64)), points))
    with torch.inference_mode():
        model = Model(pose_graph, x=x.clone(), a=a.clone(), w=torch.eye(3, dtype=torch.float64))
        inside = modjac(model, points.clone(), **options)
    assert model.x.is_inference()
    assert_same(blocks(inside), expected)
    assert_same(blocks(modjac(model, points, **options)), expected)


def test_inputs_by_name_and_lie_tensors_among_them() -> None:
    model = Model(lambda m, pose, points: (m.x @ pose).Act(points), x=drawn("SE3", 2))
    pose, points = drawn("SE3", 2), numbers(2, 3)
    expected = by_differences(model, pose, points)
    assert_same(blocks(modjac(model, {"points": points, "pose": pose}, tangent=True)), expected)
    assert_same(blocks(modjac(model, (pose, points), tangent=True)), expected)


def test_raw_storage_of_inputs_is_nobodys_business() -> None:
    model = Model(lambda m, pose: m.x.Act(pose.translation() + pose.tensor()[:, :3] + pose.euler()), x=drawn("SE3", 2))
    check_against_differences(model, drawn("SE3", 2))


class Mixed(nn.Module):
    """Poses, a linear layer, a pose in a buffer, and a pose that is also another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.poses = pp.Parameter(drawn("SE3", 2))
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.inner = nn.Module()
        self.inner.tied = self.poses
        self.register_buffer("camera", drawn("SE3"))
        self.scale = pp.Parameter(drawn("rxso3"))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        seen = (self.camera @ self.inner.tied).unsqueeze(-2).Act(self.layer(points))
        return self.scale.Exp().Act(seen), self.poses.Log()


def test_mixed_and_tied_parameters() -> None:
    model = Mixed()
    check_against_differences(model, numbers(4, 3))


def test_frozen_parameters_are_left_out_on_request() -> None:
    model, points = Mixed(), numbers(4, 3)
    expected = by_differences(model, points)
    model.poses.requires_grad_(False)
    assert_same(blocks(modjac(model, points, tangent=True)), expected)
    names = [name for name, _ in model.named_parameters()]
    kept = [[b for b, name in zip(row, names, strict=True) if name != "poses"] for row in expected]
    assert_same(blocks(modjac(model, points, tangent=True, parameters="trainable")), kept)
    only = Model(lambda m: m.x.Log(), x=drawn("SE3", 2)).requires_grad_(False)
    with pytest.raises(ModelStateError):
        modjac(only, parameters="trainable")


def test_the_model_stays_as_it_was() -> None:
    model, points = Mixed(), numbers(4, 3)
    before = {name: plain(value) for name, value in model.state_dict().items()}
    modjac(model, points, vectorize=True)
    assert type(model.poses) is pp.Parameter
    assert model.poses.ltype == pp.SE3_type
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(plain(value), before[name]) for name, value in model.state_dict().items())


@EACH
def test_single_precision(group: str) -> None:
    model = Model(lambda m: (m.x @ m.y).Log(), x=drawn(group, 3), y=drawn(group, 3))
    expected = by_differences(model)
    found = blocks(modjac(model.float(), tangent=True))
    assert found[0][0].dtype == torch.float32
    assert_same([[b.double() for b in row] for row in found], expected, 1e-4)


def test_a_number_that_is_not_finite_is_named() -> None:
    model = Model(lambda m: m.x.Act(torch.full((3,), torch.inf, dtype=torch.float64)), x=drawn("SO3"))
    with pytest.raises(NonFiniteError, match="output"):
        modjac(model)


# No zero columns


@EACH
def test_tangent_width_has_no_zero_columns(group: str) -> None:
    width = GROUPS[group]
    model = Model(lambda m, p: m.x.Act(p), x=drawn(group))
    points = numbers(10, 3)
    wide, narrow = (modjac(model, points, flatten=True, tangent=t) for t in (False, True))
    assert wide.shape == (30, width)
    assert torch.linalg.matrix_rank(wide.T @ wide) == width - 1
    assert narrow.shape == (30, width - 1)
    assert torch.linalg.matrix_rank(narrow.T @ narrow) == width - 1
    torch.testing.assert_close(wide[:, :-1], narrow)
    assert not wide[:, -1].any()


# Raw storage


def arithmetic(m: Model) -> Tensor:
    return 2 * m.x.tensor()


def through(function: Callable[[Tensor], Any]) -> Callable[[Model], Any]:
    return lambda m: pp.LieTensor(function(m.x.tensor()), ltype=m.x.ltype).Log().tensor()


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def nudged(where: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[where] += 0.1
    return x


def shifted(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., :2].add_(0.1)
    return x


RAW: dict[str, tuple[Callable[[Model], Any], str]] = {
    "arithmetic": (arithmetic, "raw storage, by Mul"),
    "sum": (lambda m: m.x.tensor().sum(0), "raw storage, by Sum"),
    "norm": (lambda m: m.x.norm(dim=-1), "raw storage, by LinalgVectorNorm"),
    "difference": (lambda m: m.x.tensor() - m.y.tensor(), "raw storage, by Sub"),
    "euler": (lambda m: m.x.euler(), r"raw storage, number by number, by .*\.euler\(\)"),
    "component": (lambda m: m.x.tensor()[..., 0], "raw storage, number by number, by the output"),
    "flat": (lambda m: m.x.tensor().flatten(), "raw storage, number by number, by the output"),
    "turned over": (lambda m: m.x.tensor().mT, "raw storage, number by number, by the output"),
    "scaled": (through(lambda x: 1.0 * x), "raw storage, by Mul"),
    "clamped": (through(lambda x: x.clamp(-2, 2)), "raw storage, by Clamp"),
    "moved in place": (through(lambda x: x.clone().add_(0.1)), "raw storage, by Add"),
    "moved in a row": (through(partial(nudged, 0)), "raw storage"),
    "moved in part": (through(shifted), "raw storage, by CopySlices, which changes it in place"),
    "rolled": (through(lambda x: x.roll(1, -1)), "raw storage, number by number"),
    "normalised": (lambda m: pp.quat2unit(m.x.clone()).Log(), "raw storage"),
    "custom Function": (through(Same.apply), "goes into Same as raw storage"),
    "reentrant": (
        through(lambda x: checkpoint(lambda y: y.clone(), x, use_reentrant=True)),
        "goes into CheckpointFunction as raw storage.*use_reentrant=False",
    ),
    "joined with numbers": (
        lambda m: torch.cat([m.x.tensor(), m.r]),
        "by Cat, which joins it with plain numbers of parameter r",
    ),
}


@EACH
@pytest.mark.parametrize("name", RAW)
def test_raw_reads_are_refused_by_name(group: str, name: str) -> None:
    function, words = RAW[name]
    model = model_of(function, group, 3)
    with pytest.raises(NotDifferentiableError, match=words) as caught:
        modjac(model)
    assert "parameter x" in str(caught.value)
    assert "Exp(d) X" in str(caught.value)


NAMED = [(g, "translation") for g in ("SE3", "Sim3")] + [(g, "scale") for g in ("RxSO3", "Sim3")]
INSTEAD = {
    "translation": lambda x: x.Act(torch.zeros(3, dtype=torch.float64)),
    "scale": lambda x: x.Log().tensor()[..., -1:].exp(),
}


@pytest.mark.parametrize(("group", "method"), NAMED)
@pytest.mark.parametrize("use", [lambda x: x, torch.sin], ids=["as output", "in arithmetic"])
@pytest.mark.parametrize("made", ["parameter", "Exp", "Mul"])
def test_reads_with_a_name_say_what_to_use(group: str, method: str, use: Callable[[Tensor], Tensor], made: str) -> None:
    of = {"parameter": lambda m: m.x, "Exp": lambda m: m.a.Exp(), "Mul": lambda m: m.x @ m.a.Exp()}[made]
    model = Model(lambda m: use(getattr(of(m), method)()), x=drawn(group, 2), a=drawn(group.lower(), 2))
    with pytest.raises(
        NotDifferentiableError, match=rf"{group}\.{method}\(\) of a LieTensor .* parameter [xa] goes into"
    ):
        modjac(model)
    expected = model()
    model.function = lambda m: use(INSTEAD[method](of(m)))
    torch.testing.assert_close(model(), expected)
    check_against_differences(model)


def test_two_ways_to_write_one_function_agree() -> None:
    x = drawn("SO3", 1)
    one = modjac(Model(lambda m: m.x.tensor(), x=x), flatten=True)
    two = modjac(Model(lambda m: (m.x @ pp.identity_SO3(1, dtype=torch.float64)).tensor(), x=x), flatten=True)
    torch.testing.assert_close(one, two)
    assert one[3].abs().max() > 0.01  # the last number of a quaternion does move


@pytest.mark.parametrize("group", ["SE3", "Sim3"])
@pytest.mark.parametrize("by", ["x", "a"])
def test_the_transposed_adjoint_is_refused(group: str, by: str) -> None:
    x, a = drawn(group, 2), drawn(group.lower(), 2)
    both = {"x": x, "a": a}
    constant = {name: value for name, value in both.items() if name != by}
    get = lambda m, name: constant[name] if name in constant else getattr(m, name)  # noqa: E731
    model = Model(lambda m: get(m, "x").AdjT(get(m, "a")), **{by: both[by]})
    with pytest.raises(NotDifferentiableError, match=rf"{group}\.AdjT.* parameter {by},.*Inv\(\)\.Adj"):
        modjac(model)
    expected = model()
    model.function = lambda m: get(m, "x").Inv().Adj(get(m, "a"))
    torch.testing.assert_close(model(), expected)
    check_against_differences(model)


@pytest.mark.parametrize("group", ["SO3", "RxSO3"])
def test_the_transposed_adjoint_is_right_where_it_is_orthogonal(group: str) -> None:
    check_against_differences(Model(lambda m: m.x.AdjT(m.a), x=drawn(group, 2), a=drawn(group.lower(), 2)))


# Plain numbers made into elements


@EACH
def test_elements_made_of_plain_parameters_are_refused(group: str) -> None:
    model = Model(lambda m: lie(group, m.r).Act(numbers(3)), r=drawn(group, 2).tensor())
    with pytest.raises(
        NotDifferentiableError, match=f"{group} made of plain numbers .* parameter r goes into {group}_Act"
    ):
        modjac(model)


def test_elements_made_of_angles_are_refused_inside_and_right_at_the_output() -> None:
    model = Model(lambda m: pp.euler2SO3(m.r).Log(), r=numbers(2, 3))
    with pytest.raises(NotDifferentiableError, match="plain numbers that depend on parameter r goes into SO3_Log"):
        modjac(model)
    model.function = lambda m: pp.euler2SO3(m.r)
    check_against_differences(model)


@EACH
def test_an_output_made_of_plain_numbers_has_tangent_rows(group: str) -> None:
    at = 3 * (group in ("SE3", "Sim3"))

    def normalised(m: Model) -> Tensor:
        turn = nn.functional.normalize(m.r[:, at : at + 4], dim=-1)
        return lie(group, torch.cat([m.r[:, :at], turn, m.r[:, at + 4 :]], -1))

    check_against_differences(Model(normalised, r=drawn(group, 2).tensor() * 1.3))


# Where PyPose loses digits


@pytest.mark.parametrize("verb", ["Log", "Exp"])
def test_series_of_sim3_are_summed_to_the_end(verb: str) -> None:
    kind = "Sim3" if verb == "Log" else "sim3"
    model = Model(lambda m: getattr(m.x, verb)(), x=drawn(kind, 5, sigma=1.5))
    expected = by_differences(model)
    ((theirs,),) = pypose_modjac(model)
    cut = tuple(slice(n) for n in expected[0][0].shape)
    assert (theirs[cut] - expected[0][0]).abs().max() > 1e-4  # else this test shows nothing
    check_against_differences(model)


@pytest.mark.parametrize("angle", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_small_angles_in_single_precision(angle: float) -> None:
    vector = torch.tensor([[3.0, -5.0, 4.0, angle, -angle, 2 * angle]])
    for model, exact in (
        (Model(lambda m: m.x.Exp(), x=pp.se3(vector)), Model(lambda m: m.x.Exp(), x=pp.se3(vector.double()))),
        (
            Model(lambda m: m.x.Log(), x=pp.se3(vector).Exp()),
            Model(lambda m: m.x.Log(), x=pp.se3(vector.double()).Exp()),
        ),
    ):
        found, expected = modjac(model, flatten=True, tangent=True), by_differences(exact)[0][0].reshape(6, 6)
        torch.testing.assert_close(found.double(), expected, atol=3e-3, rtol=0)


def test_a_graph_of_the_callers_is_left_alone() -> None:
    model = Model(lambda m: m.recorded, x=drawn("sim3", 2, sigma=1.5))
    model.recorded = model.x.Exp()
    before = torch.autograd.grad(model.recorded.tensor()[:, :-1].sum(), model.x, retain_graph=True)
    with pytest.warns(JacopsWarning, match="sim3_Exp is not exact"):
        modjac(model)
    after = torch.autograd.grad(model.recorded.tensor()[:, :-1].sum(), model.x)
    assert torch.equal(before[0], after[0])


# Derivatives of the Jacobian

TWICE: dict[str, Callable[[Model], Any]] = {
    "Act": lambda m: m.x.Act(torch.ones(3, dtype=torch.float64)),
    "Exp and Act": lambda m: m.a.Exp().Act(torch.ones(3, dtype=torch.float64)),
    "Log": lambda m: m.x.Log().tensor(),
    "Mul and Log": lambda m: (constant(m.x) @ m.x @ constant(m.x)).Log().tensor(),
    "matrix": lambda m: m.x.matrix(),
    "rotation matrix": lambda m: m.x.rotation().matrix(),
    "itself": lambda m: m.x,
}


@pytest.mark.parametrize("group", ["SO3", "RxSO3"])
def test_the_jacobian_of_an_adjoint_can_be_differentiated(group: str) -> None:
    check_second_derivatives(model_of(lambda m: m.x.AdjT(m.a).tensor(), group, 1), {})


@EACH
@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"strategy": "forward-mode"}], ids=str)
def test_the_jacobian_can_be_differentiated(group: str, name: str, options: dict[str, Any]) -> None:
    check_second_derivatives(model_of(TWICE[name], group, 1), options)


def check_second_derivatives(model: Model, options: dict[str, Any]) -> None:
    found = blocks(modjac(model, create_graph=True, tangent=True, **options))[0]
    assert_same([found], blocks(modjac(model, tangent=True)))
    weights = [numbers(*block.shape) for block in found]

    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            each = blocks(modjac(self.model, tangent=True, vectorize=True))[0]
            return sum((w * b).sum() for w, b in zip(weights, each, strict=True)).reshape(1)

    total = sum((w * b).sum() for w, b in zip(weights, found, strict=True))
    parameters = list(model.parameters())
    grads = torch.autograd.grad(total, parameters) if total.requires_grad else [torch.zeros_like(p) for p in parameters]
    for grad, expected in zip(grads, by_differences(Slope())[0], strict=True):
        torch.testing.assert_close(plain(grad)[..., : expected.shape[-1]], expected[0], atol=1e-6, rtol=1e-6)
        assert not plain(grad)[..., expected.shape[-1] :].any()


@EACH
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m: m.x.Act(m.p), "goes into|raw storage"),
        (lambda m: (m.x @ m.y).Log(), "goes into|raw storage"),
        (lambda m: m.x.Inv().Log(), "goes into|raw storage"),
        (lambda m: m.x.Adj(m.a), "Adj .* enters as a constant"),
        (lambda m: m.x.tensor(), "goes into|raw storage"),
    ],
    ids=["Act", "Mul", "Inv", "Adj", "tensor"],
)
def test_a_jacobian_with_wrong_derivatives_is_refused(group: str, function: Callable[[Model], Any], words: str) -> None:
    model = model_of(function, group)
    with pytest.raises(NotDifferentiableError, match=f"create_graph=True.*({words})"):
        modjac(model, create_graph=True)
    check_against_differences(model)


# The other calls do not stumble over LieTensors


@EACH
def test_products_are_plain_and_agree_with_the_matrix(group: str) -> None:
    model = Model(lambda m, p: (m.x @ m.a.Exp()).Act(p), x=drawn(group, 3), a=drawn(group.lower(), 3))
    points = numbers(3, 3)
    matrix = blocks(modjac(model, points))[0]
    vectors = [numbers(*p.shape) for p in model.parameters()]
    change = sum(torch.tensordot(block, v, v.ndim) for block, v in zip(matrix, vectors, strict=True))
    cotangent = numbers(3, 3)
    pulled = [torch.tensordot(cotangent, block, 2) for block in matrix]
    parameters = list(model.parameters())

    def func() -> Tensor:
        return model(points)

    tolerance = {"atol": 1e-2, "rtol": 1e-2} if group == "Sim3" else {}
    for pushed in (jacops.model_jvp(model, points, vectors), jacops.jvp(func, parameters, vectors)):
        assert type(pushed) is Tensor
        torch.testing.assert_close(pushed, change, **tolerance)
    for grads in (jacops.model_vjp(model, points, cotangent), jacops.vjp(func, parameters, cotangent)):
        assert [type(g) for g in grads] == [Tensor, Tensor]
        torch.testing.assert_close(grads, pulled, **tolerance)
    full = jacops.full_jacobian(func, parameters)
    assert [type(j) for j in full] == [Tensor, Tensor]
    torch.testing.assert_close(full, [b.flatten(0, 1) for b in matrix], **tolerance)


def test_products_with_lie_tensors_as_outputs_and_vectors() -> None:
    model = Model(lambda m: m.x.Log(), x=drawn("SE3", 2))
    v, u = lie("SE3", numbers(2, 7)), lie("se3", numbers(2, 6))
    matrix = modjac(model)
    pushed, pulled = jacops.model_jvp(model, None, v), jacops.model_vjp(model, None, u)
    assert (type(pushed), type(pulled)) == (Tensor, Tensor)
    torch.testing.assert_close(pushed, torch.tensordot(matrix, plain(v), 2))
    torch.testing.assert_close(pulled, torch.tensordot(plain(u), matrix, 2))
    (full,) = jacops.full_jacobian(lambda: model(), [model.x])
    torch.testing.assert_close(full, matrix.flatten(0, 1))


# Who has no PyPose pays nothing


def test_no_layout_without_lie_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def record() -> Any:
        return ModelRun(nn.Linear(2, 1), torch.ones(1, 2), call="modjac", parameters=lambda name, p: True).recorded()

    assert layout(record(), tangent=True) is None
    monkeypatch.delitem(sys.modules, "pypose")
    assert layout(record(), tangent=True) is None
    assert "pypose" not in sys.modules
