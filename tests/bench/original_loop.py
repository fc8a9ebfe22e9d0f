"""The original's procedure, transcribed plainly: what speed is compared with, and what `upstream()` must equal.

One trace after the other; for every chunk the whole window of 20 previous steps and the current one goes through the PLM again, its
tokens joined by a Python loop over steps; training takes one window at a time in float32 and clips after each. Only the
modules are those of a `PolicyNetwork`: how they are called is written here anew, after NetLLM's `plm_special/models/rl_policy.py`,
`test.py` and `trainer.py`.
"""

from __future__ import annotations

import bisect
import random
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from netllm_lib.abr.batches import Windows
from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.policies.base import Policy
from netllm_lib.returns import ReturnScale

LEVELS = 6
STATE_TOKENS = 6


def embed_step(
    network: PolicyNetwork, state: torch.Tensor, returns: torch.Tensor, time: torch.Tensor
) -> list[torch.Tensor]:
    """Return and state embeddings, each [1, steps, hidden], of state [1, steps, 6, 6], returns and time [1, steps, …]."""
    encoder, steps = network.state_encoder, state.shape[1]
    rows = state.reshape(steps, STATE_TOKENS, -1)
    features = [encoder.fc1(rows[:, 0, -1:]), encoder.fc2(rows[:, 1, -1:]), encoder.conv3(rows[:, 2:3])]
    features += [encoder.conv4(rows[:, 3:4]), encoder.conv5(rows[:, 4:5]), encoder.fc6(rows[:, 5, -1:])]
    embedded = [network.embed_return(returns) + time]
    for number, feature in enumerate(features, 1):
        embedded.append(getattr(network, f"embed_state{number}")(feature.reshape(1, steps, -1)) + time)
    return embedded


def hidden_states(network: PolicyNetwork, tokens: torch.Tensor) -> torch.Tensor:
    """The PLM over tokens [1, n, hidden], cut to the last `hidden` of them, with the original's full mask."""
    tokens = network.embed_ln(tokens[:, -network.plm.hidden_size :])
    mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    base = network.plm.base
    hidden = base(inputs_embeds=tokens.to(base.dtype), attention_mask=mask, output_hidden_states=True, use_cache=False)
    return hidden.last_hidden_state.to(tokens.dtype)


def window_logits(
    network: PolicyNetwork, states: torch.Tensor, actions: torch.Tensor, returns: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """Logits [1, w, 6] of one training window: states [1, w, 6, 6], actions (levels), returns and timesteps [1, w]."""
    time = network.embed_timestep(steps)
    parts = embed_step(network, states, returns.unsqueeze(-1), time)
    parts.append(network.embed_action((actions.float().unsqueeze(-1) + 1) / LEVELS) + time)
    joined, positions = [], []
    for step in range(states.shape[1]):
        joined.append(torch.cat([part[0, step : step + 1] for part in parts], dim=0))
        positions.append((step + 1) * (STATE_TOKENS + 2) - 2)
    hidden = hidden_states(network, torch.cat(joined, dim=0).unsqueeze(0))
    return network.action_head(hidden[:, positions])


class OriginalPolicy(Policy):
    """The original's test loop. Its context is never cleared, and it decides once more after the last chunk.

    With `clear` it forgets the context before each trace and leaves the last decision out: 47 decisions and 6169 tokens a trace in
    place of 48 and 8016, which is what a comparison with the sound test has to be about.
    """

    name = "original loop"
    carries_state = True

    def __init__(self, network: PolicyNetwork, scale: ReturnScale, w: int = 20, clear: bool = False):
        self.network, self.scale, self.w, self.clear = network, scale, w, clear
        self.acts_after_last = not clear

    def reset(self, episodes: Episodes) -> None:
        self.steps: deque[list[torch.Tensor]] = deque(maxlen=self.w)  # eight embeddings [1, 1, hidden] of each
        self.random = random.Random(episodes.seed)
        self.target = 0.0
        self.network.eval()

    @torch.no_grad()
    def act(self, observation: Observation) -> np.ndarray:
        network = self.network
        if observation.chunk == 1:
            self.target = self.scale.target_return
            if self.clear:
                self.steps.clear()
        else:
            low, high = self.scale.min_reward, self.scale.max_reward
            reward = min(high, max(low, float(observation.last_reward[0])))
            self.target -= (reward - low) / (high - low) / self.scale.scale
        device = network.device
        state = torch.from_numpy(observation.state.astype(np.float32)).unsqueeze(0).to(device)
        time = network.embed_timestep(torch.tensor([[observation.chunk - 1]], device=device))
        target = torch.tensor([[[self.target]]], dtype=torch.float32, device=device)
        current = embed_step(network, state, target, time)
        previous = []
        for step in self.steps:
            previous.append(torch.cat([token[0] for token in step], dim=0))
        tokens = torch.cat([*previous, torch.cat([token[0] for token in current], dim=0)], dim=0).unsqueeze(0)
        logits = network.action_head(hidden_states(network, tokens)[:, -1:]).reshape(-1)
        self.probabilities = torch.softmax(logits, dim=0).cpu().numpy()
        level = self._draw()
        action = torch.full((1, 1, 1), (level + 1) / LEVELS, device=device)
        self.steps.append([*current, network.embed_action(action) + time])
        self.logits = logits.cpu().numpy()[None]
        return np.array([level])

    def _draw(self) -> int:
        """`random.choices` with float32 weights as NumPy 1 added them up: sums in float32, total and product in float64."""
        sums = np.cumsum(self.probabilities, dtype=np.float32).tolist()
        return bisect.bisect_right(sums, self.random.random() * sums[-1], 0, LEVELS - 1)

    def extras(self) -> Mapping[str, np.ndarray]:
        return {f"p{level}": self.probabilities[level : level + 1] for level in range(LEVELS)}


def train_windows(
    network: PolicyNetwork,
    windows: Windows,
    order: Sequence[int],
    *,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    warmup: int = 2000,
    accumulation: int = 32,
    clip: float = 0.25,
) -> list[float]:
    """The original's epoch over the windows in this order; changes the network and returns the loss of every window."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1))
    losses = []
    for done, number in enumerate(order, 1):
        states, actions, returns, steps, *_ = windows.batch([number]).to(network.device)
        logits = window_logits(network, states, actions, returns, steps)
        loss = nn.functional.cross_entropy(logits.permute(0, 2, 1), actions)
        losses.append(loss.item())
        (loss / accumulation).backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        if done % accumulation == 0 or done == len(order):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    network.eval()
    return losses
