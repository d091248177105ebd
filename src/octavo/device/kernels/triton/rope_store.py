"""q/k norm, rotary embedding and the store into KV pages in one Triton kernel."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.device.kernels.rows import FEW, Raw

METADATA = ("positions", "slot_mapping")  # views of one packed upload: any alignment, one kernel


@triton.jit(do_not_specialize_on_alignment=METADATA)
def _rope_store_kernel(
    out, qkv, q_weight, k_weight, cos_sin, positions, kv_pages, slot_mapping, eps, kv_scales, token_scale, scale,
    stride_qkv, stride_rope, stride_page, stride_value, stride_head, stride_slot,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, ROTARY: tl.constexpr,
    PAGE: tl.constexpr, HEADS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PDL: tl.constexpr,
    EIGHT: tl.constexpr, SCALED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token, in the order q, k, v; ROTARY is the number of rotated dims (0 = none).

    SCALED: keys and values are divided by kv_scales [2, HKV]. RAW: qkv is a product that still wants token_scale[token] * scale.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DPAD)
    is_q, is_k = head < HQ, (head >= HQ) & (head < HQ + HKV)
    inside = (head < HQ + 2 * HKV)[:, None] & (dims < D)[None, :]
    source = qkv + token * stride_qkv + head[:, None] * D
    kind = out.dtype.element_ty
    y = tl.load(source + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if RAW:
        unit = tl.load(token_scale + token)
        channels = scale + head[:, None] * D
        y = (y * unit * tl.load(channels + dims[None, :], mask=inside, other=0.0)).to(kind).to(tl.float32)
    half: tl.constexpr = ROTARY // 2
    partner = tl.where(dims < half, dims + half, tl.where(dims < ROTARY, dims - half, dims))
    if ROTARY > 0:
        # The same row again with the halves swapped: a second read of the cache line, no shuffle of registers.
        z = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if RAW:
            z = (
                (z * unit * tl.load(channels + partner[None, :], mask=inside, other=0.0))
                .to(kind)
                .to(tl.float32)
            )
    if Q_NORM or K_NORM:
        rms = tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
        normed, swapped = y, z if ROTARY > 0 else y
        if Q_NORM:
            w = tl.load(q_weight + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
            normed = tl.where(is_q[:, None], (y * rms * w).to(kind).to(tl.float32), normed)
            if ROTARY > 0:
                w = tl.load(q_weight + partner, mask=dims < D, other=0.0).to(tl.float32)[None, :]
                swapped = tl.where(is_q[:, None], (z * rms * w).to(kind).to(tl.float32), swapped)
        if K_NORM:
            w = tl.load(k_weight + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
            normed = tl.where(is_k[:, None], (y * rms * w).to(kind).to(tl.float32), normed)
            if ROTARY > 0:
                w = tl.load(k_weight + partner, mask=dims < D, other=0.0).to(tl.float32)[None, :]
                swapped = tl.where(is_k[:, None], (z * rms * w).to(kind).to(tl.float32), swapped)
        y, z = normed, swapped
    if ROTARY > 0:
        position = tl.load(positions + token)
        angle = cos_sin + position * stride_rope + tl.where(dims < half, dims, dims - half)
        turned = dims < ROTARY
        cos = tl.load(angle, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(angle + half, mask=turned, other=0.0).to(tl.float32)
        sin = tl.where(dims < half, -sin, sin)
        rotated = y * cos[None, :] + z * sin[None, :]
        y = tl.where((is_q | is_k)[:, None] & turned[None, :], rotated, y)
    y = y.to(kind)
    tl.store(out + token * HQ * D + head[:, None] * D + dims[None, :], y, mask=inside & is_q[:, None])
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        kv_head = tl.where(is_k, head - HQ, head - HQ - HKV)
        row = (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
        place = row + tl.where(is_k, 0, stride_value) + kv_head * stride_head
        store = inside & (head >= HQ)[:, None]
        if EIGHT:
            wide = y.to(tl.float32)
            if SCALED:
                unit = tl.load(kv_scales + head - HQ, mask=(head >= HQ) & (head < HQ + 2 * HKV), other=1.0)
                wide = wide / unit[:, None]
            wide = tl.minimum(tl.maximum(wide, -448.0), 448.0)
            tl.store(
                kv_pages + place[:, None] + dims[None, :], wide.to(kv_pages.dtype.element_ty), mask=store
            )
        else:
            tl.store(kv_pages + place[:, None] + dims[None, :], y.to(kv_pages.dtype.element_ty), mask=store)


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
    *,
    pdl: bool = False,
) -> Tensor:
    """``octavo.device.ops.rope_store.rope_store`` on a GPU; rows of qkv, slots of kv_pages are contiguous."""
    num_kv_heads, page_size, head_dim = kv_pages.shape[2:]
    tokens = qkv.shape[0]
    raw = None if isinstance(qkv, Tensor) else qkv
    values = qkv if raw is None else raw.values
    out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=values.device)
    if tokens == 0:
        return out
    heads = 2 if tokens <= 64 else 8  # a decode step has few tokens: more, smaller programs
    pdl = pdl and tokens <= FEW
    launch = {"launch_pdl": True} if pdl else {}
    _rope_store_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        out, values, q_weight, k_weight, cos_sin, positions, kv_pages, slot_mapping, eps,
        kv_scales, None if raw is None else raw.token_scale, None if raw is None else raw.scale,
        values.stride(0), 0 if cos_sin is None else cos_sin.stride(0), *kv_pages.stride()[:4],
        HQ=num_heads, HKV=num_kv_heads, D=head_dim, DPAD=triton.next_power_of_2(head_dim),
        ROTARY=0 if cos_sin is None else cos_sin.shape[1], PAGE=page_size, HEADS=heads,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, PDL=pdl, EIGHT=kv_pages.element_size() == 1,
        SCALED=kv_scales is not None, RAW=raw is not None, num_warps=1 if heads == 2 else 4, **launch,
    )  # fmt: skip
    return out


rope_store_hopper = partial(rope_store, pdl=True)
