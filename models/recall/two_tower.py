"""A two-tower network: a user's last events and profile on one side, an item's id and content on the other.

Trained by sampled softmax over the batch's own targets and uniformly drawn items (Yi et al., RecSys 2019;
mixed negatives: Yang et al., WWW 2020), each sampled logit less the log of how often it is sampled
(Bengio & Senecal, 2008): without that correction popular items are pushed away for being popular.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.engine.batch import MS_PER_DAY, PROFILE_BUCKETS, profile_codes
from app.state.events import FOLDED
from models.recall import STRENGTH

WIDTH = 64
HEADS = 4
HIDDEN = 128
BATCH = 256
TARGETS = 16
UNIFORM = 2048
EPOCH = 20_000
LR = 1e-3
TEMPERATURE = 0.2
DROP = 0.25
LEAST = 3
HALF_LIFE_DAYS = 90.0
HORIZON_DAYS = 30.0
HELD_OUT = 0.05
PATIENCE = 3
MOST_EPOCHS = 30
SPECTRAL_ROUNDS = 4
NOW_DAYS = 7.0
SMOOTH = 0.1
SHIFT = 1.0
SHIFTPOS = 1
WEIGHT_POWER = 1.0


class ItemTower(nn.Module):
    def __init__(self, start: Tensor, features: Tensor, known: Tensor) -> None:
        super().__init__()
        self.id = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)
        self.content = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.features, self.known = features, known

    def forward(self, rows: Tensor, drop: float = 0.0) -> Tensor:
        known = self.known[rows]
        if drop:
            known = known * (torch.rand(len(rows)) >= drop)
        return F.normalize(self.id(rows) * known[:, None] + self.content(self.features[rows]), dim=1)


class UserTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Embedding(256, HEADS)
        nn.init.zeros_(self.kind.weight)
        self.kind.weight.data[0] = -1e4
        self.rate = nn.Parameter(torch.linspace(0.0, 1.0, HEADS))
        self.query = nn.Linear(WIDTH, HEADS, bias=False)
        self.profile = nn.EmbeddingBag(PROFILE_BUCKETS, WIDTH, mode="sum", padding_idx=0)
        nn.init.normal_(self.profile.weight, std=0.02)
        self.profile.weight.data[0] = 0
        self.hidden = nn.Linear((HEADS + 1) * WIDTH + 1, HIDDEN)
        self.out = nn.Linear(HIDDEN, WIDTH)
        self.mix = nn.Linear(HEADS * WIDTH, WIDTH, bias=False)
        self.mix.weight.data.copy_(torch.eye(WIDTH).repeat(1, HEADS) / HEADS)
        self.scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))

    def forward(self, history: Tensor, kinds: Tensor, ages_s: Tensor, profile: Tensor) -> Tensor:
        age = torch.log1p(ages_s / 3600.0).unsqueeze(2)
        share = (self.query(history) + self.kind(kinds) - age * self.rate).softmax(1)
        pooled = torch.bmm(share.transpose(1, 2), history).flatten(1)
        count = torch.log1p((kinds > 0).sum(1, keepdim=True).float())
        hidden = F.gelu(self.hidden(torch.cat([pooled, self.profile(profile), count], 1)))
        return F.normalize(self.out(hidden) + self.mix(pooled), dim=1) * self.scale.exp()


@dataclass(frozen=True, slots=True)
class TwoTower:
    item_vectors: npt.NDArray[np.float32]
    encoder: UserTower
    losses: tuple[tuple[float, float], ...]
    history: int
    profile: int

    def export(self) -> torch.export.ExportedProgram:
        size = torch.export.Dim("batch", min=1)
        sample = (
            torch.zeros(2, self.history, WIDTH),
            torch.zeros(2, self.history, dtype=torch.int64),
            torch.zeros(2, self.history),
            torch.zeros(2, self.profile, dtype=torch.int64),
        )
        return torch.export.export(self.encoder, sample, dynamic_shapes=({0: size},) * 4)


class Examples:
    def __init__(self, user, row, ts_ms, kind, profiles, history, n_items):
        self.history, self.n = history, n_items
        self.row = torch.from_numpy(row.astype(np.int64))
        self.ts = torch.from_numpy(ts_ms)
        self.kind = torch.from_numpy(kind.astype(np.int64))
        self.strength = torch.from_numpy(STRENGTH)[self.kind]
        self.profiles = profiles
        self.user = torch.from_numpy(user.astype(np.int64))
        n = len(user)
        first = np.r_[True, user[1:] != user[:-1]]
        new = first | np.r_[True, ts_ms[1:] != ts_ms[:-1]]
        at = np.flatnonzero(new)
        begins = np.flatnonzero(first)
        ends = np.r_[begins[1:], n]
        which = np.cumsum(first)[at] - 1
        self.at, self.begin, self.end = (torch.from_numpy(x) for x in (at, begins[which], ends[which]))

    def past(self, chosen: Tensor):
        at = self.at[chosen][:, None]
        index = at - self.history + torch.arange(self.history)
        real = index >= self.begin[chosen][:, None]
        index = torch.where(real, index, 0)
        ages_s = (self.ts[at] - self.ts[index]).float() / 1000
        return (
            torch.where(real, self.row[index], -1),
            torch.where(real, self.kind[index], 0),
            torch.where(real, ages_s, 0.0),
            self.profiles[self.user[at[:, 0]]],
        )

    def next(self, chosen: Tensor):
        """Distinct rows wanted next [B,T], -1 padded; strength"""
        at = self.at[chosen][:, None]
        index = at + torch.arange(TARGETS)
        real = index < self.end[chosen][:, None]
        index = torch.where(real, index, 0)
        real &= (self.ts[index] <= self.ts[at] + int(HORIZON_DAYS * MS_PER_DAY)) & (self.strength[index] > 0)
        rows, order = torch.where(real, self.row[index], -1).sort(1)
        strength = torch.where(real, self.strength[index], 0.0).gather(1, order)
        again = torch.zeros_like(real)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]
        return torch.where(again, -1, rows), strength


def fit(
    user,
    row,
    ts_ms,
    kind,
    *,
    features,
    profiles=(),
    history=64,
    profile=8,
    seed=0,
    on_epoch=lambda e, t, v: None,
    **dbg,
):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    n = len(features)
    kept = np.isin(kind, list(FOLDED))
    user, row, ts_ms, kind = user[kept], row[kept], ts_ms[kept], kind[kept]
    codes = torch.tensor([profile_codes(p, profile) for p in profiles] or [[0] * profile] * (int(user.max()) + 1))
    ex = Examples(user, row, ts_ms, kind, codes, history, n)
    held = rng.random(int(user.max()) + 1) < HELD_OUT
    w = np.exp2(-(ts_ms.max() - ts_ms[ex.at.numpy()]) / MS_PER_DAY / HALF_LIFE_DAYS)
    va = held[user[ex.at.numpy()]]
    tr, vl = np.flatnonzero(~va), np.flatnonzero(va)
    p = w[tr] ** WEIGHT_POWER
    p /= p.sum()
    ws = torch.from_numpy(w ** (1 - WEIGHT_POWER)).float()
    start = spectral(user[~held[user]], row[~held[user]], ts_ms[~held[user]], kind[~held[user]], n, seed)
    count = np.bincount(row, minlength=n)
    item = ItemTower(
        torch.from_numpy(start), torch.from_numpy(features), torch.from_numpy((count >= LEAST).astype(np.float32))
    )
    enc = UserTower()
    # how often each item is a target
    q = torch.zeros(n)
    for c in torch.arange(len(tr)).split(65536):
        r, s = ex.next(torch.from_numpy(tr)[c])
        pc = torch.from_numpy(p).float()[c][:, None].expand(-1, TARGETS)
        q += torch.bincount(r[r >= 0], pc[r >= 0], minlength=n)
    q /= q.sum()
    wn = STRENGTH[kind] * np.exp2(-(ts_ms.max() - ts_ms) / MS_PER_DAY / NOW_DAYS)
    qn = np.bincount(row, wn, minlength=n)
    qn = torch.from_numpy(qn / qn.sum()).float()
    qn = (1 - SMOOTH) * qn + SMOOTH * q
    shift = SHIFT * torch.where(q > 0, (q / qn.clamp(min=1e-12)).log(), 0.0)
    dense = [x for k, x in [*item.named_parameters(), *enc.named_parameters()] if k != "id.weight"]
    o1 = torch.optim.AdamW(dense, lr=LR, weight_decay=0.0, fused=True)
    o2 = torch.optim.SparseAdam([item.id.weight], lr=LR)

    def loss_of(chosen, negs, drop):
        hr, kd, ages, pf = ex.past(chosen)
        tg, st = ex.next(chosen)
        ctx, col = (tg >= 0).nonzero(as_tuple=True)
        pos = tg[ctx, col]
        uq, inv = torch.unique(torch.cat([hr.flatten(), pos, negs]), return_inverse=True)
        # -1 first if there is padding
        if uq[0] < 0:
            V = F.pad(item(uq[1:], drop), (0, 0, 1, 0))
        else:
            V = item(uq, drop)
        H = F.embedding(inv[: hr.numel()], V).view(*hr.shape, WIDTH)
        U = enc(H, kd, ages, pf)
        samp = inv[hr.numel() :]
        cand, cc = torch.unique(samp, return_counts=True)
        cr = uq[cand]
        lq = cc.log() - (len(pos) * q[cr] + len(negs) / n).log()
        S = U @ F.embedding(cand, V).T
        pc = torch.searchsorted(cand, samp[: len(pos)])
        if SHIFT:
            S = S + shift[cr]
        ps = S[ctx, pc]
        if SHIFT and not SHIFTPOS:
            ps = ps - shift[pos]
        rest = (S + lq).index_put((ctx, pc), torch.tensor(-torch.inf)).logsumexp(1)
        weight = (ws[chosen] / (tg >= 0).sum(1).clamp(min=1) ** 0.5)[ctx] * st[ctx, col]
        return ((torch.logaddexp(ps, rest[ctx]) - ps) * weight).sum() / weight.sum()

    hist = []
    best = math.inf
    kept_ = None
    bad = 0
    vfix = (
        torch.from_numpy(rng.choice(vl, 2048, p=w[vl] ** WEIGHT_POWER / (w[vl] ** WEIGHT_POWER).sum()))
        if len(vl) > 2048
        else torch.from_numpy(vl)
    )
    vneg = torch.from_numpy(np.random.default_rng(seed).integers(0, n, UNIFORM))
    for epoch in range(MOST_EPOCHS):
        size = min(EPOCH, len(tr))
        order = torch.from_numpy(rng.choice(tr, size, p=p))
        tot = []
        for b in order.split(BATCH):
            l = loss_of(b, torch.from_numpy(rng.integers(0, n, UNIFORM)), DROP)
            o1.zero_grad()
            o2.zero_grad()
            l.backward()
            o1.step()
            o2.step()
            tot.append(l.item())
        with torch.no_grad():
            v = float(np.mean([loss_of(b, vneg, 0.0).item() for b in vfix.split(BATCH)]))
        hist.append((float(np.mean(tot)), v))
        on_epoch(epoch, *hist[-1])
        if "cb" in dbg:
            dbg["cb"](item, enc, epoch)
        if v < best - 1e-4:
            best, bad = v, 0
            kept_ = copy.deepcopy((item.state_dict(), enc.state_dict()))
        else:
            bad += 1
            if bad >= PATIENCE:
                break
    item.load_state_dict(kept_[0])
    enc.load_state_dict(kept_[1])
    with torch.no_grad():
        V = torch.cat([item(r) for r in torch.arange(n).split(65536)])
    return TwoTower(V.numpy(), enc.eval(), tuple(hist), history, profile)


def spectral(user, row, ts_ms, kind, n, seed):
    from models.recall import item_cf

    x = item_cf._weights(user, row, ts_ms, kind, n, HALF_LIFE_DAYS)
    d = np.asarray(x.multiply(x).sum(0)).ravel()
    d = np.sqrt(d + 0.3 * d[d > 0].mean())
    x = (x @ sp.diags((1 / d).astype(np.float32))).tocsr()
    xt = x.T.tocsr()
    g = np.random.default_rng(seed)
    basis = np.linalg.qr(g.standard_normal((n, WIDTH + 16)).astype(np.float32))[0]
    for _ in range(SPECTRAL_ROUNDS):
        basis = np.linalg.qr(xt @ (x @ basis))[0]
    b = x @ basis
    _, s, v = np.linalg.svd(b.T @ b)
    out = (basis @ v.T[:, :WIDTH]) * s[:WIDTH] ** 0.25
    return (out / np.sqrt((out**2).sum(1).mean())).astype(np.float32)
