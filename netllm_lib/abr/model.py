"""The network around the PLM: a decision transformer for bitrate levels.

A step of an episode is eight tokens, in this order:

    return-to-go, level, buffer, throughput, delay, next sizes, chunks remaining, action

The six in the middle are the rows of the Pensieve state. The action of a step is predicted at the token before it (index
8·i + 6), which has seen the step's return and state but not its action. Source: NetLLM, `plm_special/models/rl_policy.py`
and `state_encoder.py`; module names are those of the original, so that its files map one to one.

With `NetworkConfig(tokens="step")` a step is one token, the sum of its six state embeddings: an eighth of the work. Return-to-go
and action have no token then: the one is of no use to a policy that predicts values, the other is in the next state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netllm_lib.abr.qoe import LEVELS
from netllm_lib.checkpoint import CheckpointMeta, load_checkpoint
from netllm_lib.linear import use_fast_linear
from netllm_lib.plm import PLM, TokenCache
from netllm_lib.returns import ReturnScale
from netllm_lib.task import Network

TOKENS_PER_STEP = 8
FEATURES = HISTORY = 6  # rows and columns of the state
TAPS = 4  # width of the convolutions over past throughput and delay
EMBEDDERS = "embed_state1 embed_state2 embed_state3 embed_state4 embed_state5 embed_state6"


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network around the PLM."""

    state_feature_dim: int = 256
    max_timestep: int = 46
    """Largest timestep in training; the table has two rows more, one for the original's extra step."""
    timestep_init: float = 1.0
    """Standard deviation of the initial timestep embeddings. At 1, as in the original, they swamp the small state embeddings at
    first; 0.02 helps at a learning rate of 1e-3 for all, and hurts with 1e-2 for the modules around the PLM."""
    seed: int = 1  # of the initial weights
    tokens: Literal["parts", "step"] = "parts"
    """"parts": eight tokens a step, as in the original. "step": one."""

    def __post_init__(self) -> None:
        if self.state_feature_dim < 1 or self.max_timestep < 0:
            raise ValueError(f"state_feature_dim={self.state_feature_dim}, max_timestep={self.max_timestep}: too small")


@dataclass(frozen=True)
class PolicySettings:
    """What a test must know of the training beside the weights."""

    w: int  # transitions in a training window
    scale: ReturnScale  # reward range, target return, gamma, return scale, longest episode, pool hash

    def __post_init__(self) -> None:
        if self.w < 1:
            raise ValueError(f"w={self.w}: must be at least 1")

    @property
    def pool_hash(self) -> str:
        return self.scale.pool_hash


class Batch(NamedTuple):
    """Training windows as the network takes them."""

    states: torch.Tensor  # float32 [batch, w, 6, 6]
    actions: torch.Tensor  # int64 [batch, w] levels
    returns: torch.Tensor  # float32 [batch, w] return-to-go, scaled
    timesteps: torch.Tensor  # int64 [batch, w]
    mask: torch.Tensor | None  # bool [batch, w], False for the padding that ends a short window; None: there is none
    targets: torch.Tensor
    """Int64 [batch, w]: the level to predict, by cross-entropy; or float32 [batch, w, 6]: a number for every level, by the
    squared error."""
    weights: torch.Tensor | None = None  # float32 [batch, w]: how much each step counts; None: all the same

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


class StateEncoder(nn.Module):
    """Six features of a state: three numbers through a linear layer, three series through a convolution."""

    def __init__(self, dim: int):
        super().__init__()

        def number() -> nn.Module:
            return nn.Sequential(nn.Linear(1, dim), nn.LeakyReLU())

        def series(taps: int) -> nn.Module:
            return nn.Sequential(nn.Conv1d(1, dim, taps), nn.LeakyReLU(), nn.Flatten())

        self.fc1, self.fc2 = number(), number()  # level of the last chunk, buffer
        self.conv3, self.conv4 = series(TAPS), series(TAPS)  # past throughput, past delays
        self.conv5, self.fc6 = series(HISTORY), number()  # sizes of the next chunk, chunks remaining

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Features of `states` [n, 6, 6]: [n, dim] each, but [n, 3·dim] for throughput and delay."""
        layers = (self.fc1, self.fc2, self.conv3, self.conv4, self.conv5, self.fc6)
        return [
            layer(states[:, row, -1:] if row in (0, 1, 5) else states[:, row : row + 1])
            for row, layer in enumerate(layers)
        ]


class PolicyNetwork(Network):
    """Encoders, PLM and action head. `forward` is for training, `decide` for one decision after a context."""

    task, Config, Settings = "abr", NetworkConfig, PolicySettings

    def __init__(self, plm: PLM, config: NetworkConfig | None = None):
        super().__init__()
        self.config = config = config or NetworkConfig()
        self.plm = plm
        hidden, dim = plm.hidden_size, config.state_feature_dim
        positions = HISTORY - TAPS + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.state_encoder = StateEncoder(dim)
            self.embed_timestep = nn.Embedding(config.max_timestep + 2, hidden)
            self.embed_return, self.embed_action = nn.Linear(1, hidden), nn.Linear(1, hidden)
            self.embed_ln = nn.LayerNorm(hidden)
            for name, parts in zip(EMBEDDERS.split(), (1, 1, positions, positions, 1, 1), strict=True):
                setattr(self, name, nn.Linear(dim * parts, hidden))
            self.action_head = nn.Linear(hidden, LEVELS)
            with torch.no_grad():
                self.embed_timestep.weight.mul_(config.timestep_init)
        for module in self.around_plm().values():
            module.to(plm.device)
            if plm.config.attention == "fast":
                use_fast_linear(module)

    @property
    def tokens_per_step(self) -> int:
        """8, or 1 with `tokens="step"`."""
        return TOKENS_PER_STEP if self.config.tokens == "parts" else 1

    def context_tokens(self, steps: int) -> int:
        """Tokens of so many steps, of which the last has no action yet: what a decision sees."""
        return self.tokens_per_step * (steps - 1) + max(1, self.tokens_per_step - 1)

    def around_plm(self) -> dict[str, nn.Module]:
        """All modules but the PLM, by name, in the order in which the original stores them."""
        names = "state_encoder embed_timestep embed_return embed_action embed_ln " + EMBEDDERS + " action_head"
        return {name: getattr(self, name) for name in names.split()}

    def embed(
        self,
        states: torch.Tensor,  # [batch, steps, 6, 6]
        actions: torch.Tensor,  # [batch, steps] levels
        returns: torch.Tensor,  # [batch, steps] return-to-go, scaled
        timesteps: torch.Tensor,  # [batch, steps]
    ) -> torch.Tensor:  # [batch, steps · tokens_per_step, hidden]
        """The tokens of all steps in the PLM's order, after the common LayerNorm."""
        batch, steps = actions.shape
        # In half precision a return-to-go would have two digits: these small layers stay in float32.
        with torch.autocast(self.device.type, enabled=False):
            time = self.embed_timestep(timesteps)  # [batch, steps, hidden]
            features = self.state_encoder(states.reshape(batch * steps, FEATURES, HISTORY).float())
            embedded = [getattr(self, name)(part) for name, part in zip(EMBEDDERS.split(), features, strict=True)]
            state = [part.view(batch, steps, -1) for part in embedded]
            if self.config.tokens == "step":
                return self.embed_ln(torch.stack(state).sum(dim=0) + time)
            action = self.embed_action((actions.float().unsqueeze(-1) + 1) / LEVELS)
            tokens = [self.embed_return(returns.float().unsqueeze(-1)), *state, action]
            stacked = torch.stack(tokens, dim=2) + time.unsqueeze(2)  # [batch, steps, 8, hidden]
            return self.embed_ln(stacked.view(batch, steps * TOKENS_PER_STEP, -1))

    def with_action(self, tokens: torch.Tensor, actions: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The tokens [batch, tokens_per_step, hidden] of one step, with these levels [batch] as its action."""
        if self.config.tokens == "step":
            return tokens
        action = self.embed_action((actions.float()[:, None, None] + 1) / LEVELS)
        return torch.cat([tokens[:, :-1], self.embed_ln(action + self.embed_timestep(timesteps)[:, None])], dim=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [batch, steps, 6] of the action of every step, given the steps up to it."""
        tokens = self.embed(batch.states, batch.actions, batch.returns, batch.timesteps)
        mask = None if batch.mask is None else batch.mask.repeat_interleave(self.tokens_per_step, dim=1)
        read = slice(self.context_tokens(1) - 1, None, self.tokens_per_step)
        return self._head(self.plm(tokens, token_mask=mask, read=read))

    def loss(self, batch: Batch, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, int]:
        """Sum over the steps that count of their cross-entropy or squared error, each times its weight, and their number."""
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = self(batch)
        predicted, targets = counting(logits, batch), counting(batch.targets, batch)
        if targets.is_floating_point():
            losses = (predicted - targets).square().mean(dim=-1)
        else:
            losses = cross_entropy(predicted, targets, reduction="none")
        if batch.weights is not None:
            losses = losses * counting(batch.weights, batch)
        return losses.sum(), len(losses)

    def decide(self, tokens: torch.Tensor, cache: TokenCache | None = None) -> torch.Tensor:
        """Logits [batch, 6] of the decision after `tokens` [batch, n, hidden], which end with the last state token.

        With a cache, `tokens` are only those that came since the previous decision.
        """
        return self._head(self.plm(tokens, cache=cache, read=slice(-1, None))[:, 0])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.action_head(hidden.float())

    def check(self, settings: PolicySettings) -> None:
        """Raise ValueError if the pool's episodes are longer than the timestep table."""
        longest = settings.scale.max_timestep
        if longest > self.config.max_timestep:
            made = f"the network was made for {self.config.max_timestep + 1}: set NetworkConfig(max_timestep={longest})"
            raise ValueError(f"the pool has episodes of {longest + 1} steps, {made}")

    @torch.no_grad()
    def rehearse(self, batch: Batch, dtype: torch.dtype | None) -> Any:
        """The last decision of 100 episodes in lock-step with a window as in `batch`; returns its cache."""
        w, steps = batch.actions.shape[1], self.config.max_timestep + 1
        merge = self.plm.has_lora and self.plm.config.dtype != "4bit"
        weights = self.plm.inference_weights(dtype, merge)
        cache, seen = None, w + 1
        if self.plm.causal:
            cache, seen = self.plm.new_cache((steps + 1) * self.tokens_per_step, self.context_tokens(w + 1)), 2
            cache.skip(self.context_tokens(steps - 1))
        levels = torch.zeros((100, seen), dtype=torch.long)
        with self.plm.using(weights):
            tokens = self.embed(torch.zeros(100, seen, FEATURES, HISTORY), levels, levels.float(), levels)
            tokens = tokens[:, : self.context_tokens(seen)]
            self.decide(tokens if cache is None else tokens[:, -self.tokens_per_step :], cache)
        return cache


def counting(steps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[labels, …] of [batch, w, …]: the steps that count, without the padding."""
    return steps.flatten(0, 1) if batch.mask is None else steps[batch.mask]


def load_policy(
    folder: Path, plm_source: str | None = None, device: str = "cpu", dtype: str | None = None
) -> tuple[PolicyNetwork, CheckpointMeta]:
    """A fine-tuned network, in evaluation mode, and its meta data, see `checkpoint.load_checkpoint`; `meta.settings` is a
    PolicySettings."""
    return load_checkpoint(folder, PolicyNetwork, plm_source, device, dtype)
