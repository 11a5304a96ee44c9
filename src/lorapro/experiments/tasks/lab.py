"""The laboratory's tasks: text in rows, and a planted teacher, on hidden layers alone.

Only the linear layers between embedding and head are trained, by full fine-tuning too, so that
methods differ in nothing but how they move those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, TaskEntry
from lorapro.experiments.tasks.causal import Causal, CausalOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["LAB_TASKS", "HiddenText", "Planted", "PlantedOptions", "plant"]


class HiddenText(Causal):
    """Text in rows of ``max_length`` tokens, of which none is padded; hidden layers trained."""

    def load_model(self) -> PreTrainedModel:
        """Load the model, all but its hidden layers frozen."""
        from lorapro.experiments.methods.muon import hidden_matrices

        model = super().load_model()
        hidden = {id(weight) for weight in hidden_matrices(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in hidden)
        return model

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Stack the rows: they have one length."""
        import torch

        def collate(examples: Examples) -> dict[str, Any]:
            rows = torch.tensor([example["input_ids"] for example in examples])
            return {"input_ids": rows, "labels": rows}

        return collate


@dataclass
class PlantedOptions(CausalOptions):
    """Keys of a planted teacher."""

    teacher_rank: int = option(8, "planted: rank of the change in every layer", least=1)
    teacher_condition: float = option(
        1.0, "planted: largest over smallest singular value of the change", least=1
    )
    teacher_size: float = option(
        0.5, "planted: Frobenius norm of the change over that of the weight", above=0
    )


def plant(weight: Tensor, rank: int, condition: float, size: float, seed: int) -> Tensor:
    """A change of ``weight``: singular values geometric from 1 to 1/condition, sides at random.

    Args:
        weight: (m, n).
        rank: of the change.
        condition: largest over smallest singular value of the change.
        size: Frobenius norm of the change over that of the weight.
        seed: of the two random orthogonal sides.

    Returns:
        (m, n), the change.

    >>> import torch
    >>> change = plant(torch.eye(6), rank=3, condition=100.0, size=0.5, seed=0)
    >>> values = torch.linalg.svdvals(change)
    >>> [round(v, 4) for v in (values[:4] / values[0]).tolist()]
    [1.0, 0.1, 0.01, 0.0]
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))[0]
        for side in weight.shape
    ]
    values = torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)
    change = sides[0] * values @ sides[1].mT
    return (change * (size * weight.double().norm() / values.norm())).to(weight.dtype)


class Planted(HiddenText):
    """Recover what was planted into a teacher, from its predictions on the base's own text.

    The teacher is the base plus a change of rank ``teacher_rank`` in every hidden layer; a student
    of that rank can reach it. The loss is the divergence ``KL(teacher ‖ student)`` a token, 0 at
    the optimum, so all that is left is optimization.
    """

    options: ClassVar[type] = PlantedOptions

    teacher: Any = None

    def load_model(self) -> PreTrainedModel:
        """Load the base; its loss is the divergence from the teacher."""
        model = super().load_model()
        if self.teacher is None:
            self.teacher = self._plant(super().load_model())
        model.loss_function = self._loss
        return model

    def _plant(self, teacher: PreTrainedModel) -> PreTrainedModel:
        import torch

        from lorapro.experiments.methods.muon import hidden_matrices

        o = self.args
        with torch.no_grad():
            for seed, weight in enumerate(hidden_matrices(teacher)):
                weight += plant(weight, o.teacher_rank, o.teacher_condition, o.teacher_size, seed)
        return teacher.eval().requires_grad_(False)

    def _divergences(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """KL(teacher ‖ student) of every prediction: logits (b, t, v), tokens (b, t) -> (b, t−1).

        The last token's prediction is left out, as in a loss on next tokens.
        """
        import torch

        with torch.no_grad():
            goal = self.teacher.to(tokens.device)(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        own = logits[:, :-1].log_softmax(-1)
        return torch.nn.functional.kl_div(own, goal, reduction="none", log_target=True).sum(-1)

    def _loss(
        self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        """Transformers' loss function of a model: labels are the tokens."""
        apart = self._divergences(logits, labels)
        return apart.sum() / (apart.numel() if num_items_in_batch is None else num_items_in_batch)

    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean divergence of each row."""
        import torch

        apart = self._divergences(outputs.logits, batch["input_ids"])
        return {"loss": apart.mean(-1), "weight": torch.full((len(apart),), float(apart.shape[1]))}


_VALUES = {"format": "text", "max_length": 64, "validation_samples": 256, "test_samples": 1024}

LAB_TASKS = (
    TaskEntry(
        "lab",
        "hidden_text",
        "next tokens of a text that is new to a small model, hidden layers alone",
        model="llama-1m-bbc",
        data="python-code",
        values=_VALUES,
        toy=("llama_base", "texts"),
    ),
    TaskEntry(
        "lab-planted",
        "planted",
        "recover a change of low rank, planted into every hidden layer of a small model",
        model="llama-1m-bbc",
        data="bbc-news",
        values=_VALUES,
        toy=("llama_base", "texts"),
    ),
)
