"""Every record that crosses a component boundary, in the order in which data flows.

All records are frozen and checked when they are made; each stage makes a new record, so no field is
filled in later. Token data are numpy arrays that are made read-only here:

* ``token_ids``       int32   ``[T]``
* ``logprobs``        float32 ``[T]``, natural log, of ``softmax(logits / temperature)`` over the
  whole vocabulary, at the temperature that sampled the token
* ``policy_versions`` int32   ``[T]``, finished learner steps of the weights that sampled a token

Example: a two-turn trajectory of a guessing game. The prompt is 4 tokens, each reply is a number
and a stop token, and the weights were swapped from version 3 to version 4 between the replies::

    turn 0: observation_token_ids=[u g n a]  generation.token_ids=[5 .] policy_versions=[3 3]
    turn 1: observation_token_ids=[u hi a]   generation.token_ids=[8 .] policy_versions=[4 4]

The sequence to train on is the concatenation ``[u g n a 5 . u hi a 8 .]``; only ``5 . 8 .`` carry
loss.
"""

from skyrl_async.types.arrays import (
    BoolArray,
    Float32Array,
    Int32Array,
)
from skyrl_async.types.generations import (
    FinishReason,
    Generation,
    Turn,
)
from skyrl_async.types.headers import (
    AnyGroup,
    GroupHeader,
    TrajectoryHeader,
)
from skyrl_async.types.replay import (
    DepartedGroup,
    GroupFate,
    SampledBatch,
    SampledGroup,
    StoredGroup,
)
from skyrl_async.types.reports import (
    DroppedGroup,
    EvaluationResult,
    RolloutReport,
)
from skyrl_async.types.tasks import (
    Assignment,
    Sampling,
    Task,
)
from skyrl_async.types.training import (
    StepResult,
    TrainSequence,
    WeightManifest,
)
from skyrl_async.types.trajectories import (
    BYTES_PER_TOKEN,
    RECORD_OVERHEAD_BYTES,
    DropReason,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)

__all__ = [
    "BYTES_PER_TOKEN",
    "RECORD_OVERHEAD_BYTES",
    "AnyGroup",
    "Assignment",
    "BoolArray",
    "DepartedGroup",
    "DropReason",
    "DroppedGroup",
    "EvaluationResult",
    "FinishReason",
    "Float32Array",
    "Generation",
    "GroupFate",
    "GroupHeader",
    "Int32Array",
    "RolloutReport",
    "SampledBatch",
    "SampledGroup",
    "Sampling",
    "StepResult",
    "StoredGroup",
    "Task",
    "TrainSequence",
    "Trajectory",
    "TrajectoryGroup",
    "TrajectoryHeader",
    "TrajectoryStatus",
    "Turn",
    "WeightManifest",
]
