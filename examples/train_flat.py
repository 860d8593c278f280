"""The training loop of `qwen_scope.train`, flat: one layer, dense autograd, nothing saved on the way.

The real one, `src/qwen_scope/train/loop.py`, does the same for all layers at once, without a (tokens, d_sae) tensor and
with checkpoints. Run: python examples/train_flat.py [steps]
"""

import sys

import torch

from qwen_scope import load_scope
from qwen_scope.model import HookPoint, capture, measure_counted
from qwen_scope.sae import Identity, TopK, fingerprint
from qwen_scope.text import Corpus, TokenRows

steps, layer, d_sae, k, k_aux, lr = int((sys.argv[1:] or ["50"])[0]), 3, 1024, 32, 64, 3e-3
scope, point = load_scope("lab"), HookPoint(layer)
rows = iter(TokenRows(Corpus("lab"), scope.tokenizer, context_length=128, batch_size=16))
counted = measure_counted(scope.model, scope.tokenizer, rows)


def next_batch() -> torch.Tensor:
    h = capture(scope.model, ids := next(rows), [point])[point]
    return h[counted.keep(h, point, ids)]  # without first and special tokens, and sinks at any position


x = next_batch()
scale = (x.shape[1] / x.square().sum(1).mean()).sqrt()  # mean squared norm = d_model; folded away at the end
W_dec = torch.randn(d_sae, x.shape[1], generator=torch.manual_seed(0))
W_dec = (W_dec / W_dec.norm(dim=1, keepdim=True)).requires_grad_()
W_enc, b_enc = (W_dec.detach() / 2).requires_grad_(), torch.zeros(d_sae, requires_grad=True)  # real: a fitted factor
b_dec = (x.mean(0) * scale).requires_grad_()  # the real one takes the geometric median
optimiser, silent = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr, (0.5, 0.95), 6.25e-10), torch.zeros(d_sae)
for step in range(steps):
    x = next_batch() * scale
    pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
    top = pre.topk(k)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    x_hat = acts @ W_dec + b_dec
    variance = (x - x.mean(0)).square().sum()
    fvu = (x - x_hat).square().sum() / variance
    dead, aux = silent > 10 * len(x), torch.tensor(0.0)
    if dead.any():  # AuxK: the dead features reconstruct what is left over; both biases b_dec are detached
        spare = (((x - b_dec.detach()) @ W_enc.T + b_enc).relu() * dead).topk(k_aux)
        e_hat = torch.zeros_like(pre).scatter(1, spare.indices, spare.values) @ W_dec
        aux = ((x - x_hat).detach() - e_hat).square().sum() / variance
    optimiser.param_groups[0]["lr"] = lr * min(1, 2 * (steps - step) / steps)  # the last half falls to zero
    optimiser.zero_grad()
    (fvu + aux / 32).backward()
    W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
    torch.nn.utils.clip_grad_norm_([W_enc, W_dec, b_enc, b_dec], 1.0)
    optimiser.step()
    W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
    silent = torch.where((acts > 0).any(0), 0, silent + len(x))

with torch.no_grad():  # the released encoders read the raw residual: fold pre-bias and scale into the biases
    weights = {"W_enc": W_enc, "W_dec": W_dec.T, "b_enc": (b_enc - W_enc @ b_dec) / scale, "b_dec": b_dec / scale}
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
sae = TopK(**weights, k=k, hook_point=str(point), identity=Identity("flat", layer, fingerprint(**weights)))
print(f"{sae}\nFVU of the last batch {fvu:.3f}, dead {float(dead.float().mean()):.1%}")
