"""
Which pixels make it a 3?
=========================

A convolutional network reads handwritten digits. Which pixels raise the logit of its
answer, and which lower it? With ReLU and max pooling the network is piecewise linear,
so each logit is exactly a sum of one part for each pixel and one part for all biases:
there is no heuristic in the heat maps below.
"""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import jacops

# %%
# Data and network
# ----------------
#
# The images are the 1,797 digits of scikit-learn, 8 × 8 pixels each. Training takes a
# few seconds. The trained network is then converted to double precision: contributions
# are verified to rounding, and rounding is smaller there.

torch.manual_seed(0)
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.as_tensor(digits.target)
test, test_labels = images[1400:], labels[1400:]

nn = torch.nn
net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(128, 10)),
)
optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
for _ in range(8):
    for batch in torch.randperm(1400).split(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimiser.step()

net, test = net.double().eval(), test.double()
right = net(test).argmax(1) == test_labels
print(f"{right.double().mean():.1%} of {len(test)} test images are read correctly")

# %%
# One call
# --------
#
# All ten logits of all 397 test images at once.

found = jacops.contributions(net, test)
found

# %%
# Why a 3, and not a 5?
# ---------------------
#
# ``found.values`` has the shape ``(images, logits, channels, rows, columns)``. A
# difference of two logits is a sum of pixels, too: that of their contributions. Blue
# pixels raise the logit of 3 over that of 5, red ones lower it.

threes = (test_labels == 3).nonzero()[:4, 0].tolist()
difference = (found.values[:, 3] - found.values[:, 5])[threes, 0]
most = float(difference.abs().max())
figure, axes = plt.subplots(2, 4, figsize=(6, 3.3), layout="constrained")
for above, below, sample, heat in zip(*axes, threes, difference, strict=True):
    above.imshow(test[sample, 0].numpy(), cmap="gray_r")
    shown = below.imshow(heat.numpy(), cmap="RdBu", vmin=-most, vmax=most)
    logits = found.output[sample]
    below.set_xlabel(f"3 over 5: {float(logits[3] - logits[5]):+.1f}")
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("image")
axes[1, 0].set_ylabel("3 minus 5")
figure.colorbar(shown, ax=axes, label="units of the logit", shrink=0.8)
plt.show()

# %%
# Wrong predictions
# -----------------
#
# An image that is classified wrongly. By default a figure shows the largest logit; here
# are the wrong class and the right one.

wrong = int((~right).nonzero()[0])
answer, truth = int(found.output[wrong].argmax()), int(test_labels[wrong])
figure, (above, below) = plt.subplots(2, 1, figsize=(5, 6.5), layout="constrained")
found.plot(wrong, answer, ax=above)
above.set_title(f"{answer}, the answer: logit {float(found.output[wrong, answer]):.1f}")
found.plot(wrong, truth, ax=below)
below.set_title(f"{truth}, the label: logit {float(found.output[wrong, truth]):.1f}")
plt.show()

# %%
# Is it right?
# ------------
#
# The sum is verified: the part of the biases is propagated through the network
# on its own, and then the sum of all parts is compared with the logits.

print(f"largest error, relative: {found.verification.relative_error:.1e}")

# %%
# Exact sums describe the output for this image, not that for another image. To test
# this, erase pixels of each image from the largest contribution downwards,
# and compare with pixels of ink in random order. The logits fall much faster.

predicted = found.output.argmax(1)
own = found.values[torch.arange(len(test)), predicted].flatten(1)
ink = (test.flatten(1) > 0).double()
scores = {
    "largest contribution first": own,
    "random pixels of ink first": ink + torch.rand(ink.shape),
}
counts = range(0, 21, 2)
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for word, score in scores.items():
    order, logits = score.argsort(1, descending=True), []
    for count in counts:
        erased = test.flatten(1).scatter(1, order[:, :count], 0.0).view_as(test)
        with torch.no_grad():
            logits.append(float(net(erased).gather(1, predicted[:, None]).mean()))
    axes.plot(counts, logits, marker="o", label=word)
axes.set_xticks(range(0, 21, 4))
axes.axhline(0, color="0.6", linewidth=0.8)
axes.set(xlabel="erased pixels of 64", ylabel="mean logit of the first answer")
axes.legend(frameon=False)
plt.show()

# %%
# Another baseline
# ----------------
#
# A pixel without ink contributes nothing, because a contribution is a derivative times
# the pixel. What an *empty* pixel does shows against another baseline, such as the mean
# image. :func:`jacops.integrated_jacobian` integrates derivatives on the way from
# there.

one = threes[:1]
mean = images[:1400].double().mean(0)
against = jacops.integrated_jacobian(
    net, test[one], baseline=mean, target=predicted[one], tolerance=1e-4
)
against.plot(sample=0)

# %%
# Next
# ----
#
# * :doc:`/attribution`: names, groups of pixels, ``target=`` for one logit of each
#   image at the cost of one backward pass, an HTML report.
# * :doc:`/integrated`: integrated Jacobians and their error estimate.
# * :doc:`/tutorials/01_genes`: contributions through a PCA.
