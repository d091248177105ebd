"""Attention over a window and over compressed entries (DeepSeek-AI 2026): one vector is key and value of all heads.

A token's place in a cache is a slot (page * page_size + offset). What an entry is made of (values and gates of its tokens)
waits in pages of its own until the last of its tokens is there:

    tokens   |0 1 2 3|4 5 6 7|8 9              rate 4: entry 0 is written by the step that computes token 3
    entries  |   0   |   1   |
    token 9 sees a window of tokens and the entries 0 and 1; token 6 sees entry 0 only
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows
from octavo.device.ops.norm import rms_norm


def rotate_pairs(x: Tensor, cos_sin: Tensor, positions: Tensor, back: bool = False) -> Tensor:
    """Rotate the last dim values of x [T, H, D] in neighbouring pairs, by the angles at ``positions`` [T] (int64).

    cos_sin [max_position, dim] float32: cos of the dim/2 frequencies, then sin. ``back``: by the negative angle. Computed
    in float32, returned in x's type.
    """
    rows = cos_sin[positions].unsqueeze(1)
    cos, sin = rows.chunk(2, dim=-1)
    sin = -sin if back else sin
    start = x.shape[-1] - cos_sin.shape[1]
    first, second = x[..., start::2].float(), x[..., start + 1 :: 2].float()
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :start], turned.to(x.dtype)), dim=-1)


def head_store(
    q: Tensor,
    key: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Norm each head of q [T, H, D] (without weights) and key [T, D] (by ``weight`` [D]), rotate both, store the key.

    pages [num_pages, page_size, D]; slot_mapping [T] int64, -1 = do not store; the rest as ``rotate_pairs``. Returns q.
    """
    normed = rms_norm(key, weight, eps).unsqueeze(1)
    turned = rotate_pairs(normed, cos_sin, positions)[:, 0]
    keep = slot_mapping >= 0
    where = slot_mapping[keep]
    pages[where // pages.shape[1], where % pages.shape[1]] = turned[keep].to(pages.dtype)
    return rotate_pairs(rms_norm(q, weight.new_ones(()), eps), cos_sin, positions)


def piece_store(pieces: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
    """Write rows of pieces [T, W] to pages [num_pages, page_size, W]; slot_mapping as above."""
    keep = slot_mapping >= 0
    where = slot_mapping[keep]
    pages[where // pages.shape[1], where % pages.shape[1]] = pieces[keep].to(pages.dtype)


def compress(
    pages: Tensor,
    page_table: Tensor,
    first: int,
    bias: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    rows: Tensor,
    seen: Tensor,
    entries: Tensor,
    entry_table: Tensor,
) -> None:
    """Write the entries whose last tokens are in this step.

    pages [num_pages, page_size, W] hold each token's pieces, of which those from ``first`` on belong here: values [width],
    then gates [width]. bias [rate, width], weight [D] float32, where width is D, or 2 D for entries that overlap: these are
    made of the second halves of their own tokens and the first halves of those of the entry before. rows, seen [T] int32: a
    token's row, and how many tokens that has up to this one (0 = padding). entries [num_pages, entries a page, D] are
    written where entry_table [R, max_pages] says, rotated by the position of their first token.
    """
    rate, width = bias.shape
    size, page_size, per_page = weight.shape[0], pages.shape[1], entries.shape[1]
    at = torch.nonzero((seen > 0) & (seen % rate == 0))[:, 0]
    if not len(at):
        return
    row, number = rows[at].long(), seen[at].long() // rate - 1
    reach = rate * (width // size)
    position = (seen[at].long() - reach).unsqueeze(1) + torch.arange(reach, device=pages.device)
    there = position.clamp(min=0)
    page = page_table[row.unsqueeze(1), there // page_size].long()
    pieces = pages[page, there % page_size, first : first + 2 * width].float()
    values, gates = torch.split(pieces, width, dim=-1)
    gates = gates + bias.float().repeat(width // size, 1)
    if width > size:
        values, gates = (torch.cat((x[:, :rate, :size], x[:, rate:, size:]), dim=1) for x in (values, gates))
    gates = gates.masked_fill((position < 0).unsqueeze(-1), float("-inf"))
    mixed = (values * torch.softmax(gates, dim=1)).sum(1)
    turned = rotate_pairs(rms_norm(mixed, weight, eps).unsqueeze(1), cos_sin, number * rate)[:, 0]
    home = entry_table[row, number // per_page].long()
    entries[home, number % per_page] = turned.to(entries.dtype)


def compressed_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    window: int,
    entries: Tensor | None,
    entry_table: Tensor | None,
    rate: int,
    chosen: Tensor | None,
    rows: Tensor,
    seen: Tensor,
    max_kv: int,
    scale: float,
    sinks: Tensor,
) -> Tensor:
    """Attention of every token over its window and over entries, whose vectors are both keys and values.

    q [T, H, D]; pages [num_pages, page_size, D] hold tokens, of which each sees itself and the ``window`` - 1 before; rows
    and seen [T] int32 as in ``compress`` (up to ``max_kv``). Of entries [num_pages, entries a page, D] (None = there are
    none) a token sees all seen // rate that are whole, or with ``chosen`` [T, K] int64 those slots (-1 = none). sinks [H]
    float32: a logit a head that takes probability but has no value. Returns [T, H, D] in q's type, zeros for padding.
    """
    out = torch.zeros_like(q)
    for token, (row, length) in enumerate(zip(rows.tolist(), seen.tolist())):
        if length == 0:
            continue
        begin = max(0, length - window)
        keys = _read(pages, page_table[row], torch.arange(begin, length, device=q.device))
        if entries is not None and entry_table is not None:
            if chosen is None:
                number = torch.arange(length // rate, device=q.device)
                more = _read(entries, entry_table[row], number)
            else:
                slots = chosen[token][chosen[token] >= 0]
                more = entries[slots // entries.shape[1], slots % entries.shape[1]].float()
            keys = torch.cat((keys, more))
        scores = torch.cat((q[token].float() @ keys.T * scale, sinks.unsqueeze(1)), dim=1)
        out[token] = (torch.softmax(scores, dim=1)[:, :-1] @ keys).to(q.dtype)
    return out


def _read(pages: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    """Vectors by their number in a row [n, D], in float32."""
    size = pages.shape[1]
    return pages[table[numbers // size].long(), numbers % size].float()


ROTATE_PAIRS = Op("rotate_pairs", rotate_pairs, triton_rows("compressed:rotate_pairs"))
HEAD_STORE = Op("head_store", head_store, triton_rows("compressed:head_store"))
PIECE_STORE = Op("piece_store", piece_store, triton_rows("compressed:piece_store"))
COMPRESS = Op("compress", compress, triton_rows("compressed:compress"))
COMPRESSED_ATTENTION = Op(
    "compressed_attention",
    compressed_attention,
    triton_rows("compressed_attention:compressed_attention", "compressed_attention_hopper"),
)
