"""Random logprobs of sequences, and every correction at once, for tests of corrections."""

import dataclasses

import torch
from hypothesis import strategies as st

from skyrl_async.algorithms.composition import CorrectionSettings, correct
from skyrl_async.algorithms.tokens import LossTokens

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 10**6)

# Every mask on, at limits that reject some but not all tokens of the random batches below.
EVERYTHING = CorrectionSettings(
    weight="sequence",
    weight_cap=1.5,
    normalize_weights=True,
    token_mask=(0.5, 2.0),
    sequence_mask=(0.2, 5.0),
    geometric_mask=(0.7, 1.4),
    veto_below=0.3,
    k2_limit=0.2,
    k3_limit=0.2,
    k_level="sequence_mean",
    opsm_delta=0.02,
    m2_limit=0.05,
)


@dataclasses.dataclass
class Batch:
    """Random logprobs of sequences of given lengths, nested and flat."""

    lengths: list[int]
    seed: int
    spread: float = 0.4

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(self.lengths)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(total, generator=generator, dtype=torch.float64)

        self.behavior = -normal(1.5).abs() - 0.01
        self.proximal = self.behavior + normal(self.spread)
        self.current = self.proximal + normal(0.1)
        self.advantages = normal(1.0)
        self.num_sequences = len(self.lengths)
        self.ids = torch.arange(self.num_sequences).repeat_interleave(torch.tensor(self.lengths))
        self.log_ratios = self.proximal - self.behavior

    def nested(self, values: torch.Tensor) -> list[list]:
        return [part.tolist() for part in values.split(self.lengths)]

    def sequences(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.log_ratios, self.ids, self.num_sequences

    def correct(self, correction_settings: CorrectionSettings):
        return correct(
            self.log_ratios,
            advantages=self.advantages,
            sequence_ids=self.ids,
            num_sequences=self.num_sequences,
            settings=correction_settings,
        )

    def tokens(self, current: torch.Tensor) -> LossTokens:
        return LossTokens(
            current_logprobs=current,
            proximal_logprobs=self.proximal,
            behavior_logprobs=self.behavior,
            advantages=self.advantages,
            sequence_ids=self.ids,
            num_sequences=self.num_sequences,
        )


def flat(nested: list[list]) -> list:
    return [value for row in nested for value in row]
