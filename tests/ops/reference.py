"""Attention written as loops over sequences, heads, queries and keys, in float64."""

import math

import numpy as np


def attention(
    query,
    key,
    value,
    *,
    log_weight=None,
    bias=None,
    allowed=None,
    scale=None,
    normalizer="softmax",
    heads=None,
    queries=None,
    r=None,
):
    """Output [B, T, N, D] and weights [B, N, T, S] as float64.

    log_weight: function (head, r) -> number. allowed, bias: [B, N, T, S] or None.
    r: [B, T, S] relative positions, j - i if None.
    """
    value = np.asarray(value, np.float64)
    batch, keys, value_heads, width = value.shape
    if query is not None:
        query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
        queries, heads = query.shape[1:3]
        scale = query.shape[3] ** -0.5 if scale is None else scale
    heads, queries = heads or value_heads, keys if queries is None else queries
    scale = np.broadcast_to(1.0 if scale is None else scale, heads)
    output = np.zeros((batch, queries, heads, width))
    weights = np.zeros((batch, heads, queries, keys))
    for b, n, i in np.ndindex(batch, heads, queries):
        logits = []
        for j in range(keys):
            k = n // (heads // value_heads)
            logit = 0.0 if query is None else scale[n] * (query[b, i, n] @ key[b, j, k])
            if log_weight is not None:
                logit += log_weight(n, j - i if r is None else r[b, i, j])
            if bias is not None:
                logit += bias[b, n, i, j]
            logits.append(logit if allowed is None or allowed[b, n, i, j] else -math.inf)
        weights[b, n, i] = normalized(normalizer, logits)
        for j in range(keys):
            if weights[b, n, i, j]:
                output[b, i, n] += weights[b, n, i, j] * value[b, j, n // (heads // value_heads)]
    return output, weights


def normalized(normalizer, logits):
    """Weights of one row of logits; -inf where a key is not allowed."""
    finite = [z for z in logits if z > -math.inf]
    if not finite:
        return [0.0 for _ in logits]
    if normalizer in ("softmax", "softmax_one"):
        peak = max([*finite, 0.0])
        total = sum(math.exp(z - peak) for z in finite)
        total += math.exp(-peak) if normalizer == "softmax_one" else 0.0
        return [math.exp(z - peak) / total for z in logits]
    if normalizer in ("sparsemax", "entmax15"):
        return _by_bisection(normalizer, logits)
    row = {
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)) if z > -math.inf else 0.0,
        "none": math.exp,
        "linear": lambda z: z if z > -math.inf else 0.0,
    }
    return [row[normalizer](z) for z in logits]


def _by_bisection(normalizer, logits):
    """The threshold at which the weights sum to one, found without sorting."""
    share, power = (1.0, 1) if normalizer == "sparsemax" else (0.5, 2)
    scaled = [share * z for z in logits]
    low, high = max(scaled) - 1.0, max(scaled)
    for _ in range(100):
        tau = (low + high) / 2
        total = sum(max(z - tau, 0.0) ** power for z in scaled)
        low, high = (tau, high) if total > 1 else (low, tau)
    return [max(z - low, 0.0) ** power for z in scaled]


def log_normalizer(logits):
    """log(sum(exp(logits))) of one row."""
    finite = [z for z in logits if z > -math.inf]
    return math.log(sum(math.exp(z) for z in finite)) if finite else -math.inf
