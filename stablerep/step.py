"""Forward and backward of one global batch: at once, in parts that fit the memory, or bit-reproducibly."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stablerep.data.chance import derive
from stablerep.engine import full_gradient_step
from stablerep.methods.base import Encoded
from stablerep.runtime import dist


class Step:
    """One rank's share of a training step of `engine`, whose model is a `Method`.

    `micro` rows are encoded at once. Where a rank has more, the loss still sees its whole batch: features are computed
    without gradient, the loss gives their gradients, and a second pass carries these into the encoder (GradCache,
    arXiv 2101.06983), so that accumulation changes memory and time, and nothing else.
    """

    def __init__(self, engine: Any, seed: int, micro: int, rows_per_caption: int, reproducible: bool, clip: float) -> None:
        self.engine, self.method = engine, engine.module
        self.seed, self.micro, self.rows_per_caption = seed, micro, rows_per_caption
        self.reproducible, self.clip = reproducible, clip

    def __call__(self, step: int, views: list[Tensor], tokens: Tensor | None, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute gradients and update the weights; the loss of this rank (of all ranks if reproducible) and its parts."""
        dtype = next(self.method.parameters()).dtype
        self.views = [v.to(dtype) if v.is_floating_point() else v for v in views]
        self.step, self.tokens, self.rows = step, tokens, len(ids)
        if self.reproducible:
            return self._in_fixed_pieces(ids)
        if self.micro == self.rows:
            loss, parts = self.method.loss(self._encode(slice(0, self.rows), self.engine), ids)
            self.engine.backward(loss)
            self.engine.step()
            return loss.detach(), parts
        return self._in_parts(ids)

    def _pieces(self) -> Iterator[slice]:
        for start in range(0, self.rows, self.micro):
            yield slice(start, start + self.micro)

    def _encode(self, rows: slice, model: Any) -> Encoded:
        """Encode some rows; dropout and the like are a function of seed, step and place in the global batch."""
        torch.manual_seed(derive("dropout", self.seed, self.step, dist.rank() * self.rows + rows.start))
        captions = slice(rows.start // self.rows_per_caption, rows.stop // self.rows_per_caption)
        encoded: Encoded = model([v[rows] for v in self.views], None if self.tokens is None else self.tokens[captions])
        return encoded

    @torch.no_grad()
    def _encode_all(self) -> list[Encoded]:
        return [self._encode(piece, self.method) for piece in self._pieces()]

    def _in_parts(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = self._encode_all()
        leaves = {k: torch.cat([e[k] for e in encoded]).requires_grad_() for k in encoded[0]}
        loss, parts = self.method.loss(leaves, ids)
        scale = float(self.engine.optimizer.loss_scale)  # fp16: the engine multiplies by it once more below
        feature_gradients, own = self._loss_gradients(loss * scale, leaves)
        for i, piece in enumerate(pieces := list(self._pieces())):
            last = i == len(pieces) - 1
            surrogate = self._carry_back(piece, i, feature_gradients, self.engine)
            if last and own:
                surrogate = surrogate + carry(own)
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(surrogate / scale, scale_wrt_gas=False)
            self.engine.step()
        return loss.detach(), parts

    def _carry_back(self, piece: slice, place: int, gradients: dict[str, Tensor], model: Any) -> Tensor:
        """Encode a piece again, the one at `place` among those that `gradients` are of: a scalar that has its gradients."""
        self.method.repeating = True
        again = self._encode(piece, model)
        self.method.repeating = False
        return carry((again[k], g[place * len(again[k]) : (place + 1) * len(again[k])]) for k, g in gradients.items())

    def _loss_gradients(self, loss: Tensor, leaves: Encoded) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Gradients of the encoded rows, and of the parameters that the loss uses itself (heads)."""
        trained = [p for p in self.method.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [*leaves.values(), *trained], allow_unused=True)
        of_leaves = dict(zip(leaves, gradients, strict=False))
        own = [(p, g) for p, g in zip(trained, gradients[len(leaves) :], strict=True) if g is not None]
        return {k: g for k, g in of_leaves.items() if g is not None}, own

    def _in_fixed_pieces(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Every number is computed in an order that does not know the rank count: pieces of one size, the loss of the whole
        batch on every rank, gradients added along one binary tree."""
        encoded = self._encode_all()
        own_leaves = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}
        leaves = {k: dist.gather_plain(v).requires_grad_() for k, v in own_leaves.items()}
        every_id = dist.gather_plain(ids)
        with dist.alone():
            loss, parts = self.method.loss(leaves, every_id)
        feature_gradients, own = self._loss_gradients(loss, leaves)
        trained = [p for p in self.method.parameters() if p.requires_grad]
        sums: list[list[Tensor]] = []
        for i, piece in enumerate(self._pieces()):
            surrogate = self._carry_back(piece, dist.rank() * len(encoded) + i, feature_gradients, self.method)
            gradients = torch.autograd.grad(surrogate, trained, allow_unused=True)
            sums.append([torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)])
        total = tree_over_ranks(tree(sums))
        for p, g in own:
            total[next(i for i, q in enumerate(trained) if q is p)] += g
        full_gradient_step(self.engine, trained, total, self.clip)
        return loss.detach(), parts


def carry(pairs: Any) -> Tensor:
    """A scalar whose gradient with respect to each tensor of (tensor, gradient) is that gradient."""
    return torch.stack([(tensor.float() * gradient.float()).sum() for tensor, gradient in pairs]).sum()


def tree(terms: list[list[Tensor]]) -> list[Tensor]:
    """Sum lists of tensors along a binary tree; a power of two of them, so that parts of the tree are trees."""
    while len(terms) > 1:
        terms = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def tree_over_ranks(own: list[Tensor]) -> list[Tensor]:
    """The top of the tree: the sums of all ranks, added in the same way everywhere."""
    if dist.world() == 1:
        return own
    flat = dist.gather_plain(torch.cat([t.flatten() for t in own])[None])
    sizes = [t.numel() for t in own]
    parts = [[p.view_as(t) for p, t in zip(row.split(sizes), own, strict=True)] for row in flat]
    return tree(parts)
