"""The simulator as gymnasium environments: `AbrEnv`, and `AbrVectorEnv`, which plays many episodes in lock-step.

Both play exactly what `play` plays. Importing this module registers `netllm/Abr-v0`, so that
`gymnasium.make("netllm_lib.abr.env:netllm/Abr-v0", traces="fcc-train")` works, and with `gymnasium.make_vec(…,
num_envs=64, vectorization_mode="vector_entry_point")` the vector form.

An episode is one video over one trace: `reset` downloads the first of the 48 chunks in the lowest level, then there are 47
decisions, and the last one terminates it. An observation is the Pensieve state [6, 6] float32 (after the last chunk the row of
next sizes holds those of chunk 0, as in the original), an action the level 0..5 of the next chunk, the reward its QoE,
unscaled; `info` says what the chunk brought, units in the names, and which trace is played from which sample on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from netllm_lib.abr.episodes import FIRST_LEVEL, NOISE_HIGH, NOISE_LOW, Episodes
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.simulator import BUFFER_CAP_MS, PAYLOAD_SHARE, RTT_MS, Outcome, Simulator
from netllm_lib.abr.traces import TraceSet, Video, find_registry

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError("this needs gymnasium, which is not installed: pip install 'netllm-companion[gym]'") from error

ENV_ID = "netllm/Abr-v0"
INFO = ("level", "bitrate_kbps", "buffer_s", "rebuffer_s", "size_bytes", "delay_ms", "smoothness_mbps", "sleep_ms")
"""Fields of `Outcome` that `info` holds; `chunk`, `trace` and `start` come on top."""


class AbrVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` clients in lock-step: what `SyncVectorEnv` makes of as many `AbrEnv`, bit for bit, in compiled code.

    All episodes have the same length, so all end in the same step; `autoreset_mode` is gymnasium's. `reset(seed=s)` seeds client
    i with s + i; options as for `AbrEnv`, one for all or a list. Only all clients can be reset at once.
    """

    def __init__(
        self,
        num_envs: int = 1,
        traces: str | TraceSet | None = None,
        video: str | Video | None = None,
        *,
        data: str | None = None,
        noise: bool = False,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ):
        self.num_envs, self.noise = num_envs, noise
        if not isinstance(traces, TraceSet):
            traces = find_registry(data).trace_set(traces or find_registry(data).default_traces("train"))
        if not isinstance(video, Video):
            video = find_registry(data).video(video or find_registry(data).default_video())
        self.traces, self.video, self.autoreset_mode = traces, video, AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = state_space(traces, video)
        self.single_action_space = gymnasium.spaces.Discrete(LEVELS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._streams: list[Any] = [None] * num_envs  # the random generator of each client
        self._simulator: Simulator | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes after their first chunk: observations [N, 6, 6] and info, each key with a mask `_key` [N]."""
        if seed is None or isinstance(seed, int | np.integer):
            seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        options = dict(options or {})
        if len(seed) != self.num_envs or not np.all(options.pop("reset_mask", True)):
            raise ValueError("the environments play in lock-step: only all of them can be reset, with a seed for each")
        for i, one in enumerate(seed):
            if one is not None or self._streams[i] is None:
                self._streams[i] = gymnasium.utils.seeding.np_random(one)[0]
        return self._begin(options)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The next chunk in levels `actions` [N]: observations, rewards [N], terminations [N], truncations [N], info."""
        never, simulator = np.zeros(self.num_envs, dtype=bool), self._simulator
        if simulator is None or (simulator.chunk >= CHUNKS and self.autoreset_mode is not AutoresetMode.NEXT_STEP):
            raise gymnasium.error.ResetNeeded("no episode has begun, or all are over: call reset()")
        if simulator.chunk >= CHUNKS:
            observations, info = self._begin({})
            return observations, np.zeros(self.num_envs), never, never.copy(), info
        outcome = simulator.step(np.asarray(actions))
        observations, info = self._seen(simulator, outcome)
        over = np.full(self.num_envs, simulator.chunk == CHUNKS)
        if over[0] and self.autoreset_mode is AutoresetMode.SAME_STEP:
            final_obs = np.empty(self.num_envs, dtype=object)
            final_obs[:] = list(observations)
            final = {"final_obs": final_obs, "final_info": info, "_final_obs": over.copy(), "_final_info": over.copy()}
            observations, begun = self._begin({})
            info = begun | final
        return observations, outcome.reward, over, never, info

    def _begin(self, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Every client takes the same draws from its stream, whatever was chosen for it."""
        if unknown := options.keys() - {"trace", "start"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: trace, start")
        index: np.ndarray = np.array([stream.integers(len(self.traces)) for stream in self._streams])
        place = np.array([stream.random() for stream in self._streams])
        draws = [stream.uniform(NOISE_LOW, NOISE_HIGH, CHUNKS) for stream in self._streams if self.noise]
        names = self.traces.names
        if "trace" in options:
            chosen = np.broadcast_to(options["trace"], self.num_envs).tolist()
            if unknown := set(chosen) - set(names):
                raise ValueError(f"{sorted(unknown)} not in {self.traces.name}, which has {', '.join(names):.200}")
            index = np.array([names.index(name) for name in chosen])
        last = np.array([len(self.traces.traces[i].mbps) - 1 for i in index])
        start = np.broadcast_to(options.get("start", 1 + (place * last).astype(np.int64)), self.num_envs)
        for i in np.flatnonzero((start < 1) | (start > last)):
            raise ValueError(f"start {start[i]} is outside 1..{last[i]} of trace {names[index[i]]}")
        unused = np.ones((self.num_envs, CHUNKS), dtype=np.int64)  # no policy of ours samples here
        noise = np.array(draws) if self.noise else None
        episodes = Episodes(index, start.copy(), noise, unused, seed=0, fixed=not self.noise)
        self._simulator = Simulator(self.traces, self.video, episodes)
        return self._seen(self._simulator, self._simulator.step(np.full(self.num_envs, FIRST_LEVEL)))

    def _seen(self, simulator: Simulator, outcome: Outcome) -> tuple[np.ndarray, dict[str, Any]]:
        """Observations and info of the chunk just downloaded."""
        info = {name: getattr(outcome, name) for name in INFO}
        info["chunk"] = np.full(self.num_envs, simulator.chunk - 1)
        info["trace"] = np.array(self.traces.names, dtype=object)[simulator.episodes.trace_index]
        info["start"] = simulator.episodes.start_ptr
        masks = {f"_{name}": np.ones(self.num_envs, dtype=bool) for name in info}
        return simulator.observe().state.astype(np.float32), info | masks


class AbrEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One client, one episode at a time.

    `traces` and `video` are names in the data folder (`data`, else `$NETLLM_DATA`, `data/netllm`, the sample), or the objects; by
    default the first training set and the first video. `noise` multiplies every download's delay by a number from 0.9 to
    1.1, as in Pensieve's training. Each `reset` draws a trace and the sample that it starts at, both uniformly;
    `reset(options={"trace": name, "start": i})` sets either or both. Pointer files are not read.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's

    def __init__(
        self,
        traces: str | TraceSet | None = None,
        video: str | Video | None = None,
        *,
        data: str | None = None,
        noise: bool = False,
    ):
        self._one = AbrVectorEnv(1, traces, video, data=data, noise=noise, autoreset_mode=AutoresetMode.DISABLED)
        self.traces, self.video, self.noise = self._one.traces, self._one.video, noise
        self.observation_space, self.action_space = self._one.single_observation_space, self._one.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode after its first chunk: observation and info. With `seed`, this and all that follow are fixed."""
        super().reset(seed=seed)
        self._one._streams = [self.np_random]
        observations, info = self._one.reset(options=options)
        return observations[0], _first_of(info)

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Download the next chunk in level `action`: observation, reward, terminated, truncated (never), info."""
        observations, rewards, over, _, info = self._one.step(np.array([action]))
        return observations[0], float(rewards[0]), bool(over[0]), False, _first_of(info)


def _first_of(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values.tolist()[0] for name, values in info.items() if not name.startswith("_")}


def state_space(traces: TraceSet, video: Video) -> gymnasium.spaces.Box:
    """The box of all states that can occur with these traces and this video, noise or not.

    Throughput is bounded by the largest chunk in no more than the round trip. The delay is bounded by the slowest trace: what is
    left of the first pass, then as many whole passes as it takes.
    """
    largest, slowest_s = float(video.sizes_bytes[:, :CHUNKS].max()), 0.0
    for trace in traces.traces:
        payload_bytes = trace.mean_mbps * trace.duration_s * 1e6 / 8 * PAYLOAD_SHARE
        slowest_s = max(slowest_s, trace.duration_s * (1 + np.ceil(largest / payload_bytes)))
    high = np.ones((6, 6))
    high[1] = BUFFER_CAP_MS / 1000 / 10
    high[2] = largest / (RTT_MS * NOISE_LOW) / 1000
    high[3] = (slowest_s + RTT_MS / 1000) * NOISE_HIGH / 10
    high[4] = float(video.sizes_bytes.max()) / 1e6
    rounded_up = np.nextafter(high.astype(np.float32), np.float32(np.inf))
    return gymnasium.spaces.Box(np.zeros((6, 6), np.float32), rounded_up, dtype=np.float32)


gymnasium.register(
    id=ENV_ID, entry_point="netllm_lib.abr.env:AbrEnv", vector_entry_point="netllm_lib.abr.env:AbrVectorEnv"
)
