"""Cell networks by the letter: one edge, one operation, one pooling window at a time.

Parameters and running statistics come as a dict by name; BatchNorm writes the moved statistics back into it.
Of an edge's operation they are `cells.<k>.edge.<e>.<op>.<part>`, of all else the names of our modules.
"""

import math

import torch
import torch.nn.functional as F


def edges(inputs, nodes):
    """(source, target) in the order of alpha's rows."""
    found = []
    for target in range(inputs, inputs + nodes):
        for source in range(target):
            found.append((source, target))
    return found


def norm(x, p, name, training):
    """BatchNorm over samples and positions; affine where there is a weight. Moves the running statistics."""
    if training:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
        with torch.no_grad():
            p[f"{name}.running_mean"] = 0.9 * p[f"{name}.running_mean"] + 0.1 * mean
            p[f"{name}.running_var"] = 0.9 * p[f"{name}.running_var"] + 0.1 * var * count / (count - 1)
    else:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    y = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    if f"{name}.weight" in p:
        y = y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
    return y


def windows(x, stride, fill):
    """(9, B, C, H', W'): the neighbours of every strided position, `fill` outside."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    return torch.stack(
        [padded[:, :, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    )


def max_pool(x, stride):
    return windows(x, stride, -math.inf).max(0).values


def avg_pool(x, stride):
    return windows(x, stride, 0.0).sum(0) / windows(torch.ones_like(x), stride, 0.0).sum(0)


def factorized_reduce(x, first, second):
    h = F.relu(x)
    return torch.cat([F.conv2d(h[:, :, ::2, ::2], first), F.conv2d(h[:, :, 1::2, 1::2], second)], 1)


def separable(x, depthwise, pointwise, stride, dilation):
    size = depthwise.shape[-1]
    h = F.conv2d(
        F.relu(x), depthwise, None, stride, dilation * (size // 2), dilation, groups=depthwise.shape[0]
    )
    return F.conv2d(h, pointwise)


def mixed_op(x, op, p, name, stride, training, noise, bench):
    """One candidate operation of a supernet's edge, BatchNorm without affine parameters."""
    if op == "none":
        return x[:, :, ::stride, ::stride] * 0.0
    if op == "noise":
        return noise[name]
    if op in ("max_pool_3x3", "avg_pool_3x3"):
        h = (max_pool if op.startswith("max") else avg_pool)(x, stride)
        return h if bench else norm(h, p, f"{name}.norm", training)
    if op == "skip_connect":
        if stride == 1:
            return x
        return norm(
            factorized_reduce(x, p[f"{name}.first"], p[f"{name}.second"]), p, f"{name}.norm", training
        )
    if op.startswith("nor_conv"):
        weight = p[f"{name}.weight"]
        return norm(F.conv2d(F.relu(x), weight, padding=weight.shape[-1] // 2), p, f"{name}.norm", training)
    repeats, dilation = (2, 1) if op.startswith("sep") else (1, 2)
    for r in range(repeats):
        depthwise, pointwise = p[f"{name}.depthwise.{r}"], p[f"{name}.pointwise.{r}"]
        x = norm(
            separable(x, depthwise, pointwise, stride if r == 0 else 1, dilation),
            p,
            f"{name}.norms.{r}",
            training,
        )
    return x


def shuffle(x, groups):
    per_group = x.shape[1] // groups
    return torch.stack([x[:, (c % groups) * per_group + c // groups] for c in range(x.shape[1])], 1)


def mixed_cell(states, weights, edge_weights, edge_ops, nodes, reduction, partial, p, name, training, extra):
    """The nodes of a supernet's cell; `extra` holds noise, drop-path factors by edge, and `bench`."""
    states, inputs = list(states), len(states)
    numbered = edges(inputs, nodes)
    for target in range(inputs, inputs + nodes):
        node = 0
        for e, (source, to) in enumerate(numbered):
            if to != target:
                continue
            stride = 2 if reduction and source < inputs else 1
            x = states[source]
            count = x.shape[1] // partial
            active, rest = x[:, :count], x[:, count:]
            mixed = 0
            for k, op in enumerate(edge_ops[e]):
                h = mixed_op(
                    active, op, p, f"{name}.edge.{e}.{op}", stride, training, extra["noise"], extra["bench"]
                )
                mixed = mixed + weights[e, k] * h
            if partial > 1:
                if stride == 2:
                    rest = F.max_pool2d(rest, 2, 2)
                mixed = shuffle(torch.cat([mixed, rest], 1), partial)
            if edge_weights is not None:
                mixed = edge_weights[e] * mixed
            if extra["kept"] is not None:
                mixed = mixed * extra["kept"][f"{name}.edge.{e}"]
            node = node + mixed
        states.append(node)
    return states[inputs:]


def stem(image, p, training):
    """The two tensors that the first cell reads; the second is the first without a second stem stage."""
    if "skeleton.stem.0.3.weight" not in p:
        h = F.conv2d(image, p["skeleton.stem.0.0.weight"], padding=1)
        h = norm(h, p, "skeleton.stem.0.1", training)
        return h, h
    h = norm(F.conv2d(image, p["skeleton.stem.0.0.weight"], None, 2, 1), p, "skeleton.stem.0.1", training)
    h = F.conv2d(F.relu(h), p["skeleton.stem.0.3.weight"], None, 2, 1)
    first = norm(h, p, "skeleton.stem.0.4", training)
    h = F.conv2d(F.relu(first), p["skeleton.stem.1.1.weight"], None, 2, 1)
    return first, norm(h, p, "skeleton.stem.1.2", training)


def preprocess(before, last, p, name, training):
    if f"{name}.before.first.weight" in p:
        h = factorized_reduce(before, p[f"{name}.before.first.weight"], p[f"{name}.before.second.weight"])
        h = norm(h, p, f"{name}.before.norm", training)
    else:
        h = F.conv2d(F.relu(before), p[f"{name}.before.1.weight"])
        h = norm(h, p, f"{name}.before.2", training)
    other = F.conv2d(F.relu(last), p[f"{name}.last.1.weight"])
    return [h, norm(other, p, f"{name}.last.2", training)]


def darts_body(image, p, depth, training, cell):
    """Outputs of all cells; `cell(k, reduction, states, name)` gives one."""
    before, last = stem(image, p, training)
    outputs = []
    for k in range(depth):
        name = f"skeleton.cells.{k}"
        states = preprocess(before, last, p, f"{name}.preprocess", training)
        out = cell(k, k in (depth // 3, 2 * depth // 3), states, name)
        before, last = last, out
        outputs.append(out)
    return outputs


def bench_201_body(image, p, depth, training, cell):
    """Outputs of all cells and residual blocks of NAS-Bench-201."""
    h = norm(F.conv2d(image, p["skeleton.stem.0.weight"], padding=1), p, "skeleton.stem.1", training)
    per_stage, outputs = (depth - 2) // 3, []
    for k in range(depth):
        name = f"skeleton.cells.{k}"
        if k in (per_stage, 2 * per_stage + 1):
            pooled = (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
            shortcut = F.conv2d(pooled, p[f"{name}.shortcut.1.weight"])
            h = F.conv2d(F.relu(h), p[f"{name}.first.1.weight"], None, 2, 1)
            h = norm(h, p, f"{name}.first.2", training)
            h = F.conv2d(F.relu(h), p[f"{name}.second.1.weight"], None, 1, 1)
            h = shortcut + norm(h, p, f"{name}.second.2", training)
        else:
            h = cell(k, False, [h], name)
        outputs.append(h)
    return outputs


def pooled(outputs, p, training, bench):
    """(B, D)."""
    h = outputs[-1]
    if bench:
        h = F.relu(norm(h, p, "skeleton.end.0", training))
    return h.mean((2, 3))


def relaxed(logits, relaxation, noise, temperature):
    """(E, K) mixing weights, one entry at a time."""
    rows = []
    for e in range(logits.shape[0]):
        if relaxation == "sigmoid":
            rows.append(1 / (1 + torch.exp(-logits[e])))
            continue
        z = logits[e] if noise is None else (logits[e] + noise[e]) / temperature
        rows.append(torch.exp(z) / torch.exp(z).sum())
    return torch.stack(rows)


def edge_softmax(beta, inputs, nodes):
    """(E,) softmax over the edges into each node."""
    parts, start = [], 0
    for target in range(inputs, inputs + nodes):
        part = torch.exp(beta[start : start + target])
        parts.append(part / part.sum())
        start += target
    return torch.cat(parts)


def supernet(image, p, *, depth, nodes, edge_ops, partial, relaxation, temperature, training, extra):
    """The embedding and the outputs of all cells."""
    bench = extra["bench"]
    inputs = 1 if bench else 2
    weights, edge_weights = {}, {}
    for kind in edge_ops:
        noise = extra["gumbel"].get(kind)
        weights[kind] = relaxed(p[f"arch.alpha_{kind}"], relaxation, noise, temperature)
        edge_weights[kind] = edge_softmax(p[f"arch.beta_{kind}"], inputs, nodes) if partial > 1 else None

    def cell(k, reduction, states, name):
        kind = "cell" if bench else "reduce" if reduction else "normal"
        found = mixed_cell(
            states,
            weights[kind],
            edge_weights[kind],
            edge_ops[kind],
            nodes,
            reduction,
            partial,
            p,
            name,
            training,
            extra,
        )
        return found[-1] if bench else torch.cat(found, 1)

    outputs = (bench_201_body if bench else darts_body)(image, p, depth, training, cell)
    return pooled(outputs, p, training, bench), outputs


def found_op(x, op, p, name, stride, training):
    """One operation of a found network: pools without BatchNorm, all others with an affine one."""
    if op in ("max_pool_3x3", "avg_pool_3x3"):
        return (max_pool if op.startswith("max") else avg_pool)(x, stride)
    if op == "skip_connect":
        if stride == 1:
            return x
        h = factorized_reduce(x, p[f"{name}.first.weight"], p[f"{name}.second.weight"])
        return norm(h, p, f"{name}.norm", training)
    if op.startswith("nor_conv"):
        weight = p[f"{name}.1.weight"]
        return norm(F.conv2d(F.relu(x), weight, padding=weight.shape[-1] // 2), p, f"{name}.2", training)
    if op.startswith("sep"):
        for r in range(2):
            h = separable(x, p[f"{name}.{r}.1.weight"], p[f"{name}.{r}.2.weight"], stride if r == 0 else 1, 1)
            x = norm(h, p, f"{name}.{r}.3", training)
        return x
    return norm(
        separable(x, p[f"{name}.1.weight"], p[f"{name}.2.weight"], stride, 2), p, f"{name}.3", training
    )


def found(image, p, cells, *, depth, training, drop_path_on, kept, auxiliary):
    """The embedding, the outputs of all cells and the auxiliary vector.

    Args:
        image: (B, 3, H, W).
        p: tensors by name.
        cells: by kind, for each node a list of (op, source).
        depth: number of cells.
        training: whether BatchNorm reads the batch.
        drop_path_on: `edges` or `nodes`.
        kept: gives the next (B, 1, 1, 1) factors of drop-path, or None without it.
        auxiliary: whether the tower is there.
    """
    bench = "cell" in cells

    def cell(k, reduction, states, name):
        states, inputs = dict(enumerate(states)), len(states)
        present = []
        for position, node in enumerate(cells["cell" if bench else "reduce" if reduction else "normal"]):
            total, used = None, 0
            for op, source in node:
                if op == "none" or source not in states:
                    continue
                place = f"{position}" if bench else f"{position + inputs}"
                stride = 2 if reduction and source < inputs else 1
                h = found_op(states[source], op, p, f"{name}.ops.{place}.{used}", stride, training)
                used += 1
                identity = op == "skip_connect" and stride == 1
                if kept is not None and drop_path_on == "edges" and not identity:
                    h = h * kept()
                total = h if total is None else total + h
            if total is None:
                if not bench:
                    continue
                total = states[0] * 0.0
            elif kept is not None and drop_path_on == "nodes":
                total = total * kept()
            states[position + inputs] = total
            present.append(total)
        return present[-1] if bench else torch.cat(present, 1)

    outputs = (bench_201_body if bench else darts_body)(image, p, depth, training, cell)
    vector = None
    if auxiliary and training:
        h = F.relu(outputs[2 * depth // 3])
        size = h.shape[-1]
        stride = {8: 3, 7: 2, 6: 1}[size]
        corners = [[h[:, :, i : i + 5, j : j + 5].mean((2, 3)) for j in (0, stride)] for i in (0, stride)]
        h = torch.stack([torch.stack(row, -1) for row in corners], -2)
        h = F.relu(norm(F.conv2d(h, p["auxiliary.layers.2.weight"]), p, "auxiliary.layers.3", training))
        h = F.conv2d(h, p["auxiliary.layers.5.weight"])
        if "auxiliary.layers.6.weight" in p:
            h = norm(h, p, "auxiliary.layers.6", training)
        vector = F.relu(h).flatten(1)
    return pooled(outputs, p, training, bench), outputs, vector


def derive_cell(weights, edge_ops, inputs, nodes, rule, threshold):
    """For each node a list of (op, source), by trying all sources and operations.

    Weights are python floats; scores are compared to 12 decimals, earlier ones win.
    """
    found, margins = [], []
    for target in range(inputs, inputs + nodes):
        scored = []
        for e, (source, to) in enumerate(edges(inputs, nodes)):
            if to != target:
                continue
            options = []
            for k, op in enumerate(edge_ops[e]):
                if op == "none" and rule != "argmax":
                    continue
                options.append((round(weights[e][k], 12), k, op))
            options.sort(key=lambda option: (-option[0], option[1]))
            scored.append((source, options))
        node = []
        if rule == "argmax":
            node = [(options[0][2], source) for source, options in scored]
        elif rule == "threshold_edge":
            for source, options in scored:
                node += [(w, source, k, op) for w, k, op in options[:2] if w >= threshold]
            node.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
            node = [(op, source) for _, source, _, op in node]
        else:
            ranked = sorted(scored, key=lambda entry: (-entry[1][0][0], entry[0]))
            third = ranked[2][1][0][0] if len(ranked) > 2 else 0.0
            margins.append(ranked[1][1][0][0] - third if len(ranked) > 1 else ranked[0][1][0][0] - third)
            for source, options in ranked[:2]:
                if rule == "darts" or options[0][0] >= threshold:
                    node.append((options[0][2], source))
        found.append(node)
    return found, margins
