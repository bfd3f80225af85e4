"""The definitions as literal index sums and the paper's recurrences as printed, in float64.

Nothing here knows the package, a chunk or a pass. `scan` and `fields` sum over explicit index sets:
A[t, j] = q_t . k_j, w_j = exp(a_{j+1} + ... + a_t), and the mask `legal` tells which i <= j count.
`paper` is Algorithm 1 (second order), 2 (AHLA) and 3 (third order), in the paper's order of lines.
"""

import numpy as np

READ = {"linear": "P", "hla2": "F", "ahla": "E", "hla3": "F"}
DENOMINATOR = {  # the statistic with v = 1 that belongs to each statistic with v
    "linear": {"P": "m"},
    "hla2": {"C": "m", "F": "eta", "G": "h"},
    "ahla": {"P": "m", "E": "n"},
    "hla3": {"P": "m", "X": "x", "F": "eta"},
}


def weights(a):
    """w_j = exp(a_{j+1} + ... + a_T): what is left of token j after the last token."""
    return np.array([np.exp(a[j + 1 :].sum()) for j in range(len(a))])


def sums(q, k, v, w, operator, mask):
    """One head's statistics after its last token, as einsums over their index sets, by name."""
    T = len(q)
    legal = np.tri(T) if mask == "causal" else np.ones((T, T))  # legal[j, i]: i <= j
    A = q @ k.T
    wq, wk, wv = w[:, None] * q, w[:, None] * k, w[:, None] * v
    if operator == "linear":
        return {"P": ("jd,jv->dv", k, wv)}
    if operator == "hla2":
        return {
            "S": ("id,ie->de", wk, k),
            "C": ("jd,jv->dv", q, wv),
            "F": ("id,ji,jv->dv", wk, A * legal, wv),
            "G": ("id,ji,jv->dv", wk, A * np.tri(T, k=-1).T, wv),
        }
    if operator == "ahla":
        # A_g A_g carries no weight on its middle index
        through = k if mask == "causal" else wk
        return {
            "R": ("id,ie->de", through, q),
            "P": ("jd,jv->dv", k, wv),
            "E": ("id,ij,jv->dv", through, A * legal, wv),
        }
    return {
        "S": ("id,ie->de", wk, k),
        "Q": ("ud,ue->de", wq, q),
        "P": ("jd,jv->dv", k, wv),
        "X": ("ud,uj,jv->dv", wq, A * legal, wv),
        "Y": ("id,ui,ue->de", wk, A * legal, wq),
        "F": ("id,ui,u,uj,jv->dv", wk, A * legal, w, A * legal, wv),
    }


def statistics(q, k, v, a, operator, mask, only=()):
    """Every statistic of one head after its last token: matrices, their denominators, and rho."""
    w = weights(a) if mask != "none" else np.ones(len(q))
    v_and_1 = np.concatenate([v, np.ones((len(v), 1))], axis=1)
    found = {"rho": np.exp(a.sum())}
    for name, (subscripts, *operands) in sums(q, k, v_and_1, w, operator, mask).items():
        if only and name not in only:
            continue
        found[name] = np.einsum(subscripts, *operands, optimize=len(q) > 16)
        if subscripts.endswith("v"):
            if name in DENOMINATOR[operator]:
                found[DENOMINATOR[operator][name]] = found[name][:, -1]
            found[name] = found[name][:, :-1]
    return found


def read(s, q, operator, ridge):
    """Numerator and denominator of one token from its statistics; S_eff = S + ridge I."""
    F = s[READ[operator]]
    eta = s[DENOMINATOR[operator][READ[operator]]]
    if not ridge:
        return q @ F, q @ eta
    return q @ (F + ridge * s["C"]), q @ (eta + ridge * s["m"])


def heads(q, k, v, decay=None, log_gate=None, scale=1.0):
    """The batch shape, and per batch entry (index, q, k, v, a): everything broadcast, q scaled."""
    T = q.shape[-2]
    if log_gate is not None:
        a = np.asarray(log_gate, float)
    else:
        a = np.log(np.ones(()) if decay is None else np.asarray(decay, float))[..., None]
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)), a.shape[:-1])
    q, k, v = (np.broadcast_to(x, batch + x.shape[-2:]).astype(float) for x in (q, k, v))
    a = np.broadcast_to(a, (*batch, T))
    return batch, [(n, scale * q[n], k[n], v[n], a[n]) for n in np.ndindex(*batch)]


def ratio(num, den, normalize, eps):
    return num / (den[..., None] + eps) if normalize else num


def scan(q, k, v, *, operator="hla2", mask="causal", ridge=0.0, normalize=False, eps=1e-6, **gate):
    """The output of the literal sums; `gate` holds decay, log_gate, scale."""
    batch, entries = heads(q, k, v, **gate)
    num = np.zeros((*batch, q.shape[-2], v.shape[-1]))
    den = np.zeros(num.shape[:-1])
    only = (READ[operator], "C") if ridge else (READ[operator],)
    for n, qn, kn, vn, an in entries:
        for t in range(len(qn)):
            seen = slice(None) if mask == "none" else slice(t + 1)
            s = statistics(qn[seen], kn[seen], vn[seen], an[seen], operator, mask, only)
            num[(*n, t)], den[(*n, t)] = read(s, qn[t], operator, ridge)
    return ratio(num, den, normalize, eps)


def fields(q, k, v, *, operator="hla2", mask="causal", **gate):
    """Every statistic after the last token, by its name in the design, batch axes in front."""
    batch, entries = heads(q, k, v, **gate)
    found = [statistics(qn, kn, vn, an, operator, mask) for _, qn, kn, vn, an in entries]
    return {
        name: np.stack([s[name] for s in found]).reshape(batch + np.shape(found[0][name]))
        for name in found[0]
    }


def paper_hla2(q, k, v, g, ridge):
    """Algorithm 1 with Section 4.3's decay, one token at a time."""
    D, V = k.shape[1], v.shape[1]
    S, C, m, G, h = np.zeros((D, D)), np.zeros((D, V)), np.zeros(D), np.zeros((D, V)), np.zeros(D)
    for t in range(len(q)):
        dS, dC, dm = np.outer(k[t], k[t]), np.outer(q[t], v[t]), q[t]
        G, h = g[t] * G + dS @ C, g[t] * h + dS @ m  # C and m of the token before
        S, C, m = g[t] * S + dS, g[t] * C + dC, g[t] * m + dm
        u = q[t] @ (S + ridge * np.eye(D))
        yield u @ C - q[t] @ G, u @ m - q[t] @ h, {"S": S, "C": C, "m": m, "G": G, "h": h}


def paper_ahla(q, k, v, g, ridge):
    """Algorithm 2."""
    D, V = k.shape[1], v.shape[1]
    P, m, E, n = np.zeros((D, V)), np.zeros(D), np.zeros((D, V)), np.zeros(D)
    for t in range(len(q)):
        P, m = g[t] * P + np.outer(k[t], v[t]), g[t] * m + k[t]
        r, s = q[t] @ P, q[t] @ m
        E, n = g[t] * E + np.outer(k[t], r), g[t] * n + s * k[t]
        yield q[t] @ E, q[t] @ n, {"P": P, "m": m, "E": E, "n": n}


def paper_hla3(q, k, v, g, ridge):
    """Algorithm 3."""
    D, V = k.shape[1], v.shape[1]
    S, Q, P, m = np.zeros((D, D)), np.zeros((D, D)), np.zeros((D, V)), np.zeros(D)
    G1, G2, G3 = np.zeros((3, D, V))
    h1, h2, h3 = np.zeros((3, D))
    for t in range(len(q)):
        S_prev, Q_prev, P_prev, m_prev = S, Q, P, m
        S, Q = g[t] * S_prev + np.outer(k[t], k[t]), g[t] * Q_prev + np.outer(q[t], q[t])
        P, m = g[t] * P_prev + np.outer(k[t], v[t]), g[t] * m_prev + k[t]
        u1 = Q_prev @ k[t]
        G1, h1 = g[t] * G1 + np.outer(k[t], u1 @ P_prev), g[t] * h1 + k[t] * (u1 @ m_prev)
        a2 = S_prev @ q[t]
        G2, h2 = g[t] * G2 + np.outer(a2, q[t] @ P_prev), g[t] * h2 + a2 * (q[t] @ m_prev)
        a3 = S_prev @ (Q_prev @ k[t])
        G3, h3 = g[t] * G3 + np.outer(a3, v[t]), g[t] * h3 + a3
        num = Q @ (S @ q[t]) @ P - q[t] @ G1 - q[t] @ G2 - q[t] @ G3
        state = {"S": S, "Q": Q, "P": P, "m": m, "G1": G1, "G2": G2, "G3": G3}
        state |= {"h1": h1, "h2": h2, "h3": h3}
        yield num, q[t] @ (S @ (Q @ m) - h1 - h2 - h3), state


PAPER = {"hla2": paper_hla2, "ahla": paper_ahla, "hla3": paper_hla3}


def paper(q, k, v, *, operator="hla2", ridge=0.0, normalize=False, eps=1e-6, **gate):
    """Output and last state (by name) of the paper's serial recurrences; g_t = exp(a_t)."""
    batch, entries = heads(q, k, v, **gate)
    num = np.zeros((*batch, q.shape[-2], v.shape[-1]))
    den = np.zeros(num.shape[:-1])
    last = []
    for n, qn, kn, vn, an in entries:
        steps = list(PAPER[operator](qn, kn, vn, np.exp(an), ridge))
        for t, (top, bottom, _) in enumerate(steps):
            num[(*n, t)], den[(*n, t)] = top, bottom
        last.append(steps[-1][2] if steps else {})
    state = {x: np.stack([s[x] for s in last]).reshape(batch + last[0][x].shape) for x in last[0]}
    return ratio(num, den, normalize, eps), state
