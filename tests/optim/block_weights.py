"""A module whose weights have the names and roles of those of a small encoder."""

import torch
from torch import nn

H, F = 12, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H, 3 * H, bias=False)
        self.out = nn.Linear(H, H, bias=False)
        self.gate_up = nn.Linear(H, 2 * F, bias=False)
        self.down = nn.Linear(F, H, bias=False)
        self.norm = nn.Parameter(torch.ones(H))


class Model(nn.Module):
    """Names and roles of the weights of a small encoder; nothing is computed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, H)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.Linear(H, 7, bias=False)
