"""Per-head q/k RMSNorm, rotary embedding, and the store of keys and values into pages: one op, one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.kernels.rows import Raw
from octavo.device.ops.bind import Op, triton_rows
from octavo.device.ops.fp8 import FP8, FP8_MAX, settled
from octavo.device.ops.norm import rms_norm


def rope_store(
    qkv: Tensor | Raw,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor | None,
    positions: Tensor,
    kv_pages: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Norm and rotate q and k, write k and v to the cache, return q.

    qkv [T, (Hq + 2 Hkv) * D], also as a product whose scales are applied here; q_weight, k_weight [D] or None (no per-head norm); cos_sin [max_position, dim] float32
    (first half cos, second half sin; dim <= D, halves convention) or None (no rotation); positions [T] int64;
    kv_pages [pages, 2, Hkv, page_size, D]; slot_mapping [T] int64 = page * page_size + offset, -1 = do not store.
    Pages of fp8 get k / kv_scales[0] and v / kv_scales[1] ([2, Hkv] float32, None = 1), at most 448 in size. Returns q [T, Hq, D] in qkv's type.
    """
    num_kv_heads, page_size, head_dim = kv_pages.shape[2:]
    tokens = qkv.shape[0]
    heads = settled(qkv).view(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    if cos_sin is not None:
        rows = cos_sin[positions]
        q, k = rotate(q, rows), rotate(k, rows)
    keep = slot_mapping >= 0
    where = slot_mapping[keep]
    page, offset = where // page_size, where % page_size
    k, v = k[keep], v[keep]
    if kv_pages.dtype == FP8:
        wide = torch.stack((k, v)).float()
        if kv_scales is not None:
            wide = wide / kv_scales[:, None, :, None]
        k, v = wide.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8).unbind(0)
        kv_pages = kv_pages.view(torch.uint8)
    kv_pages[page, 0, :, offset] = k.to(kv_pages.dtype)
    kv_pages[page, 1, :, offset] = v.to(kv_pages.dtype)
    return q.contiguous()


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first dim values of x [T, H, D] by cos_sin [T, dim] (cos | sin), in float32."""
    dim = cos_sin.shape[-1]
    cos, sin = cos_sin.float().unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., : dim // 2].float(), x[..., dim // 2 : dim].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., dim:]), dim=-1)


ROPE_STORE = Op("rope_store", rope_store, triton_rows("rope_store:rope_store", "rope_store_hopper"))
