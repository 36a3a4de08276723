"""Mixtral in plain torch for a card, compiled by torch.compile: what one gets without kernels of one's own.

    python benchmarks/gpu/plain_torch.py

In the manner of gpt-fast: static shapes, one tensor for all experts of a layer, of which a step indexes the chosen
ones, a mask over the whole cache, and mode "reduce-overhead", which replays CUDA graphs. bfloat16, batch 1, decoding.
Checked against `octavo.model` before it is timed, on a small shape with the same weights.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from common import TINY, Setting, error, fill_random, log, options, setting, time_peer
from torch import Tensor, nn

from octavo.args import ModelArgs
from octavo.model import Mixtral, RMSNorm, rotary_embedding

DECODE, CONTEXT = 64, 512


class Block(nn.Module):
    """One layer, for one token."""

    def __init__(self, args: ModelArgs, context: int) -> None:
        super().__init__()
        assert args.moe is not None
        self.args, self.moe = args, args.moe
        q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.wqkv = nn.Linear(args.dim, q + 2 * kv, bias=False)
        self.wo = nn.Linear(q, args.dim, bias=False)
        self.gate = nn.Linear(args.dim, self.moe.num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(self.moe.num_experts, args.hidden_dim, args.dim))
        self.w3 = nn.Parameter(torch.empty(self.moe.num_experts, args.hidden_dim, args.dim))
        self.w2 = nn.Parameter(torch.empty(self.moe.num_experts, args.dim, args.hidden_dim))
        shape = (1, args.n_kv_heads, context, args.head_dim)
        self.register_buffer("k", torch.zeros(shape), persistent=False)
        self.register_buffer("v", torch.zeros(shape), persistent=False)

    def forward(self, x_D: Tensor, cosine: Tensor, sine: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """[D] to [D]; its key and value go to the slot `at`."""
        args = self.args
        sizes = [args.n_heads * args.head_dim] + 2 * [args.n_kv_heads * args.head_dim]
        q, k, v = self.wqkv(self.attention_norm(x_D)).split(sizes)
        q = turned(q.view(args.n_heads, args.head_dim), cosine, sine)
        self.k[:, :, at] = turned(k.view(args.n_kv_heads, args.head_dim), cosine, sine)[None, :, None]
        self.v[:, :, at] = v.view(1, args.n_kv_heads, 1, args.head_dim)
        rows = q.view(1, args.n_kv_heads, -1, args.head_dim)  # heads that share keys are rows of one
        y = F.scaled_dot_product_attention(rows, self.k, self.v, attn_mask=mask)
        x_D = x_D + self.wo(y.reshape(-1))
        h_D = self.ffn_norm(x_D)
        best_K, ids_K = torch.topk(self.gate(h_D).float(), self.moe.num_experts_per_tok)
        weights_K = best_K.softmax(0).to(h_D.dtype)
        up_KF = F.silu(torch.einsum("d,kfd->kf", h_D, self.w1[ids_K])) * torch.einsum("d,kfd->kf", h_D, self.w3[ids_K])
        return x_D + torch.einsum("kf,kdf,k->d", up_KF, self.w2[ids_K], weights_K)


def turned(x_HK: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Neighbouring pairs by the position's angles."""
    even, odd = x_HK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).type_as(x_HK)


class Plain(nn.Module):
    """The decoder, a token at a time."""

    def __init__(self, args: ModelArgs, context: int) -> None:
        super().__init__()
        self.args, self.context = args, context
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, context) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        angles = rotary_embedding(torch.arange(context)[None], args.head_dim, args.rope_theta)[0, :, 0]
        self.register_buffer("cosine", angles.real.contiguous(), persistent=False)
        self.register_buffer("sine", angles.imag.contiguous(), persistent=False)

    def forward(self, token: Tensor, at: Tensor) -> Tensor:
        """Logits [V] behind one token [1] at a position [1]."""
        x_D = self.tok_embeddings(token)[0]
        mask = (torch.arange(self.context, device=at.device) <= at)[None, None, None]
        for layer in self.layers:
            x_D = layer(x_D, self.cosine[at[0]], self.sine[at[0]], at, mask)
        return self.output(self.norm(x_D)).float()


def make(args: ModelArgs, context: int, where: Setting) -> Plain:
    """Random bfloat16 weights on the device; angles stay float32."""
    with torch.device("meta"):
        plain = Plain(args, context)
    plain = plain.to(torch.bfloat16).to_empty(device=where.device).eval()
    angles = rotary_embedding(torch.arange(context)[None], args.head_dim, args.rope_theta)[0, :, 0]
    plain.cosine, plain.sine = angles.real.to(where.device), angles.imag.to(where.device)
    for layer in plain.layers:
        layer.k.zero_()
        layer.v.zero_()
    fill_random(plain)
    return plain


@torch.no_grad()
def check(where: Setting) -> float:
    """The error of this implementation's logits beside `octavo.model`'s, with the same weights, in float32."""
    args, tokens = dataclasses.replace(TINY, n_layers=2), 9
    plain = make(args, 32, where).float()
    model = Mixtral(args).to(where.device).eval()
    state = {}
    for name, value in plain.state_dict().items():
        last = name.rpartition(".")[2]
        layer = ".".join(name.split(".")[:2])
        if ".wqkv." in name:
            sizes = [args.n_heads * args.head_dim] + 2 * [args.n_kv_heads * args.head_dim]
            for part, rows in zip(("wq", "wk", "wv"), value.split(sizes), strict=True):
                state[f"{layer}.attention.{part}.weight"] = rows
        elif last in ("w1", "w3", "w2"):
            state |= {f"{layer}.feed_forward.experts.{e}.{last}.weight": one for e, one in enumerate(value)}
        elif ".wo." in name:
            state[f"{layer}.attention.wo.weight"] = value
        else:
            state[name.replace(".gate.", ".feed_forward.gate.")] = value
    model.load_state_dict(state)
    ids = torch.randint(0, args.vocab_size, (tokens,), device=where.device)
    found = [plain(ids[i : i + 1], torch.tensor([i], device=where.device)) for i in range(tokens)]
    return error(torch.stack(found), model(ids[None])[0])


@torch.no_grad()
def main() -> None:
    """Check, then measure."""
    chosen = options(__doc__).parse_args()
    where = setting(chosen)
    difference = check(where)
    if not difference < 1e-3:
        raise SystemExit(f"plain_torch.py computes something else than the model: {difference}")
    decode, context = (4, 64) if where.tiny else (DECODE, CONTEXT)
    plain = make(where.args, context, where)
    log("plain torch: weights are made")
    step = torch.compile(plain, mode="reduce-overhead", fullgraph=True) if where.has_graphs else plain
    at = torch.zeros(1, dtype=torch.int64, device=where.device)

    def read(ids: Tensor) -> None:
        for i in range(ids.shape[1]):
            if where.has_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            step(ids[0, i : i + 1].clone(), at).argmax().item()
            at.add_(1)

    found = time_peer(read, at.zero_, where, 0, decode)
    where.tell("plain-torch", {"compiled": where.has_graphs, "error": difference} | found | where.limits())


if __name__ == "__main__":
    main()
