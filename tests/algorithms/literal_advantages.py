"""Advantages and returns as their formulas have them: float64, double loops, one sequence each."""

import math
from itertools import product


def mean(xs):
    return math.fsum(xs) / len(xs)


def std(xs):
    m = mean(xs)
    return math.sqrt(math.fsum((x - m) ** 2 for x in xs) / len(xs))


# Of the rewards of one group.


def mean_centered(R):
    return [R[i] - mean(R) for i in range(len(R))]


def grpo(R):
    return [(R[i] - mean(R)) / (std(R) + 1e-6) for i in range(len(R))]


def rloo(R):
    G = len(R)
    return [R[i] - math.fsum(R[j] for j in range(G) if j != i) / (G - 1) for i in range(G)]


def max_rl(R):
    return [(R[i] - mean(R)) / mean(R) for i in range(len(R))]


def optimal_off_policy_baseline(R, w, g):
    above, below = 0.0, 0.0
    for j in range(len(R)):
        above += w[j] ** 2 * g[j] * R[j]
        below += w[j] ** 2 * g[j]
    return [R[i] - above / below for i in range(len(R))]


# Of the rewards of a batch of groups.


def group_centered(R, group):
    centered = []
    for i in range(len(R)):
        of_group = [R[j] for j in range(len(R)) if group[j] == group[i]]
        centered.append(R[i] - mean(of_group))
    return centered


def batch_normalized(R, group):
    A = group_centered(R, group)
    return [A[i] / (std(A) + 1e-6) for i in range(len(R))]


def reinforce_plus_plus(R, group):
    return [(R[i] - mean(R)) / (std(R) + 1e-6) for i in range(len(R))]


def reinforce_plus_plus_baseline(R, group):
    A = group_centered(R, group)
    return [(A[i] - mean(A)) / (std(A) + 1e-6) for i in range(len(R))]


def global_baseline(R, group):
    return [R[i] - mean(R) for i in range(len(R))]


# Of one sequence of T tokens; V has T + 1 entries, the last that of the state after it.


def td_errors(R, V, gamma):
    return [R[t] + gamma * V[t + 1] - V[t] for t in range(len(R))]


def gae(R, V, gamma, lam):
    """lam: one for every token. Advantages, targets."""
    delta, T, A = td_errors(R, V, gamma), len(R), []
    for t in range(T):
        A.append(0.0)
        for k in range(t, T):
            A[t] += math.prod(gamma * lam[i] for i in range(t, k)) * delta[k]
    return A, [A[t] + V[t] for t in range(T)]


def turn_level_gae(R, V, turn, gamma, lam):
    """turn: number of the turn of each token, from 0. Advantages, targets of every token."""
    T, I = len(R), max(turn, default=-1) + 1  # noqa: E741
    first = [min(t for t in range(T) if turn[t] == i) for i in range(I)]
    R_turn = [sum(R[t] for t in range(T) if turn[t] == i) for i in range(I)]
    V_turn = [V[first[i]] for i in range(I)] + [V[T]]
    A, G = gae(R_turn, V_turn, gamma, [lam] * I)
    return [A[turn[t]] for t in range(T)], [G[turn[t]] for t in range(T)]


def skip_observation_gae(R, V, V_end, gamma, lam):
    """R, V: rewards and values of the tokens of every action. Advantages of the same form.

    Two cases as in the source: within an action, and from its last token to the next one's first.
    """
    A = [[math.nan] * len(tokens) for tokens in R]
    for i in reversed(range(len(R))):
        for n in reversed(range(len(R[i]))):
            if n + 1 < len(R[i]):
                V_next, A_next = V[i][n + 1], A[i][n + 1]
            elif i + 1 < len(R):
                V_next, A_next = V[i + 1][0], A[i + 1][0]
            else:
                V_next, A_next = V_end, 0.0
            A[i][n] = R[i][n] + gamma * V_next - V[i][n] + gamma * lam * A_next
    return A


def vtrace(R, V, w, gamma, lam, rho_cap, c_cap):
    """Targets, advantages with and without rho."""
    T, delta = len(R), td_errors(R, V, gamma)
    rho = [min(rho_cap, w[t]) for t in range(T)]
    c = [lam * min(c_cap, w[t]) for t in range(T)]
    v = []
    for s in range(T):
        v.append(V[s])
        for t in range(s, T):
            v[s] += gamma ** (t - s) * math.prod(c[i] for i in range(s, t)) * rho[t] * delta[t]
    v_next = [*v[1:], V[T]]
    unweighted = [R[s] + gamma * v_next[s] - V[s] for s in range(T)]
    return v, [rho[s] * unweighted[s] for s in range(T)], unweighted


def retrace(R, V, w, gamma, lam):
    """Advantages, targets."""
    T, delta, A = len(R), td_errors(R, V, gamma), []
    c = [lam * min(1.0, w[t]) for t in range(T)]
    for t in range(T):
        A.append(0.0)
        for k in range(t, T):
            A[t] += gamma ** (k - t) * math.prod(c[i] for i in range(t + 1, k + 1)) * delta[k]
    return A, [V[t] + min(1.0, w[t]) * A[t] for t in range(T)]


def reinforce_plus_plus_returns(R, KL, beta, gamma):
    T, G = len(R), [0.0] * len(R)
    for t, k in product(range(T), range(T)):
        if k >= t:
            G[t] += gamma ** (k - t) * (R[k] - beta * KL[k])
    return G
