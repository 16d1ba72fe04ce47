import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.models.packable import FUSED

COMPARE = """
import json, sys, torch
from pathlib import Path
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM
from rlhf.config.tuning import FULL
from rlhf.models import footprint, kernels
from rlhf.zero import group
group.on_gpu = lambda: True
kind, folder = sys.argv[1], Path(sys.argv[2])
small = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0)
torch.manual_seed(0)
config = AutoConfig.for_model(kind, **small)
plain = AutoModelForCausalLM.from_config(config).cuda()
plain.save_pretrained(folder)
for name, weight in plain.named_parameters():
    if weight.dim() == 1:
        torch.nn.init.uniform_(weight, 0.5, 1.5)
before = {type(part) for part in plain.modules()}
kernels.fuse(folder)
fused = AutoModelForCausalLM.from_config(config).cuda()
fused.load_state_dict(plain.state_dict())
ids = torch.randint(3, 300, (2, 24), device="cuda")
gaps = []
for model in (plain, fused):
    logits = model(input_ids=ids, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    gaps.append((logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
(a, of_a), (b, of_b) = gaps
body = fused.bfloat16().base_model
kept = {weight.untyped_storage().data_ptr(): 0 for weight in (*fused.parameters(), *fused.buffers())}
def pack(tensor):
    kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
    held.append(tensor)
    return tensor
held = []
mask = torch.ones(8, 96, dtype=torch.long, device="cuda")
mask[0, :3] = 0
fused.enable_input_require_grads()
with saved_tensors_hooks(pack, lambda tensor: tensor):
    states = body(input_ids=torch.randint(3, 300, (8, 96), device="cuda"), attention_mask=mask, use_cache=False)
shape = footprint.Architecture.of(folder)
said = footprint.saved(shape, footprint.learned(shape, FULL, scores=False), 2, 8, 96)
print(json.dumps({
    "classes": sorted(part.__name__ for part in {type(part) for part in fused.modules()} - before),
    "logits": float((a - b).abs().max() / a.abs().max()),
    "gradients": max(float((of_a[name] - of_b[name]).norm() / of_a[name].norm().clamp(min=1e-6)) for name in of_a),
    "kept": sum(kept.values()), "said": said,
}))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FUSED)
def test_fused_kernels_compute_what_transformers_does(kind: str, tmp_path: Path) -> None:
    """And keep for the backward pass what memory is predicted by.

    In a process of its own, since a type's kernels are those of the whole process.
    """
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, kind, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["classes"], "no module was replaced"
    assert found["logits"] < 1e-4
    assert found["gradients"] < 1e-3
    # Gemma 2's attention is computed in steps.
    assert found["said"] == pytest.approx(found["kept"], rel=0.1 if kind != "gemma2" else 0.3)
