"""The optimizers in plain numpy float64: one parameter at a time, each line a line of the published algorithm.

Nothing here is shared with `optim`. A reference holds one parameter `w` and its state; `step(grad)` updates them.
Matrix optimizers flatten an `(out, in, kh, kw)` kernel to `out × (in · kh · kw)`. `lr` may be set between steps.
"""

from __future__ import annotations

import numpy as np


def lerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    return a + weight * (b - a)


def inverse_root(matrix: np.ndarray, power: float) -> np.ndarray:
    """`matrix ** -power` of a symmetric positive semi-definite matrix; numerically zero eigenvalues are dropped."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = eigenvalues > eigenvalues.max(initial=0.0) * len(matrix) * 1e-14
    roots = np.zeros_like(eigenvalues)
    roots[kept] = eigenvalues[kept] ** -power
    return (vectors * roots) @ vectors.T


# Typed from Amsel et al., arXiv 2505.16932, apart from the implementation's table; the last one is for all later steps.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
NEWTON_SCHULZ = (2.0, -1.5, 0.5)


def polar_express(steps: int) -> list[tuple[float, float, float]]:
    """The coefficients of each step: all but the last of the table are damped."""
    damped = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [damped[step] if step < len(damped) else POLAR_EXPRESS[-1] for step in range(steps)]


def coupled_inverse_sqrt(matrix: np.ndarray, coefficients: list[tuple[float, float, float]], eps: float) -> np.ndarray:
    """Each `(a, b, c)` is a step of the coupled iteration; it ends near `matrix ** -1/2` if there are enough."""
    scale = 1.01 * np.linalg.norm(matrix + eps * np.eye(len(matrix)))
    y, z = matrix / scale, np.eye(len(matrix))
    for a, b, c in coefficients:
        t = z @ y
        polynomial = b * t + c * t @ t
        y, z = a * y + y @ polynomial, a * z + polynomial @ z
    return z / np.sqrt(scale)


def rescaled(update: np.ndarray, norm: float) -> np.ndarray:
    """`update` with the Frobenius norm `norm`; a zero update stays zero."""
    length = np.linalg.norm(update)
    return update * (norm / length) if length > 0 else np.zeros_like(update)


class Reference:
    """A parameter and how many times it was updated."""

    def __init__(self, w: np.ndarray, lr: float, weight_decay: float) -> None:
        self.shape = w.shape
        self.w = self.view(np.array(w, dtype=np.float64))
        self.lr, self.weight_decay = float(lr), weight_decay
        self.t = 0

    def view(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array), -1)

    @property
    def parameter(self) -> np.ndarray:
        return self.w.reshape(self.shape)

    def step(self, grad: np.ndarray) -> None:
        self.t += 1
        update = self.update(self.view(np.array(grad, dtype=np.float64)))
        self.w = (1 - self.lr * self.weight_decay) * self.w - self.lr * update

    def update(self, g: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class ASGO(Reference):
    """arXiv 2503.20762, Algorithm 2; the root is exact, on the range of V."""

    def __init__(
        self, w, lr=1e-2, momentum=0.9, beta2=0.8, eps=1e-10, weight_decay=0.1, root_method="auto",
        root_steps=10, precond_frequency=1, root_precision="bf16",
    ):  # fmt: skip
        super().__init__(w, lr, weight_decay)
        self.momentum, self.beta2, self.frequency = momentum, beta2, precond_frequency
        m, n = self.w.shape
        self.M, self.V = np.zeros((m, n)), np.zeros((min(m, n), min(m, n)))

    def update(self, g):
        m, n = g.shape
        self.M = lerp(self.M, g, 1 - self.momentum)
        self.V = lerp(self.V, g @ g.T if m < n else g.T @ g, 1 - self.beta2)
        if (self.t - 1) % self.frequency == 0:
            self.root = inverse_root(self.V, 1 / 2)
        u = self.root @ self.M if m < n else self.M @ self.root
        return rescaled(u, 0.2 * np.sqrt(m * n))


class DASGO(Reference):
    """arXiv 2503.20762, Algorithm 4."""

    def __init__(self, w, lr=1e-2, momentum=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1):
        super().__init__(w, lr, weight_decay)
        self.momentum, self.beta2, self.eps = momentum, beta2, eps
        self.M, self.v = np.zeros(self.w.shape), np.zeros(self.w.shape[1])

    def update(self, g):
        self.M = lerp(self.M, g, 1 - self.momentum)
        self.v = lerp(self.v, (g**2).sum(axis=0), 1 - self.beta2)
        return rescaled(self.M / np.sqrt(self.v + self.eps), 0.2 * np.sqrt(g.size))


class Muon(Reference):
    def __init__(
        self, w, lr=1e-2, momentum=0.9, nesterov=False, ns_steps=5, weight_decay=0.1,
        ns_coefficients=(3.4445, -4.7750, 2.0315), adjust_lr_fn="match_rms_adamw",
    ):  # fmt: skip
        super().__init__(w, lr, weight_decay)
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.coefficients, self.original = ns_coefficients, adjust_lr_fn == "original"
        self.M = np.zeros(self.w.shape)

    def update(self, g):
        self.M = lerp(self.M, g, 1 - self.momentum)
        x = lerp(g, self.M, self.momentum) if self.nesterov else self.M
        scale = np.sqrt(max(1, g.shape[0] / g.shape[1])) if self.original else 0.2 * np.sqrt(max(g.shape))
        return scale * newton_schulz_orthogonalization(x, self.ns_steps, self.coefficients)


def newton_schulz_orthogonalization(
    x: np.ndarray, steps: int, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
) -> np.ndarray:
    if x.shape[0] > x.shape[1]:
        return newton_schulz_orthogonalization(x.T, steps, coefficients).T
    a, b, c = coefficients
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Shampoo(Reference):
    """arXiv 1802.09568 with moving averages and Adam's norm. Its roots are of `L + eps I`: nothing is dropped."""

    def __init__(
        self, w, lr=5e-3, momentum=0.9, beta2=0.999, eps=1e-10, weight_decay=0.1, precond_frequency=1, exponent=-1 / 4
    ):  # fmt: skip
        super().__init__(w, lr, weight_decay)
        self.power = -exponent
        self.momentum, self.beta2, self.eps, self.frequency = momentum, beta2, eps, precond_frequency
        m, n = self.w.shape
        self.M, self.v, self.L, self.R = (
            np.zeros((m, n)),
            np.zeros((m, n)),
            np.zeros((m, m)),
            np.zeros((n, n)),
        )

    def update(self, g):
        m, n = g.shape
        self.M = lerp(self.M, g, 1 - self.momentum)
        self.v = lerp(self.v, g**2, 1 - self.beta2)
        self.L = lerp(self.L, g @ g.T, 1 - self.beta2)
        self.R = lerp(self.R, g.T @ g, 1 - self.beta2)
        if (self.t - 1) % self.frequency == 0:
            self.left = inverse_root(self.L + self.eps * np.eye(m), self.power)
            self.right = inverse_root(self.R + self.eps * np.eye(n), self.power)
        grafted = np.linalg.norm(self.M / np.sqrt(self.v + self.eps))
        return rescaled(self.left @ self.M @ self.right, grafted)


class ScaledAdam(Reference):
    """What Asro and AccAsro share: Adam's bias-corrected step times a scale for each element."""

    def __init__(self, w, lr, scale_start_step, betas, eps, weight_decay):
        super().__init__(w, lr, weight_decay)
        self.start, self.betas, self.eps = scale_start_step, betas, eps
        self.m, self.v, self.s = np.zeros(self.w.shape), np.zeros(self.w.shape), np.ones(self.w.shape)

    def view(self, array):
        return array

    def update(self, g):
        beta1, beta2 = self.betas
        old_sign = np.sign(self.m)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        moment_flipped = (np.sign(self.m) == -old_sign) & (old_sign != 0)
        self.change_scale(g, moment_flipped)
        m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        return m_hat * self.s / (np.sqrt(v_hat) + self.eps)

    def change_scale(self, g, moment_flipped):
        raise NotImplementedError


class Asro(ScaledAdam):
    """ "Asro: Sign-Based Optimization for Stochastic Learning", Algorithm 1."""

    def __init__(
        self, w, lr, decrement, min_scale, scale_start_step=0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    ):  # fmt: skip
        super().__init__(w, lr, scale_start_step, betas, eps, weight_decay)
        self.decrement, self.min_scale = decrement, min_scale

    def change_scale(self, g, moment_flipped):
        if self.t >= self.start:
            self.s = np.clip(np.where(moment_flipped, self.s - self.decrement, self.s), self.min_scale, 1.0)


class AccAsro(ScaledAdam):
    """Asro with a scale that also grows, and a saved scale to fall back to when the gradient turns."""

    def __init__(
        self, w, lr, increment, decrement, max_scale, min_scale, total_steps, scale_start_step=0,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
    ):  # fmt: skip
        super().__init__(w, lr, scale_start_step, betas, eps, weight_decay)
        self.increment, self.decrement, self.total_steps = increment, decrement, total_steps
        self.min_scale, self.max_scale = min_scale, max_scale
        self.saved, self.last_sign = np.ones(self.w.shape), np.zeros(self.w.shape)

    def change_scale(self, g, moment_flipped):
        sign = np.sign(g)
        gradient_flipped = (sign == -self.last_sign) & (sign != 0)
        self.last_sign = sign
        if self.t < self.start:
            return
        self.s = np.where(gradient_flipped, self.saved, self.s)
        self.s = np.where(moment_flipped, self.s - self.decrement, self.s)
        self.saved = np.where(moment_flipped, self.s, self.saved)
        grown = self.s + self.increment * max(0.0, 1.01 - self.t / self.total_steps)
        self.s = np.where(gradient_flipped, self.s, grown)
        self.s = np.clip(self.s, self.min_scale, self.max_scale)


class Adam(ScaledAdam):
    """The fallback of the matrix optimizers: the scale stays 1."""

    def __init__(self, w, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        super().__init__(w, lr, 0, betas, eps, weight_decay)

    def change_scale(self, g, moment_flipped):
        pass
