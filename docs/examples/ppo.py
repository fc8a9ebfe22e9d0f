"""Proximal policy optimisation (PPO; Schulman et al., 2017) on `AbrVectorEnv`, in one file:

    python docs/examples/ppo.py [--data DIR] [--traces NAME] [--test NAME] [--video NAME] [--steps N] [--seed S]

Trains a small network on a training set, keeps the weights that play best on traces cut from it, and plays the test set
beside BBA and MPC. Where it deviates from the common form: rewards are clipped from below, because one long stall would
otherwise outweigh thousands of chunks; the entropy bonus falls with the learning rate.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical

from netllm_lib.abr.env import AbrVectorEnv
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Observation, Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.qoe import CHUNKS, LEVELS, summarise
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import TraceSet, Video, find_registry, split_validation


@dataclass(frozen=True)
class PPOConfig:
    steps: int = 600_000  # decisions, over all clients
    clients: int = 128
    seed: int = 1
    gamma: float = 0.97
    gae_lambda: float = 0.95
    epochs: int = 4
    minibatches: int = 8
    clip: float = 0.2
    lr: float = 1e-3  # at first; falls to zero
    entropy: float = 0.05  # at first; falls to zero
    value: float = 0.5
    max_grad_norm: float = 0.5
    reward_scale: float = 4.3
    reward_floor: float = -10.0  # before scaling: a stall of about three seconds
    hidden: int = 128
    validation_share: float = 0.2
    validations: int = 12


def features(states: torch.Tensor) -> torch.Tensor:
    """Inputs [N, 36] from states [N, 6, 6]: every row about 0 to 1; long delays and high throughputs are compressed."""
    rows = states.float().clone()
    rows[:, 1] /= 6  # buffer, of 60 s
    rows[:, 2:5] = torch.log1p(rows[:, 2:5] * 4) / 2  # throughput in MB/s, delay in 10 s, next sizes in MB
    return rows.flatten(1)


class Agent(nn.Module):
    """Logits [N, 6] and values [N] of states [N, 6, 6]."""

    def __init__(self, hidden: int):
        super().__init__()

        def network(outputs: int, gain: float) -> nn.Sequential:
            layers = [nn.Linear(36, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
            for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
                nn.init.orthogonal_(layer.weight, scale)
                nn.init.zeros_(layer.bias)
            return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

        self.actor, self.critic = network(LEVELS, 0.01), network(1, 1.0)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = features(states)
        return self.actor(inputs), self.critic(inputs).squeeze(1)


class Greedy(Policy):
    """The agent's most probable level."""

    name = "ppo"

    def __init__(self, agent: Agent):
        self.agent = agent

    @torch.inference_mode()
    def act(self, observation: Observation) -> np.ndarray:
        return self.agent(torch.from_numpy(observation.state.astype(np.float32)))[0].argmax(1).numpy()


def mean_reward(policy: Policy, traces: TraceSet, video: Video, repeats: int = 1) -> float:
    return summarise(play(policy, Simulator(traces, video, sound_episodes(traces, repeats=repeats)))).reward


def advantages(
    rewards: torch.Tensor, values: torch.Tensor, ends: torch.Tensor, last: torch.Tensor, config: PPOConfig
) -> torch.Tensor:
    """Generalised advantage estimates [T, N]; `last` [N] are the values after the T steps, `ends` [T, N] where episodes ended."""
    result, running = torch.zeros_like(rewards), torch.zeros_like(last)
    for t in reversed(range(len(rewards))):
        goes_on = 1 - ends[t]
        error = rewards[t] + config.gamma * goes_on * last - values[t]
        running = error + config.gamma * config.gae_lambda * goes_on * running
        result[t], last = running, values[t]
    return result


def learn(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[torch.Tensor],
    entropy_weight: float,
    config: PPOConfig,
) -> None:
    """The epochs of one batch of (states, actions, log probabilities, advantages, returns)."""
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch[0])).chunk(config.minibatches):
            states, actions, old, gains, returns = (values[rows] for values in batch)
            logits, values = agent(states)
            chosen = Categorical(logits=logits)
            ratio = (chosen.log_prob(actions) - old).exp()
            gains = (gains - gains.mean()) / (gains.std() + 1e-8)
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            policy_loss = -torch.min(ratio * gains, clipped * gains).mean()
            value_loss = 0.5 * (values - returns).square().mean()
            loss = policy_loss + config.value * value_loss - entropy_weight * chosen.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()


def train(traces: TraceSet, video: Video, config: PPOConfig, *, show: bool = True) -> Agent:
    """The agent with the best mean reward on validation traces cut from `traces`."""
    torch.manual_seed(config.seed)
    training, held = split_validation(traces, config.validation_share, config.seed)
    env = AbrVectorEnv(config.clients, training, video, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = Agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5)
    length = CHUNKS - 1
    updates = max(1, config.steps // (length * config.clients))
    every = max(1, updates // config.validations)
    best, best_reward, started = copy.deepcopy(agent), -np.inf, time.monotonic()

    def tape(*shape: int) -> torch.Tensor:
        return torch.zeros(length, config.clients, *shape)

    state = torch.from_numpy(env.reset(seed=config.seed)[0])
    for update in range(1, updates + 1):
        left = 1 - (update - 1) / updates
        optimizer.param_groups[0]["lr"] = config.lr * left
        states, actions, logs, rewards, values, ends = tape(6, 6), tape().long(), tape(), tape(), tape(), tape()
        for t in range(length):
            with torch.no_grad():
                logits, values[t] = agent(state)
            chosen = Categorical(logits=logits)
            states[t], actions[t] = state, chosen.sample()
            logs[t] = chosen.log_prob(actions[t])
            after, reward, ended, _, _ = env.step(actions[t].numpy())
            rewards[t] = torch.from_numpy(np.maximum(reward, config.reward_floor) / config.reward_scale)
            ends[t], state = torch.from_numpy(ended), torch.from_numpy(after)
        with torch.no_grad():
            gains = advantages(rewards, values, ends, agent(state)[1], config)
        batch = [part.flatten(0, 1) for part in (states, actions, logs, gains, gains + values)]
        learn(agent, optimizer, batch, config.entropy * left, config)
        if update % every == 0 or update == updates:
            score = mean_reward(Greedy(agent), held, video, repeats=3)
            if score > best_reward:
                best, best_reward = copy.deepcopy(agent), score
            if show:
                done = update * length * config.clients
                print(f"{done:>9} decisions, {time.monotonic() - started:4.0f} s: validation {score:.4f}", flush=True)
    return best


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, test, print; returns the mean reward on the test set by policy."""
    parser = argparse.ArgumentParser(description="PPO on the bitrate simulator, beside BBA and MPC.")
    parser.add_argument("--data", help="folder with traces/ and videos/ [as for netllm]")
    parser.add_argument("--traces", help="training set [the first one]")
    parser.add_argument("--test", help="test set [the first one]")
    parser.add_argument("--video", help="[the first one]")
    parser.add_argument("--steps", type=int, default=PPOConfig.steps, help="decisions in all")
    parser.add_argument("--seed", type=int, default=PPOConfig.seed)
    given = parser.parse_args(arguments)
    registry = find_registry(given.data)
    video = registry.video(given.video or registry.default_video())
    test = registry.trace_set(given.test or registry.default_traces("test"))
    training = registry.trace_set(given.traces or registry.default_traces("train"))
    agent = train(training, video, PPOConfig(steps=given.steps, seed=given.seed))
    players = [Greedy(agent), RobustMPC(video), BBA()]
    rewards = {player.name: mean_reward(player, test, video) for player in players}
    print(f"{test.name}, {video.name}: mean reward per chunk")
    print("\n".join(f"  {name:<5} {reward:.4f}" for name, reward in rewards.items()))
    print(json.dumps(rewards))
    return rewards


if __name__ == "__main__":
    main()
