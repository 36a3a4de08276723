"""The operations on the card: what `octavo.kernels.ops` is on the CPU, by the kernels of `octavo.kernels.triton`.

Weights go to the card as the bytes they are in a store. Everything here runs on CPU tensors too, where Triton
interprets its kernels (TRITON_INTERPRET=1), which is how tests compare it with the CPU's own kernels.

Shapes: T tokens, D dim, E experts, K experts a token, F hidden_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import OptionError
from octavo.kernels.ops import Weight
from octavo.quant.formats import Format, Packed

FEW = {4: 8, 8: 8, 16: 2}
"""By bits of a weight: up to so many tokens are multiplied while weights stream by; more of them as tiles."""
GROUP = 64
ALIGNMENT = 256  # bytes, of a matrix among others
_FORMATS = ("q8", "q4")


class Kind(NamedTuple):
    """What a matrix is: its format (None: bfloat16) and shape."""

    format: Format | None
    rows: int
    cols: int

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 16 if self.format is None else self.format.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return 2 * self.rows * self.cols if self.format is None else self.format.nbytes(self.rows, self.cols)


class CardMatrix(NamedTuple):
    """A weight matrix on the card.

    Attributes:
        kind: format and shape.
        data: uint8 [kind.nbytes], or bfloat16 [rows, cols].
    """

    kind: Kind
    data: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.data.nbytes


def kind_of(weight: Weight) -> Kind:
    """What a matrix would be on the card.

    Raises:
        OptionError: it cannot be used there.
    """
    rows, cols = weight.shape
    if isinstance(weight, Packed):
        if weight.format.name not in _FORMATS:
            raise OptionError(
                f"a weight matrix is {weight.format.name}; a GPU computes with {', '.join(_FORMATS)} and bfloat16",
                hint="--bits 4 or 8, or --device cpu, which computes with 3 and 2 bits too",
            )
        return Kind(weight.format, rows, cols)
    if weight.dtype != torch.bfloat16:
        raise OptionError(f"a weight matrix is {weight.dtype}; expected bfloat16, q8 or q4")
    if rows * cols % 8:
        raise OptionError(f"a weight matrix is {rows} x {cols}; a GPU wants a multiple of 8 numbers")
    return Kind(None, rows, cols)


def to_card(weight: Weight, device: torch.device) -> CardMatrix:
    """Copy a matrix to the card, unless it is there.

    Raises:
        OptionError: its format cannot be used there.
    """
    return CardMatrix(kind_of(weight), weight.data.to(device).contiguous())


def copy_into(room: Tensor, weight: Weight) -> CardMatrix:
    """Copy a matrix to the beginning of some bytes on the card.

    Args:
        room: uint8, beginning at a multiple of ALIGNMENT.
        weight: wherever it lies.

    Raises:
        OptionError: its format cannot be used there.
    """
    kind = kind_of(weight)
    data = room[: kind.nbytes]
    data.copy_(weight.data.contiguous().view(torch.uint8).flatten())
    if kind.format is None:
        data = data.view(torch.bfloat16).view(kind.rows, kind.cols)
    return CardMatrix(kind, data)


def join_rows(matrices: Sequence[CardMatrix]) -> CardMatrix | None:
    """One matrix of the rows of several; None where they cannot lie behind one another."""
    kinds = {(m.kind.format, m.kind.cols) for m in matrices}
    if len(kinds) > 1 or any(m.kind.rows % 16 for m in matrices):
        return None
    (format, cols), rows = kinds.pop(), sum(m.kind.rows for m in matrices)
    return CardMatrix(Kind(format, rows, cols), torch.cat([m.data for m in matrices]))


# ---------------------------------------- running kernels


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType, bool]:
    """The modules with the kernels, and whether they are compiled; imported when first needed."""
    try:
        from octavo.kernels import triton as products
        from octavo.kernels import triton_block as between
    except ImportError as error:
        raise OptionError(
            f"a GPU computes with Triton's kernels, and Triton cannot be imported ({error})",
            hint="pip install triton; or --device cpu",
        ) from None
    return products, between, type(products.linear_kernel).__name__ == "JITFunction"


def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU, or a CPU where Triton interprets them."""
    return device.type == "cuda" or not _kernels()[2]


@functools.cache
def _book(device: torch.device) -> Tensor:
    """q4's code values, as kernels want them."""
    values = torch.tensor(_kernels()[0].Q4_BOOK, dtype=torch.int64)
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(device, torch.int32)


def _n_groups(cols: int) -> int:
    """Groups of 64 columns of a low-bit matrix, padding included."""
    return -(-cols // (2 * GROUP)) * 2


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
    # Products are never contracted to fused multiply-adds that are not asked for: the bits would be other ones.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False} if _kernels()[2] else {}
    kernel[grid](*args, **constants, **options)


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        tile: by the tensor cores, rather than while weights stream by.
        M, R: tokens and rows of a program.
        N: columns at a time, of bfloat16 weights.
        num_warps: threads of a program / 32.
        num_stages: loads in flight, of tiles.
    """

    tile: bool
    M: int
    R: int
    N: int
    num_warps: int
    num_stages: int = 3


def tiling(tokens: int, bits: Sequence[int], rows_together: int = 16) -> list[Tiling]:
    """Choose how to cut products that follow one another, by how many tokens a weight meets.

    The compiler's output was looked at for these (docs/gpu.md), and nothing was timed on a card yet.

    Args:
        tokens: that a weight meets.
        bits: of a weight of each product.
        rows_together: the fewest rows of a program of the first one, 16 or 64.

    Returns:
        One for each, with the same M.
    """
    M = 1 << max(0, tokens - 1).bit_length()
    if tokens <= min(FEW[one] for one in bits):
        # A warp for 16 rows of codes needs nothing from others; of 64 rows each of two has half (docs/gpu.md).
        low = [Tiling(False, M, rows, 0, -(-rows // 32)) for rows in (rows_together, 16)]
        plain = [Tiling(False, M, rows, 4096 // rows // M, 4) for rows in (8 if rows_together == 16 else 64, 8)]
        return [(low if one < 16 else plain)[i > 0] for i, one in enumerate(bits)]
    M = min(max(M, 16), 128 if min(bits) == 16 else 64)
    codes, numbers = Tiling(True, M, 64, 0, 4), Tiling(True, M, 64 if M < 64 else 128, 64, 4 if M < 64 else 8, 4)
    return [codes if one < 16 else numbers for one in bits]


def _constants(kind: Kind, how: Tiling) -> dict[str, Any]:
    groups = _n_groups(kind.cols)
    return {
        "N_COLS": kind.cols,
        "TILE": how.tile,
        "M": how.M,
        "R": how.R,
        "G": 8 if groups % 8 == 0 else 2,
        "N": how.N,
        "ASM": _kernels()[2],
        "num_warps": how.num_warps,
        "num_stages": how.num_stages,
    }


# ---------------------------------------- products


class Activations(NamedTuple):
    """Tokens as products with weights want them.

    Attributes:
        x: bfloat16 or float32 [T, cols].
        q: int8 [T, groups * 64], for weights of so many bits; None where there are none.
        scales: float32 [T, groups].
        bits: 4, 8, or 16 where there is no q.
    """

    x: Tensor
    q: Tensor | None
    scales: Tensor | None
    bits: int

    def for_bits(self, bits: int) -> tuple[Tensor, Tensor]:
        """Pointers for a kernel."""
        if bits == 16:
            return self.x, self.x
        if bits != self.bits or self.q is None or self.scales is None:
            raise OptionError(f"activations were made for weights of {self.bits} bits, and these have {bits}")
        return self.q, self.scales


def activations(x_TD: Tensor, *kinds: Kind) -> Activations:
    """Make tokens ready for matrices of these kinds: rounded to int8 by `octavo.kernels.reference`'s rule.

    Raises:
        OptionError: shape or dtype do not fit.
    """
    for kind in kinds:
        _check(x_TD, kind.cols)
    x_TD = x_TD.contiguous()
    bits = _low_bits(kinds)
    if bits == 16:
        return Activations(x_TD, None, None, 16)
    q, scales = _room(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    groups = scales.shape[1]
    _, between, compiled = _kernels()
    grid = (-(-groups // 8), x_TD.shape[0])
    constants = {"N_GROUPS": groups, "BITS": bits, "G": 8, "ASM": compiled}
    _run(between.quantize_kernel, grid, x_TD, q, scales, x_TD.shape[1], num_warps=4, **constants)
    return Activations(x_TD, q, scales, bits)


def _low_bits(kinds: Sequence[Kind]) -> int:
    """Of the matrices that are low-bit, the bits; 16 where none is."""
    found = {kind.bits for kind in kinds} - {16}
    if len(found) > 1:
        raise OptionError("matrices with the same input are q4 and q8; a GPU wants them alike", hint="--device cpu")
    return found.pop() if found else 16


def linear_of(a: Activations, w: CardMatrix) -> Tensor:
    """x @ w.T of tokens that were made ready, in x's dtype [T, rows]."""
    T, kind = a.x.shape[0], w.kind
    if kind.format is None and FEW[16] < T:
        return F.linear(a.x.to(torch.bfloat16), w.data).to(a.x.dtype)
    products, _, _ = _kernels()
    y = a.x.new_empty(T, kind.rows)
    (how,) = tiling(T, [kind.bits])
    grid = (-(-kind.rows // how.R), -(-T // how.M))
    pointers = (*a.for_bits(kind.bits), w.data.data_ptr(), y, _book(y.device), T, kind.rows)
    _run(products.linear_kernel, grid, *pointers, BITS=kind.bits, **_constants(kind, how))
    return y


def linear(x: Tensor, w: CardMatrix) -> Tensor:
    """Return x @ w.T, in x's dtype; see `octavo.kernels.linear`, of whose low-bit products it has the bits.

    Raises:
        OptionError: shape or dtype do not fit.
    """
    a = activations(x.reshape(-1, x.shape[-1]), w.kind)
    return linear_of(a, w).view(*x.shape[:-1], w.kind.rows)


# ---------------------------------------- experts


class ExpertTable:
    """Where the experts of a layer lie.

    Args:
        kinds: of w1, w3 and w2, the same for all experts.
        addresses_E3: int64 on the card, addresses of the three matrices of each; 0 where they are not there. May be
            written to between two calls.
    """

    def __init__(self, kinds: tuple[Kind, Kind, Kind], addresses_E3: Tensor) -> None:
        self.kinds, self.addresses_E3 = kinds, addresses_E3

    @property
    def n_experts(self) -> int:
        """How many there are, on the card or not."""
        return self.addresses_E3.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(kind.nbytes for kind in self.kinds)


def moe_into(
    parts_TKD: Tensor, x_TD: Tensor | Activations, topk_ids_TK: Tensor, topk_weights_TK: Tensor, table: ExpertTable
) -> None:
    """Compute what chosen experts add to each token, as far as these are on the card: weight * expert(x).

    Args:
        parts_TKD: float32; what belongs to experts that are not on the card stays as it is.
        x_TD: bfloat16 or float32, or made ready by `activations`.
        topk_ids_TK: int64.
        topk_weights_TK: float32.
        table: the experts.

    Raises:
        OptionError: shapes or dtypes do not fit.
    """
    k1, k3, k2 = table.kinds
    a = x_TD if isinstance(x_TD, Activations) else activations(x_TD, k1, k3)
    T, K = topk_ids_TK.shape
    if a.x.shape[0] != T or topk_weights_TK.shape != (T, K) or parts_TKD.shape != (T, K, k2.rows):
        raise OptionError(
            f"x has {a.x.shape[0]} tokens, ids {[T, K]}, weights {list(topk_weights_TK.shape)}, "
            f"parts {list(parts_TKD.shape)}"
        )
    products, _, _ = _kernels()
    ids, weights, device = topk_ids_TK.contiguous(), topk_weights_TK.float().contiguous(), a.x.device
    together = _tokens_together(T, K, table.n_experts)
    up, down = tiling(together, [k1.bits, k2.bits], rows_together=16 if k2.format is None else GROUP)
    order, blocks = _dispatch(ids, table.n_experts, up.M)
    n_blocks = blocks.shape[0]
    if k2.format is None:
        hidden = torch.empty(T * K, k2.cols, dtype=torch.bfloat16, device=device)
        scales = hidden
        width = k2.cols
    else:
        hidden, scales = _room(T * K, k2.cols, device)
        width = hidden.shape[1]
    if k1.bits != k3.bits:
        raise OptionError("w1 and w3 of an expert are of different formats; a GPU wants them alike")
    book = _book(device)
    pointers = (*a.for_bits(k1.bits), order, blocks, table.addresses_E3, hidden, scales, book, k1.rows)
    bits = {"K": K, "BITS_1": k1.bits, "BITS_3": k3.bits, "BITS_2": k2.bits}
    grid = (-(-width // up.R), n_blocks)
    _run(products.gate_and_up_kernel, grid, *pointers, **bits, **_constants(k1, up))
    pointers = (hidden, scales, order, blocks, table.addresses_E3, weights, parts_TKD, book, k2.rows)
    grid = (-(-k2.rows // down.R), n_blocks)
    _run(products.down_kernel, grid, *pointers, BITS=k2.bits, **_constants(k2, down))


def combine(parts_TKD: Tensor, like_TD: Tensor, onto: bool = False) -> Tensor:
    """Sum the parts of each token in their order, in float32, then in the dtype of ``like``; perhaps on top of it."""
    T, K, D = parts_TKD.shape
    y = torch.empty_like(like_TD)
    _, between, compiled = _kernels()
    constants = {"D": D, "K": K, "N": 1024, "ADD": onto, "ASM": compiled}
    _run(between.combine_kernel, (-(-D // 1024), T), parts_TKD, like_TD, y, num_warps=4, **constants)
    return y


def moe(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, table: ExpertTable) -> Tensor:
    """The weighted sum of the chosen experts, all of which are on the card; see `octavo.kernels.moe`.

    Of low-bit experts it has the bits of that, where a token chooses two.
    """
    parts = torch.empty(*topk_ids_TK.shape, x_TD.shape[1], dtype=torch.float32, device=x_TD.device)
    moe_into(parts, x_TD, topk_ids_TK, topk_weights_TK, table)
    return combine(parts, x_TD)


def _tokens_together(T: int, K: int, n_experts: int) -> int:
    """Tokens of one expert to be multiplied at a time: twice as many as choose it on average."""
    return min(T, -(-2 * T * K // n_experts))


def _dispatch(ids_TK: Tensor, n_experts: int, M: int) -> tuple[Tensor, Tensor]:
    """Choices by expert, int32 [T * K], and blocks of M of them at most: (expert, begin, end), int32 [blocks, 3]."""
    n = ids_TK.numel()
    n_blocks = min(n, n_experts + n // M)
    order = torch.empty(n, dtype=torch.int32, device=ids_TK.device)
    blocks = torch.empty(n_blocks, 3, dtype=torch.int32, device=ids_TK.device)
    products, _, _ = _kernels()
    constants = {"E": n_experts, "A": max(16, 1 << (n - 1).bit_length()), "M": M}
    warps = 4 if n <= 1024 else 16
    _run(products.dispatch_kernel, (1,), ids_TK, order, blocks, n, n_blocks, num_warps=warps, **constants)
    return order, blocks


def _room(tokens: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For int8 activations and their scales."""
    groups = _n_groups(cols)
    q = torch.empty(tokens, groups * GROUP, dtype=torch.int8, device=device)
    return q, torch.empty(tokens, groups, dtype=torch.float32, device=device)


def _check(x: Tensor, cols: int) -> None:
    if x.dim() != 2 or x.shape[1] != cols or x.dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(f"activations are {x.dtype} {list(x.shape)}; expected float32 or bfloat16 [tokens, {cols}]")
    if not usable(x.device):
        raise OptionError(f"activations are on {x.device}; expected a GPU", hint="or TRITON_INTERPRET=1, for tests")


# ---------------------------------------- norms, routing, rotation


def normalize(x_TD: Tensor, weight: Tensor, eps: float, *kinds: Kind) -> Activations:
    """x / rms(x) * weight, made ready for matrices of these kinds; see `octavo.model.RMSNorm`."""
    return _norm(x_TD, weight, eps, kinds, None, None)[1]


class Chosen(NamedTuple):
    """What a router decided: ids [T, K], int64; weights [T, K] and logits [T, E], float32."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    logits_TE: Tensor


def add_normalize_route(
    x_TD: Tensor, added_TD: Tensor, weight: Tensor, eps: float, gate_ED: Tensor, top_k: int, *kinds: Kind
) -> tuple[Tensor, Activations, Chosen]:
    """x + added; that normalized, and made ready; and what a router chooses of it, as `octavo.model.Router` would."""
    total, a, chosen = _norm(x_TD, weight, eps, kinds, added_TD, (gate_ED, top_k))
    if chosen is None:
        raise ValueError("there was a gate")
    return total, a, chosen


def _norm(
    x_TD: Tensor,
    weight: Tensor,
    eps: float,
    kinds: Sequence[Kind],
    added: Tensor | None,
    router: tuple[Tensor, int] | None,
) -> tuple[Tensor, Activations, Chosen | None]:
    T, D = x_TD.shape
    _check(x_TD, D)
    _, between, compiled = _kernels()
    normed, q, scales = torch.empty_like(x_TD), x_TD, x_TD
    total = x_TD if added is None else torch.empty_like(x_TD)
    bits = _low_bits(kinds)
    low = bits != 16
    if low:
        q, scales = _room(T, D, x_TD.device)
    chosen, gate, top_k, n_experts = None, weight, 1, 0
    if router is not None:
        gate, top_k = router
        n_experts = gate.shape[0]
        ids = torch.empty(T, top_k, dtype=torch.int64, device=x_TD.device)
        weights = torch.empty(T, top_k, dtype=torch.float32, device=x_TD.device)
        chosen = Chosen(ids, weights, torch.empty(T, n_experts, dtype=torch.float32, device=x_TD.device))
    outs = chosen or Chosen(x_TD, x_TD, x_TD)
    width = 1 << (max(D, GROUP * _n_groups(D)) - 1).bit_length()
    wide = 1 << max(0, n_experts - 1).bit_length()
    constants = {
        "D": D,
        "WIDTH": width,
        "ADD": added is not None,
        "N_GROUPS": _n_groups(D) if low else 0,
        "BITS": bits,
        "E": n_experts,
        "WIDE_E": wide,
        "K": top_k,
        "N": max(16, min(width, 8192 // wide)),
        "ASM": compiled,
    }
    pointers = (x_TD, x_TD if added is None else added, total, weight, normed, q, scales, gate, *outs, eps)
    _run(between.norm_kernel, (T,), *pointers, num_warps=8 if width >= 2048 else 4, **constants)
    return total, Activations(normed, q if low else None, scales if low else None, bits), chosen


def rotate_and_store(
    qkv_T3: Tensor, rotation: Tensor, n_heads: int, k_BGSK: Tensor, v_BGSK: Tensor, slots_BT: Tensor
) -> Tensor:
    """Turn queries and keys by their positions, and put keys and values into their slots of a layer's cache.

    Args:
        qkv_T3: [B * T, (n_heads + 2 * n_kv_heads) * head_dim], queries, keys and values of each token.
        rotation: complex64 [B, T, 1, head_dim / 2]; see `octavo.model.rotary_embedding`.
        n_heads: of queries.
        k_BGSK: keys by row, head and slot; numbers of a head are adjacent. Written to.
        v_BGSK: values, lying alike.
        slots_BT: int64.

    Returns:
        Queries [B * T, n_heads, head_dim].
    """
    B, T = slots_BT.shape
    n_kv, head_dim = k_BGSK.shape[1], k_BGSK.shape[3]
    if k_BGSK.stride() != v_BGSK.stride() or k_BGSK.stride(3) != 1:
        raise OptionError("keys and values do not lie alike, or the numbers of a head are not adjacent")
    queries = qkv_T3.new_empty(B * T, n_heads, head_dim)
    angles = torch.view_as_real(rotation.resolve_conj()).contiguous()
    _, between, compiled = _kernels()
    strides = k_BGSK.stride()[:3]
    half = head_dim // 2
    wide = 1 << max(0, half - 1).bit_length()
    constants = {"H": n_heads, "KV": n_kv, "HALF": half, "WIDE": wide, "ASM": compiled}
    pointers = (qkv_T3, angles, queries, k_BGSK, v_BGSK, slots_BT.contiguous(), *strides, T)
    _run(between.rotate_kernel, (n_heads + 2 * n_kv, B * T), *pointers, num_warps=1, **constants)
    return queries


# ---------------------------------------- modules


class CardLinear(nn.Module):
    """x @ w.T for inference; the weights are no parameters."""

    def __init__(self, matrix: CardMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] to [..., rows]."""
        return linear(x, self.matrix)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        return described(self.matrix.kind)


class CardExperts(nn.Module):
    """All experts of a layer on the card; answers the call of `octavo.model.Experts`.

    Args:
        experts: w1, w3 and w2 of each.

    Raises:
        OptionError: experts are of different formats.
    """

    def __init__(self, experts: Sequence[Sequence[CardMatrix]]) -> None:
        super().__init__()
        self._alive = experts
        k1, k3, k2 = (matrix.kind for matrix in experts[0])
        if any(tuple(matrix.kind for matrix in expert) != (k1, k3, k2) for expert in experts):
            raise OptionError("experts of a layer are of different formats; a GPU wants them alike")
        addresses = torch.tensor([[matrix.data.data_ptr() for matrix in expert] for expert in experts])
        self.table = ExpertTable((k1, k3, k2), addresses.to(experts[0][0].data.device))

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD: the weighted sum of the chosen experts."""
        return moe(x_TD, topk_ids_TK, topk_weights_TK, self.table)

    def extra_repr(self) -> str:
        """Number, shape and format, for print(model)."""
        return f"{self.table.n_experts} x {described(self.table.kinds[0])}"


def described(kind: Kind) -> str:
    """A kind in words."""
    return f"{kind.rows} x {kind.cols}, {'bfloat16' if kind.format is None else kind.format.name}"
