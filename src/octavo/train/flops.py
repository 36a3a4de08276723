"""How much arithmetic a training step is, counted from the model's shape.

A token costs

    6 * (parameters of the matrices it meets) + 12 * n_layers * n_heads * head_dim * (tokens it sees)

floating-point operations: a multiplication and an addition for every weight, once forward and twice backward (for
the gradients of input and weight), and the same for the two products of attention, queries by keys and weights by
values. This is the count of model FLOPs of PaLM (Chowdhery et al., arXiv 2204.02311, appendix B), with two
differences: of the experts only the chosen ones count, and a token sees what its mask lets it see, not the whole row.

The matrices are those of attention, the router, the chosen experts and the output. Left out are the embedding (a
look-up), norms, rotary embeddings, softmax, activations, the weighted sum over experts, the losses and the optimiser;
and work done twice, or on pads, is no use and counts once, or not at all.
"""

from __future__ import annotations

from octavo.args import ModelArgs


def matrix_params(args: ModelArgs) -> int:
    """Weights of all matrix products that one token goes through."""
    block = args.attention_params + args.expert_params
    if args.moe:
        router, others = args.moe.num_experts * args.dim, args.moe.num_experts_per_tok - 1
        block += router + others * args.expert_params
    return args.n_layers * block + args.vocab_size * args.dim


def flops_per_token(args: ModelArgs, visible: float) -> float:
    """Model FLOPs of one token's forward and backward pass.

    Args:
        args: the model's shape.
        visible: tokens a token attends to on average, itself included.
    """
    return 6 * matrix_params(args) + 12 * args.n_layers * args.n_heads * args.head_dim * visible
