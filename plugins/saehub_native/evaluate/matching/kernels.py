"""Blocks of similarities, or a sparse graph of them, in; candidates, bids and shortest augmenting paths out: the compiled inner loops.

Legend: N rows to be matched, M columns, E edges of a graph in CSR form (`start_N1`, `cols_E`, `w_E`), `price_M` the dual price of a column.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def compiled(function):
    """`njit`, cached on disk where there is a folder to write to."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return njit(function)


@compiled
def keep_best(s_BM, first, row_w_NK, row_col_NK, col_w_MK, col_row_MK, col_low_M):
    """Merge a block of similarities (rows `first` …) into the K best of each row and of each column (filled with -inf before the first block)."""
    K = row_w_NK.shape[1]
    for b in range(s_BM.shape[0]):
        i = first + b
        low, at = -np.inf, 0
        for j in range(s_BM.shape[1]):
            s = s_BM[b, j]
            if s > low:
                row_w_NK[i, at] = s
                row_col_NK[i, at] = j
                low = np.inf
                for k in range(K):
                    if row_w_NK[i, k] < low:
                        low, at = row_w_NK[i, k], k
            if s > col_low_M[j]:
                worst, place = np.inf, 0
                for k in range(K):
                    if col_w_MK[j, k] < worst:
                        worst, place = col_w_MK[j, k], k
                col_w_MK[j, place] = s
                col_row_MK[j, place] = i
                worst = np.inf
                for k in range(K):
                    if col_w_MK[j, k] < worst:
                        worst = col_w_MK[j, k]
                col_low_M[j] = worst


@compiled
def look(s_BM, first, price_M, worth_N, slack, best_N, new_row, new_col, new_w, most):
    """best_N[i] = max_j s_ij - price_j over a block; up to `most` edges of each row that beat worth_N[i] by more than
    `slack` are listed, the best among them. Returns how many were listed.
    """
    found = 0
    for b in range(s_BM.shape[0]):
        i = first + b
        best, told = -np.inf, 0
        limit = worth_N[i] + slack
        for j in range(s_BM.shape[1]):
            x = s_BM[b, j] - price_M[j]
            record = x > best
            if record:
                best = x
            if x > limit and found < len(new_row):
                if told < most or record:
                    if told == most:  # full: a better one takes the last place
                        found -= 1
                        told -= 1
                    new_row[found] = i
                    new_col[found] = j
                    new_w[found] = s_BM[b, j]
                    found += 1
                    told += 1
        best_N[i] = best
    return found


@compiled
def worth(start_N1, cols_E, w_E, price_M, worth_N):
    """worth_N[i] = max over its edges of w - price: what row i can get at these prices."""
    for i in range(len(worth_N)):
        best = -np.inf
        for e in range(start_N1[i], start_N1[i + 1]):
            best = max(best, w_E[e] - price_M[cols_E[e]])
        worth_N[i] = best


@compiled
def release(start_N1, cols_E, w_E, price_M, worth_N, col_of_N, row_of_M, slack):
    """Undo every pair that costs its row more than `slack` against what it could get; then give free rows free columns that cost them nothing.

    Returns the number of rows that stay free.
    """
    for i in range(len(col_of_N)):
        j = col_of_N[i]
        if j >= 0:
            own = -np.inf
            for e in range(start_N1[i], start_N1[i + 1]):
                if cols_E[e] == j:
                    own = max(own, w_E[e] - price_M[j])
            if own < worth_N[i] - slack:
                col_of_N[i] = -1
                row_of_M[j] = -1
    free = 0
    for i in range(len(col_of_N)):
        if col_of_N[i] < 0:
            for e in range(start_N1[i], start_N1[i + 1]):
                j = cols_E[e]
                if row_of_M[j] < 0 and w_E[e] - price_M[j] >= worth_N[i]:
                    col_of_N[i] = j
                    row_of_M[j] = i
                    break
            if col_of_N[i] < 0:
                free += 1
    return free


@compiled
def bid(start_N1, cols_E, w_E, price_M, col_of_N, row_of_M, stack_N, free, eps, most):
    """Auction: the last free row takes its best column and raises the price until its second best is as good, plus `eps`.

    Bertsekas (1979). Stops after `most` bids, or when no row is free; returns (free rows left, bids made).
    """
    made = 0
    while free > 0 and made < most:
        i = stack_N[free - 1]
        best, second, j = -np.inf, -np.inf, -1
        for e in range(start_N1[i], start_N1[i + 1]):
            x = w_E[e] - price_M[cols_E[e]]
            if x > best:
                second = best
                best = x
                j = cols_E[e]
            elif x > second:
                second = x
        if second == -np.inf:
            second = best - 2.0  # its only column: it outbids anyone
        price_M[j] += best - second + eps
        other = row_of_M[j]
        row_of_M[j] = i
        col_of_N[i] = j
        if other >= 0:
            col_of_N[other] = -1
            stack_N[free - 1] = other
        else:
            free -= 1
        made += 1
    return free, made


@compiled
def _up(heap, place_M, dist_M, at):
    j = heap[at]
    while at > 0:
        above = (at - 1) // 2
        if dist_M[heap[above]] <= dist_M[j]:
            break
        heap[at] = heap[above]
        place_M[heap[at]] = at
        at = above
    heap[at] = j
    place_M[j] = at


@compiled
def _down(heap, place_M, dist_M, size):
    at, j = 0, heap[0]
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and dist_M[heap[below + 1]] < dist_M[heap[below]]:
            below += 1
        if dist_M[heap[below]] >= dist_M[j]:
            break
        heap[at] = heap[below]
        place_M[heap[at]] = at
        at = below
    heap[at] = j
    place_M[j] = at


@compiled
def augment(start_N1, cols_E, w_E, price_M, worth_N, col_of_N, row_of_M, dist_M, from_M, place_M, heap_M, seen_M, begin, most):
    """Shortest augmenting paths (Jonker & Volgenant 1987) from the free rows `begin` …, until about `most` columns were looked at.

    Reduced costs worth_i + price_j - w_ij are never negative and 0 on pairs. `dist_M` is inf and `place_M` -1 between two paths.
    Returns the next row to look at; N when every row has a column.
    """
    work = 0
    for i0 in range(begin, len(col_of_N)):
        if col_of_N[i0] >= 0:
            continue
        if work >= most:
            return i0
        i, reached, size, seen, touched = i0, 0.0, 0, 0, 0
        end = -1
        while True:
            for e in range(start_N1[i], start_N1[i + 1]):
                j = cols_E[e]
                if place_M[j] == -2:
                    continue
                d = reached + max(worth_N[i] + price_M[j] - w_E[e], 0.0)
                if d < dist_M[j]:
                    dist_M[j] = d
                    from_M[j] = i
                    if place_M[j] == -1:
                        heap_M[size] = j
                        place_M[j] = size
                        size += 1
                    _up(heap_M, place_M, dist_M, place_M[j])
            if size == 0:
                return -1  # no column can be reached: the graph has no matching of all rows
            j = heap_M[0]
            size -= 1
            if size > 0:
                heap_M[0] = heap_M[size]
                place_M[heap_M[0]] = 0
                _down(heap_M, place_M, dist_M, size)
            place_M[j] = -2
            seen_M[seen] = j
            seen += 1
            reached = dist_M[j]
            if row_of_M[j] < 0:
                end = j
                break
            i = row_of_M[j]
        work += seen + 1
        for s in range(seen):
            j = seen_M[s]
            if j != end:
                price_M[j] += reached - dist_M[j]
                worth_N[row_of_M[j]] -= reached - dist_M[j]
        worth_N[i0] -= reached
        for s in range(seen):
            dist_M[seen_M[s]] = np.inf
            place_M[seen_M[s]] = -1
        for s in range(size):
            dist_M[heap_M[s]] = np.inf
            place_M[heap_M[s]] = -1
        j = end
        while True:
            i = from_M[j]
            before = col_of_N[i]
            col_of_N[i] = j
            row_of_M[j] = i
            if i == i0:
                break
            j = before
    return len(col_of_N)


@compiled
def greedy(order_E, row_E, cols_E, col_of_N, row_of_M):
    """The best edge first, then the best that is left …"""
    for e in order_E:
        i, j = row_E[e], cols_E[e]
        if col_of_N[i] < 0 and row_of_M[j] < 0:
            col_of_N[i] = j
            row_of_M[j] = i
