"""Muon where no low-rank structure is used: ``torch.optim.Muon`` on matrices, AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon
from torch.optim.adamw import adamw

from lorapro.factors import find_pairs

__all__ = ["MuonAndAdamW", "hidden_matrices", "muon_factory"]

# Names under which transformers keep the layer that makes the output.
HEADS = ("classifier", "score", "lm_head", "qa_outputs", "classification_head")


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers between input and head: what Muon is made for.

    In a model with LoRA adapters these are A and B, each a matrix of its own. Embeddings, heads,
    biases and norms are left out, and so is a head tied to the embedding.

    >>> net = nn.ModuleDict({"body": nn.Linear(3, 2), "classifier": nn.Linear(2, 2)})
    >>> [tuple(p.shape) for p in hidden_matrices(net)]
    [(2, 3)]
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and id(module.weight) not in embedded
        and not set(HEADS) & set(name.split("."))
    ]


class MuonAndAdamW(Muon):
    """One optimizer for Trainer: Muon for ``matrices``, AdamW for ``others``.

    Muon's steps are scaled by ``0.2·√max(m, n)``, as :class:`lorapro.LoraProMuon` scales its own,
    so that both groups take AdamW's learning rate.

    Args:
        matrices: two-dimensional parameters.
        others: any parameters.
        lr: learning rate of both.
        weight_decay: of both, decoupled.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        rank: after each step the change of every matrix since the first is cut to this rank, to the
            nearest one: what full fine-tuning could do if these had to end as an adapter of that
            rank. It keeps a copy of them; ``others`` are not cut. 0 does not cut.

    >>> W, b = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))
    >>> optimizer = MuonAndAdamW([W], [b], lr=0.1)
    >>> (W.sum() + b.sum()).backward()
    >>> _ = optimizer.step()
    >>> b.detach()
    tensor([-0.1000, -0.1000])
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        rank: int = 0,
    ) -> None:
        super().__init__(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        others = list(others)
        if others:
            self.add_param_group({"params": others, "betas": betas, "adam_eps": eps})
        self.rank = rank

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both rules."""
        every = self.param_groups
        self.param_groups = [g for g in every if "betas" not in g]
        matrices = [p for g in self.param_groups for p in g["params"]] if self.rank else []
        for p in matrices:
            if "start" not in self.state[p]:
                self.state[p]["start"] = p.clone()
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for p in matrices:
            self._cut(p)
        for group in every:
            if "betas" in group:
                self._adamw(group)
        return loss

    def _cut(self, p: Tensor) -> None:
        start = self.state[p]["start"].float()
        change = p - start
        if change.isfinite().all():  # a run that diverged is to go on and say so
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            r = self.rank
            p.copy_(torch.addmm(start, left[:, :r] * values[:r], right[:r]))

    def _adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["adam_eps"],
            maximize=False,
        )


def muon_factory() -> Callable[..., MuonAndAdamW]:
    """What Trainer calls to get a function from model and arguments to the optimizer."""

    def build(model: nn.Module, **kwargs: Any) -> MuonAndAdamW:
        matrices = hidden_matrices(model)
        if not matrices:
            raise ValueError("the model has no hidden linear layer for Muon to train.")
        if kwargs.get("rank") and find_pairs(model).pairs:
            raise ValueError(
                "muon_rank cuts changes of weights, and an adapter has a rank: drop it."
            )
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return MuonAndAdamW(matrices, others, **kwargs)

    return build
