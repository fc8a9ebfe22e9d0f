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
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from netllm_lib.abr.qoe import LEVELS
from netllm_lib.plm import PLM, TokenCache

if TYPE_CHECKING:
    from netllm_lib.abr.batches import Batch

TOKENS_PER_STEP = 8
FEATURES = HISTORY = 6  # rows and columns of the state
TAPS = 4  # width of the convolutions over past throughput and delay


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


class StateEncoder(nn.Module):
    """Six features of a state: three numbers through a linear layer, three series through a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.fc1 = nn.Sequential(nn.Linear(1, dim), nn.LeakyReLU())  # level of the last chunk
        self.fc2 = nn.Sequential(nn.Linear(1, dim), nn.LeakyReLU())  # buffer
        self.conv3 = nn.Sequential(nn.Conv1d(1, dim, TAPS), nn.LeakyReLU(), nn.Flatten())  # past throughput
        self.conv4 = nn.Sequential(nn.Conv1d(1, dim, TAPS), nn.LeakyReLU(), nn.Flatten())  # past delays
        self.conv5 = nn.Sequential(nn.Conv1d(1, dim, HISTORY), nn.LeakyReLU(), nn.Flatten())  # sizes of the next chunk
        self.fc6 = nn.Sequential(nn.Linear(1, dim), nn.LeakyReLU())  # chunks remaining

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of `states` [n, 6, 6]: [n, dim] each, but [n, 3·dim] for throughput and delay."""
        return (
            self.fc1(states[:, 0, -1:]),
            self.fc2(states[:, 1, -1:]),
            self.conv3(states[:, 2:3]),
            self.conv4(states[:, 3:4]),
            self.conv5(states[:, 4:5]),
            self.fc6(states[:, 5, -1:]),
        )


class PolicyNetwork(nn.Module):
    """Encoders, PLM and action head. `forward` is for training, `decide` for one decision after a context."""

    def __init__(self, plm: PLM, config: NetworkConfig | None = None):
        super().__init__()
        config = config or NetworkConfig()
        self.config = config
        self.plm = plm
        hidden, dim = plm.hidden_size, config.state_feature_dim
        positions = HISTORY - TAPS + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.state_encoder = StateEncoder(dim)
            self.embed_timestep = nn.Embedding(config.max_timestep + 2, hidden)
            self.embed_return = nn.Linear(1, hidden)
            self.embed_action = nn.Linear(1, hidden)
            self.embed_ln = nn.LayerNorm(hidden)
            self.embed_state1 = nn.Linear(dim, hidden)
            self.embed_state2 = nn.Linear(dim, hidden)
            self.embed_state3 = nn.Linear(dim * positions, hidden)
            self.embed_state4 = nn.Linear(dim * positions, hidden)
            self.embed_state5 = nn.Linear(dim, hidden)
            self.embed_state6 = nn.Linear(dim, hidden)
            self.action_head = nn.Linear(hidden, LEVELS)
            with torch.no_grad():
                self.embed_timestep.weight.mul_(config.timestep_init)
        for module in self.around_plm().values():
            module.to(plm.device)

    @property
    def tokens_per_step(self) -> int:
        """8, or 1 with `tokens="step"`."""
        return TOKENS_PER_STEP if self.config.tokens == "parts" else 1

    def context_tokens(self, steps: int) -> int:
        """Tokens of so many steps, of which the last has no action yet: what a decision sees."""
        return self.tokens_per_step * (steps - 1) + max(1, self.tokens_per_step - 1)

    def around_plm(self) -> dict[str, nn.Module]:
        """All modules but the PLM, by name, in the order in which the original stores them."""
        names = ["state_encoder", "embed_timestep", "embed_return", "embed_action", "embed_ln"]
        names += [f"embed_state{i}" for i in range(1, 7)] + ["action_head"]
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.action_head.weight.device

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
            embedders = [getattr(self, f"embed_state{i}") for i in range(1, 7)]
            state = [embed(f).view(batch, steps, -1) for embed, f in zip(embedders, features, strict=True)]
            if self.config.tokens == "step":
                return self.embed_ln(torch.stack(state).sum(dim=0) + time)
            action = self.embed_action((actions.float().unsqueeze(-1) + 1) / LEVELS)
            tokens = [self.embed_return(returns.float().unsqueeze(-1)), *state, action]
            stacked = torch.stack(tokens, dim=2) + time.unsqueeze(2)  # [batch, steps, 8, hidden]
            return self.embed_ln(stacked.view(batch, steps * TOKENS_PER_STEP, -1))

    def forward(
        self,
        states: torch.Tensor,  # [batch, steps, 6, 6]
        actions: torch.Tensor,  # [batch, steps]
        returns: torch.Tensor,  # [batch, steps]
        timesteps: torch.Tensor,  # [batch, steps]
        mask: torch.Tensor | None = None,  # [batch, steps] bool, False for the padding that ends a short window
    ) -> torch.Tensor:  # [batch, steps, 6]
        """Logits of the action of every step, given the steps up to it."""
        tokens = self.embed(states, actions, returns, timesteps)
        token_mask = None if mask is None else mask.repeat_interleave(self.tokens_per_step, dim=1)
        read = slice(self.context_tokens(1) - 1, None, self.tokens_per_step)
        return self._head(self.plm(tokens, token_mask=token_mask, read=read))

    def decide(self, tokens: torch.Tensor, cache: TokenCache | None = None) -> torch.Tensor:
        """Logits [batch, 6] of the decision after `tokens` [batch, n, hidden], which end with the last state token.

        With a cache, `tokens` are only those that came since the previous decision.
        """
        return self._head(self.plm(tokens, cache=cache, read=slice(-1, None))[:, 0])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.action_head(hidden.float())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that training changes, by name; the PLM's part under `plm.`."""
        mine = {
            f"{name}.{key}": p for name, module in self.around_plm().items() for key, p in module.named_parameters()
        }
        return mine | {f"plm.{name}": p for name, p in self.plm.trainable().items()}


VALUE_FLOOR = -8.0
"""What is worse than the best level by more than this is all the same: no policy needs to know how bad it is."""


def action_loss(
    network: PolicyNetwork,
    batch: Batch,
    dtype: torch.dtype | None,
    values: torch.Tensor | None = None,  # [batch, w, 6]
    best: bool = False,
    weights: torch.Tensor | None = None,  # [batch, w]
) -> torch.Tensor:
    """Mean cross-entropy over the labels of a micro-batch, each times its weight if there are weights.

    With `values`, what each level was worth, the head learns these in place of the actions: by the squared error against the
    distance to the best level, not below `VALUE_FLOOR`; or, with `best`, by cross-entropy with the best level.
    """
    with torch.autocast(network.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = network(*batch)
    predicted, actions = labelled(logits, batch)
    if values is None:
        if weights is None:
            return cross_entropy(predicted, actions)
        return (cross_entropy(predicted, actions, reduction="none") * _counting(weights, batch)).mean()
    wanted = _counting(values, batch)
    if best:
        return cross_entropy(predicted, wanted.argmax(dim=-1))
    return mse_loss(predicted, (wanted - wanted.amax(dim=-1, keepdim=True)).clamp(min=VALUE_FLOOR))


def labelled(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [labels, 6] and actions [labels] of the steps that count."""
    return _counting(logits, batch), _counting(batch.actions, batch)


def _counting(steps: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[labels, …] of [batch, w, …]: the steps that count, without the padding."""
    return steps.flatten(0, 1) if batch.mask is None else steps[batch.mask]
