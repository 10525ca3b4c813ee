"""
Which texts taught a language model this?
=========================================

A language model was tuned with LoRA, and still gives an outdated answer. Which of the
texts that it was tuned on are the reason, and which of their tokens? Influence
functions answer this without retraining. The model here is a small GPT-2 that is
trained on the spot, so that the answer can be checked by tuning again; any causal model
of transformers, adapted with peft, works in the same way.
"""

import copy
import warnings

import torch
from matplotlib import pyplot as plt
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, logging

import jacops

logging.set_verbosity_error()  # transformers notes that a new config names no loss
warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers renames

# %%
# A model trained on where people live
# ------------------------------------
#
# It is trained on ten sentences about people and five about cities.

people = ["anna", "bela", "cleo", "dana", "ezra"]
people += ["finn", "gina", "hugo", "iris", "jona"]
cities = ["rome", "oslo", "lima", "cairo", "paris"]
countries = ["italy", "norway", "peru", "egypt", "france"]
homes = [f"{person} lives in {cities[i % 5]} ." for i, person in enumerate(people)]
facts = [f"{cities[i]} lies in {countries[i]} ." for i in range(5)]
words = sorted({word for text in homes + facts for word in text.split()})
number = {word: i for i, word in enumerate(words)}


def batch(texts):
    """Return a batch as a collator does; all texts have five words."""
    ids = torch.tensor([[number[word] for word in text.split()] for text in texts])
    return {"input_ids": ids, "labels": ids.clone()}


def train(model, texts, steps, lr):
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**batch(texts)).loss.backward()
        optimiser.step()
    return model.eval()


def answer(model, text):
    """Return the most probable words after a text."""
    with torch.no_grad():
        best = model(batch([text])["input_ids"]).logits[0, -1].softmax(0).topk(2)
    return ", ".join(f"{words[i]} {p:.0%}" for p, i in zip(*best, strict=True))


torch.manual_seed(0)
sizes = {"vocab_size": len(words), "n_positions": 8, "n_embd": 32, "n_layer": 2}
ends = {"bos_token_id": 0, "eos_token_id": 0}
config = GPT2Config(**sizes, **ends, n_head=2, initializer_range=0.1)
base = train(GPT2LMHeadModel(config), homes + facts, 100, 3e-3)
print("cleo lives in", answer(base, "cleo lives in"))

# %%
# Tuning
# ------
#
# Everybody has moved. The news is learnt by adapters of rank 4, on top of weights that
# stay as they are. But two of the texts are old ones.

news = [f"{person} lives in {cities[(i + 1) % 5]} ." for i, person in enumerate(people)]
texts = [*news, *facts, "gina lives in oslo .", "cleo lives in lima ."]
layers = ["c_attn", "c_proj", "c_fc"]
lora = LoraConfig(
    r=4, target_modules=layers, task_type="CAUSAL_LM", fan_in_fan_out=True
)


def tuned(texts):
    torch.manual_seed(0)
    return train(get_peft_model(copy.deepcopy(base), lora), texts, 80, 1e-2)


model = tuned(texts)
print("cleo lives in", answer(model, "cleo lives in"))

# %%
# One call
# --------
#
# The question is about the loss of one word: *cairo* in the sentence *cleo lives in
# cairo*. Labels of -100 are ignored. ``"model"`` is the loss that the model
# computes from its logits and labels, and ``parameters=`` picks the adapters by name.
# Curvature and damping are the defaults.

query = batch(["cleo lives in cairo ."])
query["labels"][:, [0, 1, 2, 4]] = -100
wrapped = jacops.TorchTwiceDifferentiable(model, "model")
options = {"test_data": [query], "parameters": "*lora_*"}
found = jacops.compute_influences(wrapped, [batch(texts)], **options)
found

# %%
# Positive influence lowers the loss of *cairo*, negative influence raises it. At the
# two ends are the right text and the old one:

order = found.values[0].argsort(descending=True).tolist()
for row in [*order[:2], *order[-2:]]:
    print(f"{float(found.values[0, row]):+.3f}  {texts[row]}")

# %%
# Which tokens?
# -------------
#
# ``influence_type="token"`` splits each text into the terms of its loss: entry t is the
# term that predicts token t from those before it. Nothing predicts the first one.

tokens = jacops.compute_influences(
    wrapped, [batch(texts)], influence_type="token", **options
)
values = tokens.values[0]
strongest = values.sum(1).abs().topk(8).indices.tolist()
most = float(values.abs().max())
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
picture = values[strongest].numpy()
image = axes.imshow(picture, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
for place, row in enumerate(strongest):
    for t, word in enumerate(texts[row].split()):
        colour = "white" if values[row, t].abs() > 0.6 * most else "black"
        axes.text(t, place, word, ha="center", va="center", color=colour)
axes.set(xticks=[], yticks=[], ylabel="training texts, strongest first")
axes.set_title("cleo lives in cairo: texts that lower the loss or raise it")
figure.colorbar(image, ax=axes, label="influence (blue lowers the loss)")
plt.show()

# %%
# Is it right?
# ------------
#
# Leave texts out and tune again: the most harmful one, the most helpful one, and one in
# between. Influences predict changes of the loss to first order, so signs and order are
# right, and large changes are larger than predicted.

predicted = found.leave_one_out()[0]


def loss(model):
    with torch.no_grad():
        return float(model(**query).loss)


for row in (order[-1], order[0], order[5]):
    again = tuned([text for i, text in enumerate(texts) if i != row])
    print(f"without {texts[row]!r}: cleo lives in {answer(again, 'cleo lives in')}")
    change = loss(again) - loss(model)
    print(f"    change of the loss {change:+.2f}, predicted {predicted[row]:+.2f}")

# %%
# Next
# ----
#
# * :doc:`/recipes/language_models`: padding, other losses, models in half precision,
#   ``solver="ekfac"`` for models too large for exact solves.
# * :doc:`/influence`: curvature, damping and solvers; stored runs; many queries.
# * :doc:`/tutorials/04_label_errors`: the same question for a table.
