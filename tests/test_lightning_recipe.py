"""The Lightning recipe: derivatives of a `LightningModule` are those of plain autograd, in and after training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import jacops

L: Any = pytest.importorskip("lightning", exc_type=ImportError)

PAGE = Path(__file__).parent.parent / "docs" / "recipes" / "lightning.md"
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*many workers.*")
pytestmark = pytest.mark.filterwarnings(*IGNORED)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """Return the classes of the page."""
    names: dict[str, Any] = {"__name__": "lightning_recipe"}
    first, _, last = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(first + "\n" + last.split("\n\n\n")[0], names)
    return names


def fitted(recipe: dict[str, Any], *callbacks: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, data = recipe["Classifier"]().double(), recipe["Clusters"]()
    data.setup()
    for subset in (data.train, data.test):
        subset.tensors = (subset.tensors[0].double(), subset.tensors[1])
    data.setup = lambda stage=None: None  # keeps the data in double precision
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=data)
    return model, data


def step_loss(model: Any, x: Tensor, y: Tensor) -> Any:
    """Return the loss of `training_step` as a function of all parameters in one vector."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return model.training_step((x, y), 0)

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {f"model.{name}": part.view_as(p) for (name, p), part in parts}
        return torch.func.functional_call(Step(), values, ())

    return loss


def flat(model: Any) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def without_logging(model: Any) -> Any:
    model.log = lambda *args, **options: None  # there is no loop to log in
    return model.eval()


def test_curvature_and_influences_are_of_the_loss_in_training_step(recipe: dict[str, Any]) -> None:
    model, data = fitted(recipe)
    without_logging(model)
    x, y = data.train.tensors
    H = jacops.Problem(model, model.loss, data.train_dataloader()).hessian().dense()
    torch.testing.assert_close(H, torch.func.hessian(step_loss(model, x, y))(flat(model)), rtol=1e-9, atol=1e-12)

    wrapped = jacops.TorchTwiceDifferentiable(model, model.loss)
    ordered, tests = DataLoader(data.train, 16), DataLoader(data.test, 7)
    found = jacops.compute_influences(wrapped, ordered, test_data=tests, damping=1.0, curvature="hessian")
    G = torch.stack([torch.func.grad(step_loss(model, a[None], b[None]))(flat(model)) for a, b in data.train])
    T = torch.stack([torch.func.grad(step_loss(model, a[None], b[None]))(flat(model)) for a, b in data.test])
    A = H + torch.eye(len(H), dtype=H.dtype)
    torch.testing.assert_close(found.values, T @ torch.linalg.solve(A, G.T), rtol=1e-6, atol=1e-9)


def test_contributions_add_up_to_the_output(recipe: dict[str, Any]) -> None:
    model, data = fitted(recipe)
    model.eval()
    parts = jacops.contributions(model, data.val_dataloader())
    x = data.test.tensors[0]
    torch.testing.assert_close(parts.values.sum(-1) + parts.bias, model(x).detach(), rtol=1e-10, atol=1e-10)
    slopes = torch.stack([torch.func.jacrev(model)(row[None])[0, :, 0] for row in x])
    torch.testing.assert_close(parts.jacobian, slopes.detach())


def test_the_callback_records_the_curvature_and_leaves_the_training_as_it_is(recipe: dict[str, Any]) -> None:
    plain, _ = fitted(recipe)
    callback = recipe["Sharpness"]()
    model, data = fitted(recipe, callback)
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=0)
    without_logging(model)
    H = torch.func.hessian(step_loss(model, *data.train.tensors))(flat(model))
    assert len(callback.values) == 2
    assert callback.values[-1] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)
