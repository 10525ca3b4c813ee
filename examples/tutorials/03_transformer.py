"""
Which words and which layers decide?
====================================

A small GPT-2 reads reviews such as *the film was not really good* and predicts whether
they are positive. Which words decide, and which layers? A transformer is not
piecewise linear. Its logits become an exact sum of parts as soon as some of its
functions are held constant: attention patterns, scales of norms and gains of
activations. ``freeze=`` does this by name, and the sum is verified.
"""

import torch
from matplotlib import pyplot as plt
from transformers import GPT2Config, GPT2LMHeadModel

import jacops
from jacops.attribution import logit_difference

# %%
# Reviews and model
# -----------------
#
# A review consists of a subject, two words of which one may be *not*, and an adjective.
# *not* turns the answer around, so no word decides alone. The answer is the token after
# the full stop.

subjects = ["film", "book", "song", "meal"]
adverbs = ["really", "so", "quite", "rather"]
good, bad = ["good", "great", "lovely", "fine"], ["bad", "awful", "dull", "poor"]
words = ["the", "was", ".", "not", *subjects, *adverbs, *good, *bad, "yes", "no"]
number = {word: i for i, word in enumerate(words)}
yes, no = number["yes"], number["no"]


def encoded(text):
    return torch.tensor([number[word] for word in text.split()])


def draw(n):
    """Return n reviews as tokens, (n, 7), and their answers, (n,)."""
    tokens = encoded("the film was so so good .").repeat(n, 1)
    for place, choices in [(1, subjects), (3, adverbs), (4, adverbs), (5, good + bad)]:
        tokens[:, place] = encoded(" ".join(choices))[torch.randint(len(choices), (n,))]
    place = torch.randint(4, (n,))  # of "not"; half of the reviews have none
    tokens[place == 0, 3] = tokens[place == 1, 4] = number["not"]
    positive = (tokens[:, 5] < number["bad"]) ^ (place < 2)
    return tokens, torch.where(positive, yes, no)


torch.manual_seed(0)
sizes = {"vocab_size": len(words), "n_positions": 7, "n_embd": 32, "n_layer": 2}
dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
ends = {"bos_token_id": 0, "eos_token_id": 0}
config = GPT2Config(**sizes, **dropout, **ends, n_head=2, initializer_range=0.1)
model = GPT2LMHeadModel(config)
optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(200):
    tokens, answers = draw(64)
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(model(tokens).logits[:, -1], answers).backward()
    optimiser.step()

model = model.double().eval()
tokens, answers = draw(500)
with torch.no_grad():
    right = model(tokens).logits[:, -1].argmax(1) == answers
print(f"{right.double().mean():.1%} of 500 new reviews are answered correctly")

# %%
# One call
# --------
#
# The question is by how much the logit of *yes* exceeds that of *no*, after the last
# token of each review. Contributions are of the sums of token and position embeddings,
# which leave the module ``transformer.drop``.

texts = [
    "the film was really really good .",
    "the film was really not good .",
    "the film was not really bad .",
    "the film was so really bad .",
]
prompts = torch.stack([encoded(text) for text in texts])
found = jacops.contributions(
    model,
    prompts,
    at="transformer.drop",
    outputs=logit_difference([yes], [no]),
    freeze=("LayerNorm", "GPT2Attention", "NewGELUActivation"),
)
found

# %%
# What each word adds
# -------------------
#
# A word's part is the sum over the 32 entries of its hidden vector; what biases and
# position-independent constants add is a part of its own. Each row adds up to the
# number on its left.

by_word = found.values.sum(-1)[:, 0]
rows = torch.cat([by_word, found.bias], 1)
most = float(rows.abs().max())
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
image = axes.imshow(rows.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
for i, text in enumerate(texts):
    for j, word in enumerate([*text.split(), "(bias)"]):
        colour = "white" if rows[i, j].abs() > 0.6 * most else "black"
        entry = f"{word}\n{float(rows[i, j]):+.1f}"
        axes.text(j, i, entry, ha="center", va="center", color=colour, fontsize=9)
axes.set_yticks(range(4), [f"{float(value):+.1f}" for value in found.output[:, 0]])
axes.set(xticks=[], ylabel="logit of yes minus no")
axes.set_title("what each word adds")
figure.colorbar(image, ax=axes, label="contribution, in logits")
plt.show()

# %%
# What each layer adds
# --------------------
#
# The last hidden vector is a sum, too: of the embedding and of what the attention and
# the perceptron of each block added to it. With the last norm held constant the logits
# are linear in it, which is called direct logit attribution.

blocks, added = model.transformer.h, {}
parts = {"embedding": model.transformer.drop}
for i, block in enumerate(blocks):
    parts |= {f"attention {i}": block.attn, f"perceptron {i}": block.mlp}


def keep(name):
    def hook(module, inputs, output):
        added[name] = output[0] if isinstance(output, tuple) else output

    return hook


handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
with torch.no_grad():
    model(prompts)
for handle in handles:
    handle.remove()

last = jacops.contributions(
    model,
    prompts,
    at="transformer.h.1",
    outputs=logit_difference([yes], [no]),
    freeze="transformer.ln_f",
)
by_layer = {n: (last.jacobian[:, 0] * h).sum((1, 2)) for n, h in added.items()}
by_layer["constants"] = last.bias[:, 0]

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for i, text in enumerate(texts):
    places = [k + 0.2 * (i - 1.5) for k in range(len(by_layer))]
    sizes = [float(part[i]) for part in by_layer.values()]
    axes.barh(places, sizes, height=0.2, label=" ".join(text.split()[3:6]))
axes.set_yticks(range(len(by_layer)), by_layer)
axes.invert_yaxis()
axes.axvline(0, color="black", linewidth=0.8)
axes.set_xlabel("contribution to the logit of yes minus no")
axes.legend(frameon=False, fontsize=9)
plt.show()

# %%
# Most comes from the perceptrons: whether *not* stands beside *good* or *bad* is no sum
# over words, and attention with constant patterns is linear in them.
#
# Is it right?
# ------------
#
# Both sums are compared with the model's own answers:

for name, total, result in [
    ("words", by_word.sum(1) + found.bias[:, 0], found),
    ("layers", sum(by_layer.values()), last),
]:
    error = float((total - result.output[:, 0]).abs().max())
    print(f"sum over {name} - output: at most {error:.1e}")

# %%
# An exact sum is not a prediction of what happens without a word, since all that is
# held constant would change as well. Both can be compared:

with torch.no_grad():
    logits = model(torch.stack([prompts[1], encoded(texts[0])])).logits[:, -1]
change = float((logits[0, yes] - logits[0, no]) - (logits[1, yes] - logits[1, no]))
print(f"contribution of 'not' in {texts[1]!r}: {float(by_word[1, 4]):+.1f}")
print(f"change from {texts[0]!r}: {change:+.1f}")

# %%
# Next
# ----
#
# * :doc:`/recipes/transformer_attribution`: what ``freeze=`` holds constant in which
#   function, and the Jacobian lens.
# * :doc:`/attribution`: contributions in general. :doc:`/integrated`: contributions of
#   smooth models without anything held constant.
# * :doc:`/tutorials/05_language_model`: not which words of the prompt, but which texts
#   of the training data.
