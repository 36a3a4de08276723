"""The kernels as modules, in the places of `nn.Linear` and of the model's experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from octavo.kernels.ops import ExpertSet, Matrix, Weight, linear, moe


class KernelLinear(nn.Module):
    """x @ w.T for inference; the weights are no parameters, and lie where they were."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.matrix = Matrix(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] to [..., rows]."""
        return linear(x, self.matrix)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        return _described(self.matrix)


class KernelExperts(nn.Module):
    """All experts of a layer in memory; answers the call of `octavo.model.Experts`."""

    def __init__(self, experts: Sequence[tuple[Weight, Weight, Weight]]) -> None:
        super().__init__()
        self.experts = ExpertSet(experts)

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD: the weighted sum of the chosen experts."""
        return moe(x_TD, topk_ids_TK, topk_weights_TK, self.experts)

    def extra_repr(self) -> str:
        """Number, shape and format, for print(model)."""
        return f"{len(self.experts.experts)} x {_described(self.experts.experts[0][0])}"


def uses_kernels(model: nn.Module) -> bool:
    """Whether a model has such modules."""
    return any(isinstance(module, KernelLinear | KernelExperts) for module in model.modules())


def _described(matrix: Matrix) -> str:
    name = "bfloat16" if isinstance(matrix.weight, Tensor) else matrix.weight.format.name
    return f"{matrix.rows} x {matrix.cols}, {name}"
