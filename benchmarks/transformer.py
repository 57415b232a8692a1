"""A small transformer in the sizes of nanoGPT's configuration for a laptop's processor.

Written here from its published settings, as what the field trains in a minute or two: 4 layers, 4
heads, 128 units, 64 characters of context, batches of 12, 2,000 updates in float32, AdamW at 1e-3
falling to 1e-4 over all of them, 100 of warm-up, weight decay 0.1, no dropout, no biases, output
weights tied to the embedding. Its evaluations are left out: only training is timed.

Shapes: B texts, T characters, E units, V vocabulary.
"""

import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS, HEADS, UNITS, CONTEXT, BATCH, UPDATES = 4, 4, 128, 64, 12, 2000
WARMUP, PEAK, FLOOR = 100, 1e-3, 1e-4


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each normalised before and added after."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(UNITS, bias=False)
        self.queries_keys_values = nn.Linear(UNITS, 3 * UNITS, bias=False)
        self.attended = nn.Linear(UNITS, UNITS, bias=False)
        self.before_layer = nn.LayerNorm(UNITS, bias=False)
        self.layer = nn.Sequential(
            nn.Linear(UNITS, 4 * UNITS, bias=False),
            nn.GELU(),
            nn.Linear(4 * UNITS, UNITS, bias=False),
        )

    def forward(self, x_BTE: Tensor) -> Tensor:
        """The same shape."""
        batch, length, _ = x_BTE.shape
        parts = self.queries_keys_values(self.before_attention(x_BTE)).chunk(3, dim=2)
        queries, keys, values = (
            part.view(batch, length, HEADS, -1).transpose(1, 2) for part in parts
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x_BTE = x_BTE + self.attended(mixed.transpose(1, 2).reshape(batch, length, UNITS))
        added: Tensor = self.layer(self.before_layer(x_BTE))
        return x_BTE + added


class Transformer(nn.Module):
    """Characters in, logits of the next ones out."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, UNITS)
        self.places = nn.Embedding(CONTEXT, UNITS)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(UNITS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends_a_branch = name.endswith(("attended.weight", "layer.2.weight"))
                scale = 1 / math.sqrt(2 * LAYERS) if ends_a_branch else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        places = torch.arange(tokens_BT.shape[1])
        x_BTE = self.blocks(self.characters(tokens_BT) + self.places(places))
        return functional.linear(self.norm(x_BTE), self.characters.weight)


def rate(update: int) -> float:
    """Learning rate of an update, counted from 0."""
    if update < WARMUP:
        return PEAK * (update + 1) / (WARMUP + 1)
    share = (update - WARMUP) / (UPDATES - WARMUP)
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


def train(text: str, characters: list[str], *, seed: int = 1) -> tuple[Transformer, float]:
    """The transformer fitted to a text, and the seconds of its updates."""
    torch.manual_seed(seed)
    tokens = encode(text, characters)
    model = Transformer(len(characters))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    began = time.perf_counter()
    for update in range(UPDATES):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        window = tokens[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = rate(update)
        adam.step()
        adam.zero_grad()
    return model, time.perf_counter() - began


@torch.inference_mode()
def loss(model: Transformer, text: str, characters: list[str]) -> float:
    """Nats per character of a text in windows of `CONTEXT`."""
    tokens = encode(text, characters)
    count = (len(tokens) - 1) // CONTEXT
    inputs = tokens[: count * CONTEXT].view(count, CONTEXT)
    targets = tokens[1 : count * CONTEXT + 1].view(count, CONTEXT)
    nats = [
        functional.cross_entropy(model(some).flatten(0, 1), others.flatten(), reduction="sum")
        for some, others in zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True)
    ]
    return float(torch.stack(nats).sum()) / (count * CONTEXT)


def encode(text: str, characters: list[str]) -> Tensor:
    """Each character's place in the list."""
    places = {character: place for place, character in enumerate(characters)}
    return torch.tensor([places[character] for character in text])
