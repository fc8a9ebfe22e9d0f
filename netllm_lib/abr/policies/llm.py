"""The fine-tuned LLM as a policy.

Sound by default: argmax, context cleared per trace, N traces in lock-step. `EvalConfig.upstream()` tests as the original does.
Source: NetLLM, `plm_special/test.py`, `evaluate.py` and `OfflineRLPolicy.sample`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.plm import InferenceWeights, TokenCache, arithmetic_dtype
from netllm_lib.runs import plain, tree_hash

if TYPE_CHECKING:
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.checkpoint import CheckpointMeta


@dataclass(frozen=True)
class EvalConfig:
    """How a fine-tuned LLM is tested."""

    # --- which level
    choose: Literal["argmax", "sample"] = "argmax"
    draws: Literal["trace", "stream"] = "trace"
    """Random numbers for sampling: a seeded stream for each trace, or as in the original one `random.choices` stream over
    all traces in playing order, 48 draws a trace."""
    dropout: bool = False
    """On in the original's evaluations while training, off in its test afterwards."""

    # --- what it sees
    context: Literal["clear", "leak"] = "clear"
    """"leak": a trace begins with the end of the previous one in its context, as in the original; traces are then played one
    after the other."""
    context_window: Literal["cached", "rolling"] = "cached"
    """"rolling" recomputes the last w steps for every decision, as in training and in the original. "cached" computes
    each token once: about 16 times less work. Up to decision w + 1 both are the same function, and both take the cache, but for
    `upstream()`. Later ones are the same too when w covers the whole episode; otherwise cached is an approximation, because a
    token's hidden state still reflects steps that have left the window. Each new token attends to the last w steps in either
    case."""
    keep_context: bool = False
    """With context="leak": an evaluation begins with the context in which the previous one by this `LLMPolicy` ended, as those
    during the original's training do, which are all one policy's."""
    w: int | None = None  # previous steps in the context; None: as trained
    cut_to_hidden: bool = False  # the original keeps only the last `hidden` tokens, which matters below 8 w + 7
    target_return_scale: float = 1.0  # factor on the training pool's largest return-to-go
    extra_step: bool = False  # decide once more after the last chunk, as the original does, with an untrained timestep

    # --- how it is computed
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the PLM's weights while testing; "float32" keeps the weights as loaded, "auto" is bfloat16 where that is faster."""
    merge_lora: bool = True  # add LoRA into the weights for the test; rounds differently by about 1e-6

    def __post_init__(self) -> None:
        if self.context == "leak" and self.context_window == "cached":
            raise ValueError('context="leak" goes on for ever and needs context_window="rolling"')

    @classmethod
    def upstream(cls, in_training: bool = False, **changes: Any) -> EvalConfig:
        """As the original tests (`--test`); `in_training`: as it evaluates while training (`--adapt`), with dropout on."""
        original = cls("sample", "stream", in_training, "leak", "rolling", cut_to_hidden=True, extra_step=True)
        return replace(original, **{"keep_context": in_training, "merge_lora": False, **changes})


class LLMPolicy(Policy):
    """A `PolicyNetwork` that chooses levels. `meta` says how it was trained: window, reward range, target return."""

    block = 512  # the cache of as many episodes is in memory at once
    windows = 16  # so many are recomputed at once: more take memory and are not faster
    _target: np.ndarray  # [N] return-to-go that the next decision is conditioned on

    def __init__(
        self,
        network: PolicyNetwork,
        meta: CheckpointMeta,
        config: EvalConfig | None = None,
        name: str = "llm",
        folder: Path | None = None,
    ):
        self.network, self.config, self.name, self.folder = network, config or EvalConfig(), name, folder
        self.scale, self.w = meta.settings.scale, self.config.w or meta.settings.w
        self.carries_state, self.acts_after_last = self.config.context == "leak", self.config.extra_step
        self._cached = self.config.context_window == "cached"
        # until something leaves the window, a cache holds what a rolling window recomputes
        recomputes = self.carries_state or self.config.dropout or self.config.cut_to_hidden
        self._grows = network.plm.causal and not recomputes
        if self._cached and not network.plm.causal:
            raise ValueError(f'{network.plm.family} is not causal and cannot be cached: use context_window="rolling"')
        self._check_length()
        self._weights: InferenceWeights | None = None
        self._cache: TokenCache | None = None
        self._clear()

    def _check_length(self) -> None:
        """Refuse a PLM that has too few positions, opt for one, before anything is played."""
        plm, decisions = self.network.plm, self.network.config.max_timestep + 1 + self.config.extra_step
        if not self._cached:
            decisions = self.w + 1 if self.carries_state else min(self.w + 1, decisions)
        tokens = self.network.context_tokens(decisions)
        rolling = 'use context_window="rolling", which needs fewer, or another PLM'
        remedy = rolling if self._cached else "use a smaller w or another PLM"
        plm.check_length(min(tokens, plm.hidden_size) if self.config.cut_to_hidden else tokens, remedy)

    def reset(self, episodes: Episodes) -> None:
        """Draws the sampling stream ahead and prepares the weights (they may have been trained since the last test)."""
        config, plm = self.config, self.network.plm
        if config.choose == "sample":  # float64 [trace, decision] in [0, 1)
            stream = random.Random(episodes.seed)
            self._uniform = np.array(
                [[stream.random() for _ in range(CHUNKS)] for _ in range(len(episodes))]
                if config.draws == "stream"
                else [np.random.default_rng((episodes.seed, int(i))).random(CHUNKS) for i in episodes.trace_index]
            )
        if config.dropout:
            torch.manual_seed(episodes.seed)
        dtype = arithmetic_dtype(config.precision, plm.device)
        merge = config.merge_lora and not config.dropout  # LoRA has a dropout of its own
        self._weights = plm.inference_weights(dtype, merge) if dtype is not None or merge else None
        if not config.keep_context:
            self._clear()

    def _clear(self) -> None:
        """Forget all steps. A step is its tokens [N, tokens_per_step, hidden]; the oldest comes first."""
        self._steps: list[torch.Tensor] = []

    def act(self, observation: Observation) -> np.ndarray:
        """Levels [N]. The first call of a trace (chunk 1) is timestep 0; the reward of chunk 0 is never subtracted."""
        if observation.chunk == 1:
            self._begin(len(observation.episode))
        else:
            self._target = self._target - self.scale.normalise(observation.last_reward)
        training = self.network.training
        self.network.train(self.config.dropout)
        try:
            with torch.inference_mode(), self.network.plm.using(self._weights):
                self._remember(observation)
                logits = self._logits(observation.chunk)
        finally:
            self.network.train(training)
        self.logits = logits.float().cpu().numpy()
        self.probabilities = torch.softmax(torch.from_numpy(self.logits), dim=-1).numpy()
        levels = self._choose(observation)
        self.played(levels)
        return levels

    def played(self, levels: np.ndarray) -> None:
        """What the next decision remembers as the last action."""
        actions = torch.from_numpy(np.asarray(levels, dtype=np.int64)).to(self.network.device)
        with torch.inference_mode():
            self._steps[-1] = self.network.with_action(self._steps[-1], actions, self._timesteps)

    def extras(self) -> Mapping[str, np.ndarray]:
        """Probabilities p0 … p5 and the return-to-go that the decision was conditioned on."""
        return {**{f"p{i}": column for i, column in enumerate(self.probabilities.T)}, "return_to_go": self._target}

    def facts(self) -> Mapping[str, Any]:
        """The fields of `EvalConfig`, and the checkpoint's folder with the hash of its files, where it came from one."""
        facts = plain(self.config)
        if self.folder is not None:
            inner = self.folder / "policy"
            facts |= {"policy": str(self.folder), "policy_hash": tree_hash(inner if inner.is_dir() else self.folder)}
        return facts

    def _begin(self, episodes: int) -> None:
        if self.config.context == "clear":
            self._clear()
        if self._cached or self._grows:
            network, steps = self.network, self.network.config.max_timestep + 2
            attend = network.context_tokens(self.w + 1)
            self._cache = network.plm.new_cache(steps * network.tokens_per_step, attend)
        self._target = np.full(episodes, self.scale.target_return * self.config.target_return_scale)

    def _remember(self, observation: Observation) -> None:
        """Add the current step, its action still open, and forget what is older than the window."""
        timestep, longest = observation.chunk - 1, self.network.config.max_timestep + 1
        if timestep > longest:
            raise ValueError(
                f"decision {observation.chunk} of an episode; the policy was trained on episodes of {longest} decisions"
            )
        state, target = (torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in (observation.state, self._target))
        self._timesteps = torch.full((len(target),), timestep, device=self.network.device)
        open_action = torch.zeros_like(self._timesteps)
        step = (state, open_action, target, self._timesteps)
        self._steps.append(self.network.embed(*(part.to(self.network.device).unsqueeze(1) for part in step)))
        del self._steps[: -2 if self._cached else -self.w - 1]

    def _logits(self, chunk: int) -> torch.Tensor:  # [N, 6]
        network = self.network
        if not self._cached and chunk > self.w + 1:
            self._cache = None
        # the action of the current step is what is asked for
        tokens = torch.cat(self._steps[-2:] if self._cache else self._steps, dim=1)
        tokens = tokens[:, : network.context_tokens(tokens.shape[1] // network.tokens_per_step)]
        if self._cache:  # the previous action, then the current step
            return network.decide(tokens[:, -network.tokens_per_step :], self._cache)
        if self.config.cut_to_hidden:
            tokens = tokens[:, -network.plm.hidden_size :]
        return torch.cat([network.decide(part) for part in tokens.split(self.windows)])

    def _choose(self, observation: Observation) -> np.ndarray:
        if self.config.choose == "argmax":
            return self.logits.argmax(axis=1)
        # random.choices: running sums in float32, total and product in float64, the first sum that is larger
        sums = np.cumsum(self.probabilities, axis=1, dtype=np.float32)
        threshold = self._uniform[observation.episode, observation.chunk - 1] * sums[:, -1].astype(np.float64)
        return (sums[:, :-1].astype(np.float64) <= threshold[:, None]).sum(axis=1)
