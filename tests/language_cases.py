"""Small language models with random weights, and batches as tokenizers make them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

transformers: Any = pytest.importorskip("transformers")

VOCABULARY, LONGEST, IGNORED = 23, 16, -100
LENGTHS = (8, 5, 7, 3, 8, 6)


def gpt2(tied: bool = False) -> nn.Module:
    """A GPT-2 of two layers."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": LONGEST, "n_embd": 8, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).double().eval()


def llama(tied: bool = False) -> nn.Module:
    """A Llama of two layers: RMSNorm, rotary positions, SwiGLU, heads that share keys and values."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "hidden_size": 8, "num_hidden_layers": 2}
    heads = {"intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ends)).double().eval()


MODELS = {"gpt2": gpt2, "llama": llama}
TOLERANCES = {"gpt2": 1e-7, "llama": 1e-6}  # Llama's norms compute in float32 whatever the dtype of the model


def sequences(lengths: tuple[int, ...] = LENGTHS, width: int | None = None, left: bool = False, seed: int = 1) -> Any:
    """Return sequences as a tokenizer pads them, all in one batch; the same tokens whatever their width."""
    noise = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        where = slice(width - length, width) if left else slice(0, length)
        ids[i, where] = torch.randint(1, VOCABULARY, (length,), generator=noise)[:width]
        mask[i, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
    if left:  # there the first token would be predicted from padding
        batch["labels"][torch.arange(len(lengths)), mask.argmax(1)] = IGNORED
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return batch


def batches(whole: Mapping[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    """Cut a batch."""
    parts = zip(*(value.split(sizes or (4, 2)) for value in whole.values()), strict=True)
    return [dict(zip(whole, part, strict=True)) for part in parts]


def shifted(output: Any, labels: Tensor) -> Tensor:
    """The loss as users write it: every token predicts the next."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def classifier(labels: int, kind: str) -> Any:
    """BERT computes the loss of a classifier in its forward, GPT-2 too; Llama by its `loss_function`."""
    torch.manual_seed(0)
    small: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ends: Any = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "num_labels": labels,
    }
    if kind == "bert":
        config = transformers.BertConfig(**small, **ends, max_position_embeddings=LONGEST)
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "llama":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**small, **ends)).eval()
    config = transformers.GPT2Config(**ends, n_positions=LONGEST, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2ForSequenceClassification(config).eval()


def close(found: Any, right: Tensor, tolerance: float = 1e-8) -> None:
    assert float((torch.as_tensor(found) - right).norm()) <= tolerance * float(right.norm())


HEADS = {
    "gpt2": ["transformer.ln_f.*", "transformer.h.1.attn.*"],
    "llama": ["model.norm.*", "model.layers.1.self_attn*"],
}


def adapted(name: str, model: nn.Module) -> nn.Module:
    """Return a model with adapters of rank two by peft, none of whose entries are zero."""
    peft: Any = pytest.importorskip("peft", exc_type=ImportError)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    noise, found = torch.Generator().manual_seed(3), peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=noise) * 0.3)
    return found
