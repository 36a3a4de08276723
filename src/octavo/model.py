"""Mixtral, read from top to bottom: a decoder whose feed-forward block is a router and a few of many experts.

Shape suffixes: B batch, T tokens, D dim, H heads, G key-value heads, R heads that share one of these, K head_dim (in
attention) or experts chosen per token (in routing), S slots of the cache, F hidden_dim, E experts, V vocabulary. After
the attention the batch no longer matters, so routing works on x_TD with B and T flattened into T.

Sources: Jiang et al., "Mixtral of Experts" (arXiv 2401.04088); Jiang et al., "Mistral 7B" (arXiv 2310.06825).
Parameter names are the authors' own, and so is the interleaved order of rotary pairs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.args import ModelArgs, MoEArgs
from octavo.cache import KVCache, NoCache, RowView, Step


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; dtype and shape as given."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def rotary_embedding(positions_BT: Tensor, head_dim: int, theta: float) -> Tensor:
    """Return e^(i * position * theta^(-2j/head_dim)) for every pair j: complex64 [B, T, 1, head_dim / 2].

    Rotary position embedding (Su et al., arXiv 2104.09864). Angles are float32 whatever the model's dtype.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    angles = positions_BT.clamp(min=0)[..., None, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BTHK: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of each head by the rotation of its position."""
    pairs = torch.view_as_complex(x_BTHK.float().view(*x_BTHK.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x_BTHK)


class Attention(nn.Module):
    """Grouped-query attention: n_heads queries share n_kv_heads keys and values (Ainslie et al., arXiv 2305.13245)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Tensor, step: Step, layer: int) -> Tensor:
        """Attend over what the step lets each token see; [B, T, D] to [B, T, D]."""
        heads = (-1, self.args.head_dim)
        q_BTHK = rotate(self.wq(x_BTD).unflatten(-1, heads), rotation)
        k_BTGK = rotate(self.wk(x_BTD).unflatten(-1, heads), rotation)
        v_BTGK = self.wv(x_BTD).unflatten(-1, heads)
        k_BGSK, v_BGSK = step.update(layer, k_BTGK, v_BTGK)
        if x_BTD.shape[1] == 1:  # the heads that share keys become rows of one head, so that keys are not repeated
            q_BGRK = q_BTHK.view(q_BTHK.shape[0], self.args.n_kv_heads, -1, self.args.head_dim)
            y_BTHK = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=step.mask).reshape(q_BTHK.shape)
        else:
            y_BTHK = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2),
                k_BGSK,
                v_BGSK,
                attn_mask=step.mask,
                is_causal=step.causal,
                enable_gqa=self.args.n_heads != self.args.n_kv_heads,
            ).transpose(1, 2)
        out: Tensor = self.wo(y_BTHK.flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer, arXiv 2002.05202). w1 is the gate, w3 up, w2 down."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Routing(NamedTuple):
    """What a router decided; forward hooks on ``Router`` see it."""

    topk_ids_TK: Tensor  # int64, best first, ties towards the lower index
    topk_weights_TK: Tensor  # float32, sums to 1 over K
    logits_TE: Tensor  # float32


class Router(nn.Module):
    """Choose top-k experts per token and weigh them: softmax(top_k(x @ weight^T)), all in float32.

    A softmax over the chosen logits equals Mixtral's softmax over all, top-k, renormalise. On disk it is ``gate``.
    """

    def __init__(self, dim: int, moe: MoEArgs) -> None:
        super().__init__()
        self.top_k = moe.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(moe.num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        ranked_TE, ids_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
        weights_TK = ranked_TE[:, : self.top_k].softmax(dim=-1)
        return Routing(ids_TE[:, : self.top_k], weights_TK, logits_TE)


class Experts(Protocol):
    """The one seam of the model: resident, quantised, cached, streamed experts all answer this call."""

    def __call__(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD = sum over k of topk_weights[t, k] * expert[topk_ids[t, k]](x[t])."""
        ...


class ResidentExperts(nn.ModuleList):
    """All experts in memory, one ``FeedForward`` each: every expert runs once, over the tokens that chose it."""

    def __init__(self, args: ModelArgs, moe: MoEArgs) -> None:
        super().__init__(FeedForward(args.dim, args.hidden_dim) for _ in range(moe.num_experts))

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """See ``Experts``. Sums in float32, in the order of the experts."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        chosen = topk_ids_TK.flatten()
        by_expert = chosen.argsort(stable=True)
        tokens = by_expert // topk_ids_TK.shape[1]
        weights = topk_weights_TK.flatten()[by_expert, None]
        start = 0
        for expert, count in enumerate(torch.bincount(chosen, minlength=len(self)).tolist()):
            if count:
                mine = slice(start, start + count)
                out = self[expert](x_TD[tokens[mine]])
                y_TD.index_add_(0, tokens[mine], out * weights[mine])
                start += count
        return y_TD.type_as(x_TD)


class MoEFeedForward(nn.Module):
    """The sparse feed-forward block: route, then let the chosen experts speak."""

    def __init__(self, args: ModelArgs, moe: MoEArgs) -> None:
        super().__init__()
        self.gate = Router(args.dim, moe)
        self.experts: Experts = ResidentExperts(args, moe)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x_TD = x_BTD.flatten(0, -2)
        routing = self.gate(x_TD)
        y_TD = self.experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
        return y_TD.view_as(x_BTD)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on normalised input, each added to the residual stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward: MoEFeedForward | FeedForward
        if args.moe:
            self.feed_forward = MoEFeedForward(args, args.moe)
        else:
            self.feed_forward = FeedForward(args.dim, args.hidden_dim)

    def forward(self, x_BTD: Tensor, rotation: Tensor, step: Step, layer: int) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, step, layer)
        out: Tensor = x_BTD + self.feed_forward(self.ffn_norm(x_BTD))
        return out


class Mixtral(nn.Module):
    """The whole decoder. With ``args.moe`` None it is a dense Mistral."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make embedding and output one parameter, where the architecture says so."""
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of a cache for them."""
        return self.tok_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the token ids must be."""
        return self.tok_embeddings.weight.device

    def routers(self) -> list[Router]:
        """Return the routers in the order of the layers; none for a dense model."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cache: KVCache | RowView | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return next-token logits.

        Args:
            ids_BT: token ids, int64.
            positions_BT: position of each token, int64; -1 marks a pad, which no other token sees. By default
                0, 1, 2... or, with a cache, what follows the row's last token.
            cache: keys and values of earlier tokens; takes up the new ones.
            last_only: logits of the last position alone, which is what generation needs.

        Returns:
            float32 logits [B, T, V], or [B, 1, V].

        Raises:
            PromptError: cache and new tokens exceed the model's context.
        """
        step: Step
        if cache is None:
            step = NoCache(ids_BT, positions_BT, self.args.sliding_window)
        else:
            step = cache.begin(ids_BT.shape[1], positions_BT)
        rotation = rotary_embedding(step.positions_BT, self.args.head_dim, self.args.rope_theta)
        x_BTD = self.tok_embeddings(ids_BT)
        for layer, block in enumerate(self.layers):
            x_BTD = block(x_BTD, rotation, step, layer)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        logits: Tensor = self.output(self.norm(x_BTD)).float()
        return logits
