"""BM-NAS (arXiv 2104.09379) written down slowly: one sample, one edge, one op at a time, in any dtype.

Everything works on a flat dictionary `p` of named tensors, so it knows nothing of anybody's modules:

    reshape.<feature>.        weight (C, C_i)  bias (C)  bn_weight (C)  bn_bias (C)
    cell.<i>.step.<m>.        attention.ln_weight (C, L)  attention.ln_bias (C, L)
                              linear_glu.weight (2C, 2C)  .bias (2C)  .bn_weight (2C)  .bn_bias (2C)
                              concat_fc.weight (C, 2C)  .bias (C)  .bn_weight (C)  .bn_bias (C)
    cell.<i>.out.             weight (C, m_in * C)  bias (C)  bn_weight (C)  bn_bias (C)
    cell.<i>.                 ln_weight (C, L)  ln_bias (C, L)
    head.                     ln_weight (m_out * C, L)  ln_bias (m_out * C, L)
    alpha  beta  gamma        logits of the hypernet

Protocol "paper" has no attention.*, no LayerNorms, linear_glu.weight_x (C, C) and .weight_y (C, C) in place
of the four tensors, concat_fc without bn_*; its out has m_in = M. With `training=False` each BatchNorm also
needs bn_running_mean and bn_running_var. Matrices are [out, in]; the columns of an op on [x; y] read x first.

Logits, with E = sum_i (n + i) edges into cells and I = sum_m (2 + m) edges inside a cell:

    shared      alpha (E, 2)   beta (N, I, 2)   columns (none, skip)
    distinct    alpha (2, E)   beta (N, 2, I)   rows (x, y) and (first operand, second operand)
    both        gamma (N, M, K)

Dropout is absent: compare with its probability set to 0.
"""

import math

import torch

EPS = 1e-5
OPS = {
    "released_code": ("sum", "attention", "linear_glu", "concat_fc"),
    "paper": ("zero", "sum", "attention", "linear_glu", "concat_fc"),
}
NONE, SKIP = 0, 1


# ---- layers ----------------------------------------------------------------------------------------


def linear(x, weight, bias=None):
    """A 1x1 convolution of (B, C_in, L): `weight` (C_out, C_in) applied to each position of each sample."""
    samples = []
    for sample in x:
        columns = []
        for position in range(x.shape[2]):
            column = weight @ sample[:, position]
            columns.append(column if bias is None else column + bias)
        samples.append(torch.stack(columns, dim=1))
    return torch.stack(samples)


def batch_norm(x, weight, bias, *, training=True, running_mean=None, running_var=None):
    """Each channel normalised over (B, L): by its own statistics in training, else by the given ones."""
    channels = []
    for c in range(x.shape[1]):
        values = x[:, c, :]  # (B, L)
        if training:
            mean = values.sum() / values.numel()
            var = ((values - mean) ** 2).sum() / values.numel()
        else:
            mean, var = running_mean[c], running_var[c]
        channels.append((values - mean) / torch.sqrt(var + EPS) * weight[c] + bias[c])
    return torch.stack(channels, dim=1)


def layer_norm(x, weight, bias):
    """Each sample normalised over all of (C, L), then scaled and shifted entry by entry."""
    samples = []
    for sample in x:
        mean = sample.sum() / sample.numel()
        var = ((sample - mean) ** 2).sum() / sample.numel()
        samples.append((sample - mean) / torch.sqrt(var + EPS) * weight + bias)
    return torch.stack(samples)


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def softmax(values):
    """The weights of a 1-D tensor of logits."""
    powers = [torch.exp(value - values.max().detach()) for value in values]
    return [power / sum(powers) for power in powers]


def reshape(
    feature, weight, bias, bn_weight, bn_bias, length, *, training=True, running_mean=None, running_var=None
):
    """(B, C_i, L_i) with L_i in {1, L} -> (B, C, L): 1x1 convolution, BatchNorm, ReLU.

    A vector becomes L identical columns first.
    """
    if feature.shape[2] == 1:
        feature = torch.cat([feature] * length, dim=2)
    if feature.shape[2] != length:
        raise ValueError(f"reshape needs 1 or {length} positions, got {feature.shape[2]}")
    projected = linear(feature, weight, bias)
    return relu(
        batch_norm(
            projected,
            bn_weight,
            bn_bias,
            training=training,
            running_mean=running_mean,
            running_var=running_var,
        )
    )


# ---- primitive ops, (x, y) -> (B, C, L) ------------------------------------------------------------


def zero(x, y):
    """Eq. 4 of the paper."""
    return torch.zeros_like(x)


def sum_(x, y):
    """Eq. 5."""
    return x + y


def attention(x, y):
    """Eq. 6: softmax(x y^T / sqrt(C)) y over positions, queries from x, keys and values from y."""
    batch, channels, length = x.shape
    samples = []
    for b in range(batch):
        columns = []
        for query in range(length):
            scores = torch.stack(
                [x[b, :, query] @ y[b, :, key] / math.sqrt(channels) for key in range(length)]
            )
            weights = softmax(scores)
            columns.append(sum(weights[key] * y[b, :, key] for key in range(length)))
        samples.append(torch.stack(columns, dim=1))
    return torch.stack(samples)


def attention_released(x, y, ln_weight, ln_bias):
    return layer_norm(attention(x, y), ln_weight, ln_bias)


def linear_glu_paper(x, y, weight_x, weight_y):
    """Eq. 7."""
    return linear(x, weight_x) * sigmoid(linear(y, weight_y))


def linear_glu_released(x, y, weight, bias, bn_weight, bn_bias, **norm):
    """2C -> 2C on [x; y], BatchNorm, first C channels times the sigmoid of the last C."""
    channels = x.shape[1]
    mixed = batch_norm(linear(torch.cat([x, y], dim=1), weight, bias), bn_weight, bn_bias, **norm)
    return mixed[:, :channels] * sigmoid(mixed[:, channels:])


def concat_fc_paper(x, y, weight, bias):
    """Eq. 8."""
    return relu(linear(torch.cat([x, y], dim=1), weight, bias))


def concat_fc_released(x, y, weight, bias, bn_weight, bn_bias, **norm):
    """Eq. 8 with a BatchNorm before the ReLU."""
    return relu(batch_norm(linear(torch.cat([x, y], dim=1), weight, bias), bn_weight, bn_bias, **norm))


def apply_op(op, x, y, p, prefix, *, protocol, training=True):
    """The op of that name with its tensors `<prefix>.<op>.*` of `p`."""
    own = f"{prefix}.{op}"
    if op == "zero":
        return zero(x, y)
    if op == "sum":
        return sum_(x, y)
    if op == "attention" and protocol == "paper":
        return attention(x, y)
    if op == "attention":
        return attention_released(x, y, p[f"{own}.ln_weight"], p[f"{own}.ln_bias"])
    if op == "linear_glu" and protocol == "paper":
        return linear_glu_paper(x, y, p[f"{own}.weight_x"], p[f"{own}.weight_y"])
    if op == "linear_glu":
        return linear_glu_released(x, y, **_conv_and_norm(p, own, training))
    if op == "concat_fc" and protocol == "paper":
        return concat_fc_paper(x, y, p[f"{own}.weight"], p[f"{own}.bias"])
    if op == "concat_fc":
        return concat_fc_released(x, y, **_conv_and_norm(p, own, training))
    raise ValueError(f"no op {op!r} in {OPS[protocol]}")


def _conv_and_norm(p, prefix, training):
    tensors = {name: p[f"{prefix}.{name}"] for name in ("weight", "bias", "bn_weight", "bn_bias")}
    if training:
        return tensors | {"training": True}
    return tensors | {
        "training": False,
        "running_mean": p[f"{prefix}.bn_running_mean"],
        "running_var": p[f"{prefix}.bn_running_var"],
    }


# ---- networks --------------------------------------------------------------------------------------


def hypernet(
    features,
    p,
    *,
    num_cells,
    num_steps,
    channels,
    length,
    cell_outputs,
    head_cells,
    protocol,
    pairing,
    relaxation="softmax",
    training=True,
):
    """All candidates at once: the embedding (B, m_out * C * L) and the list of cell outputs (B, C, L).

    `cell_outputs` is m_in, `head_cells` m_out. The paper's protocol ignores m_in: all M steps leave a cell.
    """
    _check(protocol, pairing)
    relax = {"softmax": softmax, "sigmoid": sigmoids}[relaxation]
    reshaped = [
        reshape(features[name], length=length, **_conv_and_norm(p, f"reshape.{name}", training))
        for name in features
    ]
    cells = []
    row = 0
    for i in range(num_cells):
        sources = reshaped + cells
        if pairing == "shared":
            x = y = _sum_of_edges(sources, p["alpha"][row : row + len(sources)], relax)
        else:
            x = _mixture(sources, p["alpha"][0, row : row + len(sources)], relax)
            y = _mixture(sources, p["alpha"][1, row : row + len(sources)], relax)
        row += len(sources)

        states = [x, y]
        inner_row = 0
        for m in range(num_steps):
            here = slice(inner_row, inner_row + len(states))
            if pairing == "shared":
                first = second = _sum_of_edges(states, p["beta"][i, here], relax)
            else:
                first = _mixture(states, p["beta"][i, 0, here], relax)
                second = _mixture(states, p["beta"][i, 1, here], relax)
            inner_row += len(states)
            weights = relax(p["gamma"][i, m])
            step = torch.zeros_like(x)
            for weight, op in zip(weights, OPS[protocol], strict=True):
                prefix = f"cell.{i}.step.{m}"
                step = step + weight * apply_op(
                    op, first, second, p, prefix, protocol=protocol, training=training
                )
            states.append(step)
        cells.append(_cell_end(states, p, i, cell_outputs, protocol, training))
        assert cells[-1].shape[1:] == (channels, length)
    return _head(cells[-head_cells:], p, protocol), cells


def found_network(
    features, p, genotype, *, channels, length, cell_outputs, head_cells, protocol, training=True
):
    """The same for one genotype, a list of (name of x, name of y, [(first, second, op), ...]) for each cell.

    A name is a feature or "cell.<i>"; first and second are positions in [x, y, s_0, ..]. Only the features
    that a cell names are reshaped, so only these need tensors in `p`.
    """
    _check(protocol)
    known = {}
    cells = []
    for i, (x_name, y_name, steps) in enumerate(genotype):
        for name in (x_name, y_name):
            if name not in known:
                tensors = _conv_and_norm(p, f"reshape.{name}", training)
                known[name] = reshape(features[name], length=length, **tensors)
        states = [known[x_name], known[y_name]]
        for m, (first, second, op) in enumerate(steps):
            prefix = f"cell.{i}.step.{m}"
            states.append(
                apply_op(op, states[first], states[second], p, prefix, protocol=protocol, training=training)
            )
        cells.append(_cell_end(states, p, i, cell_outputs, protocol, training))
        assert cells[-1].shape[1:] == (channels, length)
        known[f"cell.{i}"] = cells[-1]
    return _head(cells[-head_cells:], p, protocol), cells


def _check(protocol, pairing="shared"):
    if protocol not in OPS:
        raise ValueError(f"protocol is one of {list(OPS)}, got {protocol!r}")
    if pairing not in ("shared", "distinct"):
        raise ValueError(f"pairing is 'shared' or 'distinct', got {pairing!r}")


def sigmoids(values):
    """Each of a 1-D tensor of logits for itself."""
    return [sigmoid(value) for value in values]


def _sum_of_edges(sources, logits, relax):
    """Plain sum over edges, each relaxed (none, skip) of nothing and of the source itself."""
    total = torch.zeros_like(sources[0])
    for source, edge in zip(sources, logits, strict=True):
        weights = relax(edge)
        total = total + weights[NONE] * torch.zeros_like(source) + weights[SKIP] * source
    return total


def _mixture(sources, logits, relax):
    """The sum of all sources, weighted with one relaxation over them."""
    total = torch.zeros_like(sources[0])
    for source, weight in zip(sources, relax(logits), strict=True):
        total = total + weight * source
    return total


def _cell_end(states, p, i, cell_outputs, protocol, training):
    """What leaves cell i, from [x, y, s_0, ..]."""
    inner = states[2:] if protocol == "paper" else states[-cell_outputs:]
    if len(inner) == 1:
        out = inner[0]
    else:
        tensors = _conv_and_norm(p, f"cell.{i}.out", training)
        weight, bias = tensors.pop("weight"), tensors.pop("bias")
        bn_weight, bn_bias = tensors.pop("bn_weight"), tensors.pop("bn_bias")
        out = relu(batch_norm(linear(torch.cat(inner, dim=1), weight, bias), bn_weight, bn_bias, **tensors))
    if protocol == "paper":
        return out
    return layer_norm(out + states[0], p[f"cell.{i}.ln_weight"], p[f"cell.{i}.ln_bias"])


def _head(cells, p, protocol):
    """(B, m_out * C * L), entry c * L + l."""
    joined = torch.cat(cells, dim=1)
    if protocol == "released_code":
        joined = relu(layer_norm(joined, p["head.ln_weight"], p["head.ln_bias"]))
    return torch.stack([torch.cat(list(sample)) for sample in joined])


# ---- derivation ------------------------------------------------------------------------------------


def derive(logits, feature_names, *, num_cells, num_steps, protocol, pairing):
    """The genotype by trying every candidate, and [(choice, margin), ...] in the order of the choices.

    The genotype is as `found_network` reads it. The choices are "cell.<i>.inputs", then for each step
    "cell.<i>.step.<m>.inputs" and "cell.<i>.step.<m>.op". A margin is the winner's score minus that of the
    runner-up among the admissible candidates, or the winner's score where nothing else was admissible.
    """
    _check(protocol, pairing)
    feature_names = list(feature_names)
    alpha, beta, gamma = (
        logits[name].detach().double().cpu().tolist() for name in ("alpha", "beta", "gamma")
    )
    genotype = []
    margins = []
    picked_features = set()
    picked_pairs = set()
    row = 0
    for i in range(num_cells):
        names = feature_names + [f"cell.{c}" for c in range(i)]
        here = slice(row, row + len(names))
        row += len(names)
        if pairing == "distinct":
            scored = _ordered_pairs(_weights(alpha[0][here]), _weights(alpha[1][here]))
        elif protocol == "released_code":
            scored = _new_feature_pairs(
                [_weights(edge) for edge in alpha[here]], len(feature_names), picked_features
            )
        else:
            scored = _new_pairs([_weights(edge) for edge in alpha[here]], picked_pairs)
        if not scored:
            raise ValueError(f"cell {i} has no admissible pair left among {names}")
        (j, k), margin = _best(scored)
        margins.append((f"cell.{i}.inputs", margin))
        picked_features |= {j, k}
        picked_pairs.add((j, k))

        steps = []
        inner_row = 0
        for m in range(num_steps):
            inner = slice(inner_row, inner_row + 2 + m)
            inner_row += 2 + m
            if pairing == "distinct":
                scored = _ordered_pairs(_weights(beta[i][0][inner]), _weights(beta[i][1][inner]))
                if num_steps == 1:
                    scored = [(pair, score) for pair, score in scored if pair == (0, 1)]
                (first, second), margin = _best(scored)
            elif protocol == "released_code":
                (first, second), margin = _two_best([_weights(edge)[SKIP] for edge in beta[i][inner]])
            else:
                (first, second), margin = _best(
                    _pairs_with_repeats([_weights(edge) for edge in beta[i][inner]])
                )
            margins.append((f"cell.{i}.step.{m}.inputs", margin))
            op, margin = _best(list(zip(OPS[protocol], _weights(gamma[i][m]), strict=True)))
            margins.append((f"cell.{i}.step.{m}.op", margin))
            steps.append((first, second, op))
        genotype.append((names[j], names[k], steps))
    return genotype, margins


def _weights(logits):
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


def _best(scored):
    """The first of the highest scored candidates, and its margin."""
    winner = 0
    for position, (_, score) in enumerate(scored):
        if score > scored[winner][1]:
            winner = position
    others = [score for position, (_, score) in enumerate(scored) if position != winner]
    candidate, score = scored[winner]
    return candidate, score - max(others) if others else score


def _ordered_pairs(first, second):
    """Distinct pairing: every (j, k) with j != k."""
    scored = []
    for j in range(len(first)):
        for k in range(len(second)):
            if j != k:
                scored.append(((j, k), first[j] * second[k]))
    return scored


def _new_feature_pairs(edges, num_features, picked):
    """Released code: features only, and at least one of the two was in no earlier cell."""
    scored = []
    for j in range(num_features):
        for k in range(j + 1, num_features):
            if j not in picked or k not in picked:
                scored.append(((j, k), edges[j][SKIP] * edges[k][SKIP]))
    return scored


def _new_pairs(edges, picked):
    """Paper, eq. 3: features and earlier cells, the better of both edge ops, no pair used again."""
    scored = []
    for j in range(len(edges)):
        for k in range(j + 1, len(edges)):
            if (j, k) not in picked:
                scored.append(((j, k), max(edges[j][g] * edges[k][g] for g in (NONE, SKIP))))
    return scored


def _pairs_with_repeats(edges):
    """Paper, footnote 2: as eq. 3, and a step may read one state twice."""
    scored = []
    for j in range(len(edges)):
        for k in range(j, len(edges)):
            scored.append(((j, k), max(edges[j][g] * edges[k][g] for g in (NONE, SKIP))))
    return scored


def _two_best(weights):
    """Released code: the two predecessors of the largest skip weights, by rank, the earlier first when equal.

    Their order follows from their ranks, so the candidates of the margin are the unordered pairs, scored by
    the product of the two weights.
    """
    first = 0
    for j in range(len(weights)):
        if weights[j] > weights[first]:
            first = j
    second = 1 if first == 0 else 0
    for j in range(len(weights)):
        if j != first and weights[j] > weights[second]:
            second = j
    others = []
    for j in range(len(weights)):
        for k in range(j + 1, len(weights)):
            if {j, k} != {first, second}:
                others.append(weights[j] * weights[k])
    score = weights[first] * weights[second]
    return (first, second), score - max(others) if others else score
