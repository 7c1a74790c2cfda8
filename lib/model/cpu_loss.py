"""
The output head and its cross-entropy on CPU, a chunk of tokens at a time.
"""

import torch

CHUNK = 512  # tokens
buffers = {}  # reusable memory for the logits of a chunk, by vocabulary size and dtype


def logits_buffer(vocab_size, dtype):
    if (vocab_size, dtype) not in buffers:
        buffers[vocab_size, dtype] = torch.empty(CHUNK, vocab_size, dtype=dtype)
    return buffers[vocab_size, dtype]


def chunked_cross_entropy(x, weight, targets):
    """F.cross_entropy(x @ weight.T, targets): x (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64. Returns a
    float32 scalar in nats per token."""
    return ChunkedCrossEntropy.apply(x, weight, targets)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The logits of 2,048 tokens take 400 MB, and on CPU allocating and sweeping them costs more than the products.

    Here all chunks of all steps share one buffer, and the gradient, softmax - onehot, is computed in the forward.
    Targets below 0 are ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        w, count = weight.to(x.dtype), (targets >= 0).sum()
        loss, ctx.dx, ctx.dw = x.new_zeros((), dtype=torch.float32), torch.zeros_like(x), torch.zeros_like(w)
        buffer = logits_buffer(len(w), x.dtype)
        for xs, ys, dxs in zip(x.split(CHUNK), targets.split(CHUNK), ctx.dx.split(CHUNK), strict=True):
            tokens = torch.arange(len(xs))
            p = torch.mm(xs, w.t(), out=buffer[: len(xs)])
            p = torch.softmax(p, dim=1, out=p)
            loss -= p[tokens, ys.clamp(min=0)].float().clamp(min=1e-38).log()[ys >= 0].sum()
            if ctx.needs_input_grad[0]:
                p[tokens, ys.clamp(min=0)] -= 1
                p[tokens[ys < 0]] = 0  # by index: a mask would sweep all of p
                torch.mm(p, w, out=dxs)
                ctx.dw.addmm_(p.t(), xs)
        ctx.dx /= count
        ctx.dw /= count
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        return ctx.dx.mul_(grad), ctx.dw.mul_(grad).float(), None
