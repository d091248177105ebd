"""Models that transformers computes, in the whole engine on a GPU: greedy tokens equal the CPU's, with graphs and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASE, build, run, some_prompts

pytestmark = pytest.mark.gpu

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25}),
    "exaone4": (
        "Exaone4",
        {"sliding_window": 24, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "head_dim": 64},
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "dots1": (  # experts: without graphs
        "Dots1",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_greedy_equals_cpu(name: str, tmp_path: Path) -> None:
    import transformers

    family, extra = ROWS[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, "hidden_size": 256, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(tmp_path)
    prompts = some_prompts(12, 90)
    expected = run(build(tmp_path, device="cpu", model_impl="transformers"), prompts, 24)
    torch.backends.cuda.matmul.allow_tf32 = False
    core = build(tmp_path, device="cuda", model_impl="transformers")
    assert "transformers" in core.info.architecture
    assert run(core, prompts, 24) == expected, "graphs"
    assert (
        run(build(tmp_path, device="cuda", model_impl="transformers", enforce_eager=True), prompts, 24)
        == expected
    )
