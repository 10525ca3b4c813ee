"""
Which labels are wrong?
=======================

A table of patients has labels, and some of them are wrong. Which ones should an expert
look at first? Influence functions rank them: a training sample whose own loss depends
mostly on itself, because no other sample supports its label, has a large
*self-influence*. The labels here were flipped on purpose, so the ranking can be judged;
and influences are compared with networks that are trained again.
"""

import copy

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.preprocessing import StandardScaler

import jacops

# %%
# Data with known errors
# ----------------------
#
# scikit-learn's table of 569 breast tumours has 30 measurements of cell nuclei for
# each, and the diagnosis. 300 tumours are for training; 30 of their labels are flipped.

table = load_breast_cancer()
x = torch.from_numpy(StandardScaler().fit_transform(table.data))
truth = torch.from_numpy(table.target).double()[:, None]  # 1: benign

torch.manual_seed(0)
order = torch.randperm(len(x))
train, test = order[:300], order[300:]
flipped = torch.zeros(300, dtype=torch.bool)
flipped[torch.randperm(300)[:30]] = True
given = torch.where(flipped[:, None], 1 - truth[train], truth[train])

# %%
# The network
# -----------
#
# A small perceptron with weight decay is trained to convergence. It fits most of the
# wrong labels as well, which lowers its accuracy on the test tumours.

DECAY = 3e-3
loss = torch.nn.functional.binary_cross_entropy_with_logits


def fit(start, x, y, weights):
    """Return a copy of a network, trained with these weights of the samples."""
    net = copy.deepcopy(start)
    options = {"max_iter": 1000, "tolerance_grad": 1e-6, "tolerance_change": 0}
    optimiser = torch.optim.LBFGS(
        net.parameters(), line_search_fn="strong_wolfe", **options
    )

    def closure():
        optimiser.zero_grad()
        penalty = sum(p.square().sum() for p in net.parameters())
        total = (
            weights * loss(net(x), y, reduction="none")[:, 0]
        ).sum() + DECAY / 2 * penalty
        total.backward()
        return total

    optimiser.step(closure)
    return net


def accuracy(net):
    return f"{((net(x[test]) > 0) == (truth[test] > 0)).double().mean():.1%}"


nn = torch.nn
start = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 1)).double()
equal = torch.full((300,), 1 / 300, dtype=torch.float64)
net = fit(start, x[train], given, equal)
print(f"accuracy on {len(test)} test tumours: {accuracy(net)}")

# %%
# One call
# --------
#
# With ``l2=`` weight decay is a part of the objective. The curvature is then the
# Hessian of what was minimised. At the optimum it is positive definite, and needs no
# damping.

data = [(x[train], given)]
options = {"loss": loss, "l2": DECAY, "curvature": "hessian", "damping": 0.0}
scores = jacops.self_influences(net, data, **options)

# %%
# The largest scores come first. Each bar is a training tumour, and wrong labels are
# red. Below, the ranking is compared with one by plain loss.

ranking = scores.argsort(descending=True)
figure, (above, below) = plt.subplots(2, 1, figsize=(6, 6.5), layout="constrained")
shown = ranking[:60]
colours = ["tab:red" if wrong else "tab:gray" for wrong in flipped[shown]]
above.bar(range(1, 61), scores[shown].numpy(), color=colours, width=0.9)
above.set(xlabel="rank of the training tumour", ylabel="self-influence")
above.set_title("the 60 largest scores; wrong labels are red")

losses = loss(net(x[train]).detach(), given, reduction="none")[:, 0]
for name, score in [("self-influence", scores), ("plain loss", losses)]:
    precision, recall, _ = precision_recall_curve(flipped, score)
    mean = average_precision_score(flipped, score)
    below.plot(recall, precision, label=f"{name}: average precision {mean:.2f}")
below.axhline(0.1, color="0.6", linestyle="--", label="at random")
below.set(xlabel="recall of wrong labels", ylabel="precision", ylim=(0, 1.05))
below.legend(frameon=False)
plt.show()

# %%
# Check the first 45 labels
# -------------------------
#
# An expert who looks at 45 of the 300 tumours finds most of the wrong labels. The
# network that is trained with the corrected table is better:

checked = ranking[:45]
corrected = given.clone()
corrected[checked] = truth[train][checked]
print(f"{int(flipped[checked].sum())} of 30 wrong labels are among the first 45")
for word, labels in [("45 checked", corrected), ("all correct", truth[train])]:
    print(f"accuracy with {word}: {accuracy(fit(start, x[train], labels, equal))}")

# %%
# Which samples caused a wrong prediction?
# ----------------------------------------
#
# ``compute_influences`` returns how training tumours change the loss of a test tumour,
# here of the one with the largest loss. In a network this small a sample changes the
# curvature considerably; ``leverage=True`` takes that into account.

test_losses = loss(net(x[test]).detach(), truth[test], reduction="none")[:, 0]
worst = test[test_losses.argmax()][None]
found = jacops.compute_influences(
    net, data, test_data=[(x[worst], truth[worst])], leverage=True, **options
)
found

# %%
figure = found.plot(k=6)
figure.axes[0].set_title(f"tumour {int(worst)}", pad=22)
harmful = found.bottom(6)[1][0]
print(f"{int(flipped[harmful].sum())} of the 6 most harmful have a wrong label")
figure

# %%
# Is it right?
# ------------
#
# Influences predict what would happen without a training sample. So train again without
# one, for 18 samples: the strongest of either sign and some in between. A network is no
# quadratic function, so the points are near the diagonal and not on it.

predicted = found.leave_one_out()[0]
order = predicted.argsort()
some = torch.cat([order[:6], order[6:-6:48], order[-6:]])
real = torch.zeros(len(predicted), dtype=torch.float64)
for i in some:
    without = equal.clone()
    without[i] = 0
    again = fit(net, x[train], given, without)
    real[i] = loss(again(x[worst]), truth[worst]).item() - test_losses.max()

figure, axes = plt.subplots(figsize=(5, 4.4), layout="constrained")
axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
for wrong, colour, word in [(False, "tab:gray", "right"), (True, "tab:red", "wrong")]:
    own = some[flipped[some] == wrong]
    axes.scatter(predicted[own], real[own], color=colour, label=f"the label is {word}")
axes.set(xlabel="predicted change of the loss", ylabel="change after training again")
axes.set_title(f"the loss of tumour {int(worst)} without one training tumour")
axes.legend(frameon=False)
plt.show()

# %%
# Next
# ----
#
# * Self-influence is a ranking for people who check labels, not a decision. Where a
#   model cannot fit its wrong labels, as a linear one, plain loss finds them as well or
#   better; a table is in :doc:`/influence`.
# * Away from an optimum the Hessian may be indefinite. The defaults,
#   ``curvature="ggn"`` and ``damping="auto"``, are positive definite everywhere: take
#   them for networks that were stopped early.
# * ``solver="ekfac"`` is for networks too large for a Hessian, see :doc:`/influence`.
