"""Mixer blocks by the letter: one sample, one token, one block of a matrix at a time."""

import math

import torch


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x, weight, bias, eps=1e-5):
    """LayerNorm over the last dimension."""
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def mlp(x, p, name):
    return (
        gelu(x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"]) @ p[f"{name}.fc2.weight"].T
        + p[f"{name}.fc2.bias"]
    )


def normed(x, p, name, eps=1e-5):
    return norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps)


def position(p, i, width):
    angle = p / 10000 ** (2 * i / width)
    return math.sin(angle) if i % 2 == 0 else math.cos(angle)


def hyper_mixing(x, p, name):
    """One sample (N, D): every token makes its rows of W1 and W2, head by head."""
    count, width = x.shape
    a1, b1, a2, b2 = (p[f"{name}.{which}"] for which in ("a1", "b1", "a2", "b2"))
    heads, features = a1.shape[0], a1.shape[2]
    mixed = torch.zeros_like(x)
    for h in range(heads):
        own = slice(h * features, (h + 1) * features)
        w1, w2 = [], []
        for n in range(count):
            encoded = torch.tensor([position(n + 1, i, width) for i in range(width)], dtype=x.dtype)
            token = (math.sqrt(width) * x[n] + encoded)[own]
            w1.append(b1[h] @ gelu(a1[h] @ token))
            w2.append(b2[h] @ gelu(a2[h] @ token))
        mixed[:, own] = torch.stack(w2) @ gelu(torch.stack(w1).T @ x[:, own])
    return normed(mixed, p, f"{name}.norm")


def hyper_mixer_block(x, p):
    x = x + hyper_mixing(normed(x, p, "norm1"), p, "mixing")
    return x + mlp(normed(x, p, "norm2"), p, "channels")


def released_hyper_mixer_block(x, p):
    mixed = x + hyper_mixing(normed(x, p, "norm1").T, p, "mixing").T
    return x + mlp(normed(mixed, p, "norm2"), p, "channels")


def mixer_block(x, p):
    x = x + mlp(normed(x, p, "norm1").T, p, "mlp_tokens").T
    return x + mlp(normed(x, p, "norm2"), p, "mlp_channels")


def monarch(left, right):
    """The (S^2, S^2) matrix P R P L P."""
    side = len(left)
    swap = torch.zeros(side**2, side**2, dtype=left.dtype)
    for i in range(side):
        for j in range(side):
            swap[j * side + i, i * side + j] = 1
    return swap @ torch.block_diag(*right) @ swap @ torch.block_diag(*left) @ swap


def matrices(p):
    return [monarch(p[f"m{k}.left"], p[f"m{k}.right"]) for k in (1, 2, 3, 4)]


def filled(x, rows, columns):
    """The matrix in the upper left corner of one of zeros."""
    out = torch.zeros(rows, columns, dtype=x.dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def monarch_block(x, p):
    count, width = x.shape
    m1, m2, m3, m4 = matrices(p)
    u = filled(normed(x, p, "norm1"), len(m1), width)
    x = x + (m2 @ (p["token_gate"].T * (m1 @ u)))[:count]
    u = filled(normed(x, p, "norm2"), count, len(m3))
    return x + (torch.relu(p["channel_gate"] * (u @ m3.T)) @ m4.T)[:, :width]


def released_monarch_block(x, p):
    m1, m2, m3, m4 = matrices(p)
    mixed = m2 @ (p["token_gate"].T * (m1 @ x))
    y = torch.relu(p["channel_gate"] * (mixed @ m3.T)) @ m4.T
    return normed(y + mixed, p, "norm")


def across_regions(x, weight, regions, head):
    """One map (H, W, C): at each offset the values of all regions, for `head` channels together."""
    height, width, channels = x.shape
    rows, columns = height // regions, width // regions
    out = torch.zeros_like(x)
    for c in range(0, channels, head):
        for i in range(rows):
            for j in range(columns):
                places = [
                    (r * rows + i, s * columns + j, c + k)
                    for k in range(head)
                    for r in range(regions)
                    for s in range(regions)
                ]
                vector = torch.stack([x[place] for place in places])
                for place, value in zip(places, weight @ vector / len(places), strict=True):
                    out[place] = value
    return out


def depthwise(x, weight):
    """One map (H, W, C), a kernel a channel, zeros around it."""
    height, width, channels = x.shape
    size = weight.shape[-1]
    edge = size // 2
    padded = torch.zeros(height + 2 * edge, width + 2 * edge, channels, dtype=x.dtype)
    padded[edge : edge + height, edge : edge + width] = x
    out = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            out = out + padded[i : i + height, j : j + width] * weight[:, 0, i, j]
    return out


def batch_norm(x, p, name):
    """BatchNorm in evaluation."""
    scale = p[f"{name}.weight"] / torch.sqrt(p[f"{name}.running_var"] + 1e-5)
    return (x - p[f"{name}.running_mean"]) * scale + p[f"{name}.bias"]


def ra_block(x, p, regions, head):
    """One map (H, W, C) in evaluation."""
    x = x + depthwise(x, p["near.weight"])
    u = normed(x, p, "norm1", 1e-6)
    a = depthwise(u @ p["mixing.expand.weight"].T, p["mixing.near.weight"])
    a = batch_norm(across_regions(a, p["mixing.mix.weight"], regions, head), p, "mixing.norm")
    b = batch_norm(u @ p["mixing.gate.weight"].T, p, "mixing.gate_norm")
    x = x * p.get("scale1", 1.0) + (a * b) @ p["mixing.project.weight"].T
    hidden = normed(x, p, "norm2", 1e-6) @ p["channels.0.weight"].T
    star = p["channels.1.scale"] * torch.relu(hidden) ** 2 + p["channels.1.bias"]
    return x * p.get("scale2", 1.0) + star @ p["channels.2.weight"].T


def fuse(name, tokens, present):
    """One sample's aligned tokens (M, N, D) fused over the modalities that it has."""
    there = [x for x, has in zip(tokens, present, strict=True) if has]
    if not there:
        return torch.zeros_like(tokens[0])
    if name == "mean":
        return sum(there) / len(there)
    out = there[0]
    for x in there[1:]:
        out = {"max": torch.maximum(out, x), "sum": out + x, "product": out * x}[name]
    return out


def gated_unit(x, y, p):
    """The bimodal unit of one token: z h_x + (1 - z) h_y."""
    h_x, h_y = (
        torch.tanh(p[f"features.{m}.weight"] @ v + p[f"features.{m}.bias"]) for m, v in ((0, x), (1, y))
    )
    gates = p["gates.weight"] @ torch.cat([x, y]) + p["gates.bias"]
    z = torch.sigmoid(gates[: len(x)] - gates[len(x) :])
    return z * h_x + (1 - z) * h_y
