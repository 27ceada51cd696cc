"""Loops that numba compiles: weighted ranks, bootstrap and permutation draws, Kendall's pairs. Demands
integer codes and float64 arrays; knows nothing of tables. Every draw is a hash of (seed, resample,
place), so a resample is the same whichever thread makes it, and sums of ranks are sums of integers."""

from __future__ import annotations

import numpy as np

from leakfast.counters import GOLDEN, compiled, mixed

LANES = 16  # resamples that go through the loops side by side
_SECOND = np.uint64(0xD1B54A32D192ED03)
_S32 = np.uint64(32)


@compiled
def below(start, place, top):
    """Draw number `place` of the stream `start`: an integer in [0, top), uniform to 2⁻³²·top."""
    word = mixed(start + np.uint64(place + 1) * GOLDEN)
    return np.int64(((word >> _S32) * np.uint64(top)) >> _S32)


@compiled
def stream(seed, resample):
    """The start of resample number `resample` under `seed`."""
    return mixed(mixed(np.uint64(seed) + GOLDEN) ^ (np.uint64(resample + 1) * _SECOND))


@compiled
def draw_weights(seed, first, people, person, weight):
    """How often each row stands in LANES resamples of `people` clusters: fills weight (n, LANES)."""
    times = np.zeros((people, LANES))
    for lane in range(LANES):
        start = stream(seed, first + lane)
        for place in range(people):
            times[below(start, place, people), lane] += 1.0
    for i in range(len(person)):
        p = person[i]
        for lane in range(LANES):
            weight[i, lane] = times[p, lane]


@compiled
def weighted_ranks(order, begins, weight, total, rank):
    """Twice the centered average rank of each row in a sample where row i stands weight[i] times.

    order: rows in ascending order; begins: whether a new value begins there. Fills rank (n, LANES)."""
    n = len(order)
    below_here = np.zeros(LANES)
    group = np.zeros(LANES)
    at = 0
    while at < n:
        end = at + 1
        while end < n and not begins[end]:
            end += 1
        for lane in range(LANES):
            group[lane] = 0.0
        for k in range(at, end):
            i = order[k]
            for lane in range(LANES):
                group[lane] += weight[i, lane]
        for k in range(at, end):
            i = order[k]
            for lane in range(LANES):
                rank[i, lane] = 2.0 * below_here[lane] + group[lane] - total[lane]
        for lane in range(LANES):
            below_here[lane] += group[lane]
        at = end


@compiled
def _cross(column, weight, weighted_y, total, sxy, sxx):
    """Σ w·rx·ry of every y and Σ w·rx² with the ranks of x made on the way; (Y, LANES) and (LANES,).

    column: (order, begins, tied) of x; weight (n, LANES), weighted_y (Y, n, LANES)."""
    order, begins, tied = column
    n, several = len(order), weighted_y.shape[0]
    below_here, c = np.zeros(LANES), np.empty(LANES)
    sxy[:] = 0.0
    sxx[:] = 0.0
    if not tied:
        for k in range(n):
            i = order[k]
            for lane in range(LANES):
                w = weight[i, lane]
                c[lane] = 2.0 * below_here[lane] + w - total[lane]
                below_here[lane] += w
                sxx[lane] += w * c[lane] * c[lane]
            for y in range(several):
                for lane in range(LANES):
                    sxy[y, lane] += c[lane] * weighted_y[y, i, lane]
        return
    group, held = np.zeros(LANES), np.zeros((several, LANES))
    for k in range(n):
        i = order[k]
        for lane in range(LANES):
            group[lane] += weight[i, lane]
        for y in range(several):
            for lane in range(LANES):
                held[y, lane] += weighted_y[y, i, lane]
        if k + 1 == n or begins[k + 1]:
            for lane in range(LANES):
                c[lane] = 2.0 * below_here[lane] + group[lane] - total[lane]
                sxx[lane] += group[lane] * c[lane] * c[lane]
                below_here[lane] += group[lane]
                group[lane] = 0.0
            for y in range(several):
                for lane in range(LANES):
                    sxy[y, lane] += c[lane] * held[y, lane]
                    held[y, lane] = 0.0


@compiled
def bootstrap(x, ys, person, people, seed, first, out):
    """Spearman ρ of K columns with Y others in each resample of persons, in each of G groups that see the same resamples;
    fills out (count, G, Y, K).

    x: (order, begins, tied) of (G, K, n), (G, K, n) and (G, K); ys: (order, begins), (G, Y, n) each; person: (n,) codes
    below `people`. A resample in which a side does not vary gives NaN. `first` is a multiple of LANES."""
    order, begins, tied = x
    y_order, y_begins = ys
    n, count = len(person), out.shape[0]
    groups, columns, several = order.shape[0], order.shape[1], y_order.shape[1]
    weight, rank = np.empty((n, LANES)), np.empty((several, n, LANES))
    total, syy = np.empty(LANES), np.empty((several, LANES))
    sxy, sxx = np.empty((several, LANES)), np.empty(LANES)
    for at in range(0, count, LANES):
        draw_weights(seed, first + at, people, person, weight)
        total[:] = 0.0
        for i in range(n):
            for lane in range(LANES):
                total[lane] += weight[i, lane]
        for g in range(groups):
            syy[:] = 0.0
            for y in range(several):
                weighted_ranks(y_order[g, y], y_begins[g, y], weight, total, rank[y])
                for i in range(n):
                    for lane in range(LANES):
                        w, r = weight[i, lane], rank[y, i, lane]
                        syy[y, lane] += w * r * r
                        rank[y, i, lane] = w * r
            for j in range(columns):
                _cross((order[g, j], begins[g, j], tied[g, j]), weight, rank, total, sxy, sxx)
                for y in range(several):
                    for lane in range(min(LANES, count - at)):
                        if sxx[lane] > 0.0 and syy[y, lane] > 0.0:
                            out[at + lane, g, y, j] = sxy[y, lane] / np.sqrt(sxx[lane] * syy[y, lane])
                        else:
                            out[at + lane, g, y, j] = np.nan


@compiled
def shuffle(seed, resample, sent):
    """A uniform permutation of 0 … len(sent)−1 in `sent` (Fisher and Yates)."""
    start = stream(seed, resample)
    for k in range(len(sent)):
        sent[k] = k
    for k in range(len(sent) - 1, 0, -1):
        other = below(start, k, k + 1)
        sent[k], sent[other] = sent[other], sent[k]


@compiled
def follow(sent, person, block, position, out):
    """Rows that a shuffle of persons moves each row to, inside its own block; see
    `resample.joint_permutations`."""
    for i in range(len(person)):
        who = sent[person[i]]
        while position[block[i], who] < 0:
            who = sent[who]
        out[i] = position[block[i], who]


@compiled
def moved_ranks(y_ranks, person, block, position, seed, first, out):
    """y_ranks (Y, n) under joint shuffles number first, first + 1, …: fills out (count, Y, n)."""
    n, people = len(person), position.shape[1]
    sent, rows = np.empty(people, np.int64), np.empty(n, np.int64)
    for number in range(out.shape[0]):
        shuffle(seed, first + number, sent)
        follow(sent, person, block, position, rows)
        for y in range(len(y_ranks)):
            for i in range(n):
                out[number, y, i] = y_ranks[y, rows[i]]


@compiled
def permuted_alone(xs, ys, seed, first, count, scale, observed, out):
    """Counts over `count` shuffles, number first, first + 1, …, of |Σ x·y shuffled| · scale ≥ observed for each row of xs
    (C, n) with its own of ys (C, n), twice the centered ranks: whole numbers. scale, observed: (C,); out (C,) is added to."""
    n = xs.shape[1]
    sent = np.empty(n, np.int64)
    for number in range(count):
        shuffle(seed, first + number, sent)
        for c in range(len(xs)):
            total = 0.0
            for i in range(n):
                total += xs[c, i] * ys[c, sent[i]]
            out[c] += abs(total) * scale[c] >= observed[c]


@compiled
def shuffle_within(seed, resample, members, starts, sent):
    """A uniform permutation inside each stratum in `sent` (people,): a person is sent to one of its own stratum.

    members: (people,) persons in order of their strata; starts: (strata + 1,) where each begins among them. With one
    stratum and members 0 … people−1 it is `shuffle`."""
    start = stream(seed, resample)
    for k in range(len(sent)):
        sent[k] = k
    for g in range(len(starts) - 1):
        first = starts[g]
        for k in range(starts[g + 1] - 1, first, -1):
            one, other = members[k], members[first + below(start, k, k - first + 1)]
            sent[one], sent[other] = sent[other], sent[one]


@compiled
def moved_within(y_rank, cells, strata, seed, first, out):
    """`moved_ranks` with shuffles inside strata. cells: (person, block, position); strata: (members, starts)."""
    person, block, position = cells
    members, starts = strata
    n, people = len(person), position.shape[1]
    sent, rows = np.empty(people, np.int64), np.empty(n, np.int64)
    for number in range(out.shape[0]):
        shuffle_within(seed, first + number, members, starts, sent)
        follow(sent, person, block, position, rows)
        for i in range(n):
            out[number, i] = y_rank[rows[i]]


@compiled
def relabelled(rows, single, layered, near, seed, first, total):
    """Sums over sources and bystanders after all personas are relabelled, numbers first, first + 1, … of `shuffle`:

        total[r, u, l] = Σ_s Σ_b left_u[s, b, l] · near[π(rows[s]), π(b), l]

    rows: (S,) persona of each source; single: (S, P, U₁) the left sides that are the same at all layers, layered:
    (S, P, U₂, L) the others, numbered after them; near: (P, P, L). Fills total (count, U₁ + U₂, L). A layer's sum is made
    in one order, whatever the others."""
    people, layers = near.shape[0], near.shape[2]
    columns, others = single.shape[2], layered.shape[2]
    sent = np.empty(people, np.int64)
    for number in range(total.shape[0]):
        shuffle(seed, first + number, sent)
        whole = total[number]
        whole[:] = 0.0
        for s in range(len(rows)):
            row = sent[rows[s]]
            for b in range(people):
                to = sent[b]
                for u in range(columns):
                    weight = single[s, b, u]
                    for k in range(layers):
                        whole[u, k] += weight * near[row, to, k]
                for u in range(others):
                    for k in range(layers):
                        whole[columns + u, k] += layered[s, b, u, k] * near[row, to, k]


@compiled
def relabelled_rows(rows, near, seed, first, sources, moved):
    """Where relabellings number first, first + 1, … send the sources, and the rows of near (P, P) they then have: fills
    sources (count, S) with π(rows[s]), and moved (count, S, P) with near[π(rows[s]), π(b)]."""
    people = near.shape[0]
    sent = np.empty(people, np.int64)
    for number in range(moved.shape[0]):
        shuffle(seed, first + number, sent)
        for s in range(len(rows)):
            row = sent[rows[s]]
            sources[number, s] = row
            for b in range(people):
                moved[number, s, b] = near[row, sent[b]]


@compiled
def tally(total, scale, family, observed, single, best):
    """Counts, over shuffles, of |ρ*| ≥ |ρ| in each column (single) and of the largest |ρ*| of the column's
    family ≥ |ρ| (best); both (K,) and added to.

    total: (count, K) Σ rank·moved rank, whole numbers; scale: (K,) 1/√(Σ rank²·Σ y_rank²); family: (K,) codes;
    observed: (K,) |Σ rank·y_rank|·scale, rounded in the same way."""
    columns = len(scale)
    found, top = np.empty(columns), np.empty(columns)
    for number in range(total.shape[0]):
        top[:] = 0.0
        for j in range(columns):
            found[j] = abs(total[number, j]) * scale[j]
            single[j] += found[j] >= observed[j]
        for j in range(columns):
            top[family[j]] = max(top[family[j]], found[j])
        for j in range(columns):
            best[j] += top[family[j]] >= observed[j]


@compiled
def kendall(x, y, out):
    """Kendall's τ-b of every row of x (K, n) with y (n,): (C − D) / √((C+D+Tx)(C+D+Ty))."""
    n = len(y)
    for j in range(x.shape[0]):
        both, in_x, in_y = 0, 0, 0
        for a in range(n):
            for b in range(a):
                u = (x[j, a] > x[j, b]) - (x[j, a] < x[j, b])
                v = (y[a] > y[b]) - (y[a] < y[b])
                both += u * v
                in_x += u * u
                in_y += v * v
        out[j] = both / np.sqrt(float(in_x) * float(in_y)) if in_x > 0 and in_y > 0 else np.nan


@compiled
def leave_one_out(x, y, x_rank, y_rank, out):
    """Σ of products of ranks of each row of x (K, n) with y (n,), and of squares of either, over all but one of the n:
    fills out (3, K, n). Ranks are made anew, centered and over their number n − 1; x_rank, y_rank: average ranks of all."""
    n = len(y)
    middle = n / 2.0
    for k in range(x.shape[0]):
        for i in range(n):
            xy, xx, yy = 0.0, 0.0, 0.0
            for j in range(n):
                if j == i:
                    continue
                a = x_rank[k, j] - 0.5 * ((x[k, j] > x[k, i]) + (x[k, j] >= x[k, i])) - middle
                b = y_rank[j] - 0.5 * ((y[j] > y[i]) + (y[j] >= y[i])) - middle
                xy += a * b
                xx += a * a
                yy += b * b
            size = (n - 1.0) * (n - 1.0)
            out[0, k, i], out[1, k, i], out[2, k, i] = xy / size, xx / size, yy / size
