"""The simulator as gymnasium environments: `AbrEnv`, and `AbrVectorEnv`, which plays many episodes in lock-step.

Both play exactly what `play` plays. Importing this module registers `netllm/Abr-v0`, so that
`gymnasium.make("netllm_lib.abr.env:netllm/Abr-v0", traces="fcc-train")` works, and with `gymnasium.make_vec(…,
num_envs=64, vectorization_mode="vector_entry_point")` the vector form.

- An episode is one video over one trace. The protocol downloads the first of the 48 chunks in the lowest level, inside
  `reset`, so there are 47 decisions; with the last one the episode is terminated. It is never truncated.
- An observation is the Pensieve state [6, 6] float32: rows are features, the newest sample is the last column. After the last
  chunk the row of next sizes holds those of chunk 0, as in the original.
- An action is the level 0..5 of the next chunk. The reward is its QoE (see `qoe.py`), unscaled.
- `info` says what the chunk brought, units in the names, and which trace is played from which sample on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from netllm_lib.abr.episodes import NOISE_HIGH, NOISE_LOW, Episodes
from netllm_lib.abr.play import FIRST_LEVEL
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.simulator import BUFFER_CAP_MS, PAYLOAD_SHARE, RTT_MS, Outcome, Simulator
from netllm_lib.abr.traces import CHUNKS, Trace, TraceSet, Video, find_registry

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError(
        "netllm_lib.abr.env needs gymnasium, which is not installed: pip install 'netllm-companion[gym]'"
    ) from error

ENV_ID = "netllm/Abr-v0"
INFO = ("bitrate_kbps", "buffer_s", "rebuffer_s", "size_bytes", "delay_ms", "smoothness_mbps", "sleep_ms")
"""Fields of `Outcome` that `info` holds; `chunk`, `trace` and `start` come on top."""


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
        render_mode: None = None,
    ):
        self.traces, self.video = _find(traces, video, data)
        self.noise = noise
        self.observation_space = state_space(self.traces, self.video)
        self.action_space = gymnasium.spaces.Discrete(LEVELS)
        self.render_mode = render_mode
        self._simulator: Simulator | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode after its first chunk: observation and info.

        With `seed`, this and all episodes that follow are fixed. Raises ValueError for a trace or start that is not there.
        """
        super().reset(seed=seed)
        chosen = _options(options, 1)
        self._simulator = _begin(self.traces, self.video, [self.np_random], self.noise, chosen)
        outcome = self._simulator.step(np.full(1, FIRST_LEVEL))
        return self._observation(), self._info(outcome)

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Download the next chunk in level `action`: observation, reward, terminated, truncated (never), info."""
        simulator = self._simulator
        if simulator is None or simulator.chunk >= CHUNKS:
            raise gymnasium.error.ResetNeeded("the episode has not begun, or it is over: call reset()")
        outcome = simulator.step(np.array([action]))
        return self._observation(), float(outcome.reward[0]), simulator.chunk == CHUNKS, False, self._info(outcome)

    def _observation(self) -> np.ndarray:
        assert self._simulator is not None
        return self._simulator.observe().state[0].astype(np.float32)

    def _info(self, outcome: Outcome) -> dict[str, Any]:
        assert self._simulator is not None
        return {name: values.tolist()[0] for name, values in _told(self._simulator, outcome).items()}


class AbrVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` clients in lock-step: what `SyncVectorEnv` makes of as many `AbrEnv`, bit for bit, in compiled code.

    All episodes have the same length, so all end in the same step. `autoreset_mode`: with NEXT_STEP (gymnasium's default) the
    `step` after the last one ignores its actions and begins new episodes; with SAME_STEP the last one does that itself and
    `info["final_obs"]`, `info["final_info"]` hold what was before; with DISABLED `reset` is up to the caller. `reset(seed=s)`
    seeds client i with s + i; options as for `AbrEnv`, one for all or a list. Only all clients can be reset at once.
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
        render_mode: None = None,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: must be at least 1")
        self.num_envs, self.noise, self.render_mode = num_envs, noise, render_mode
        self.traces, self.video = _find(traces, video, data)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**AbrEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = state_space(self.traces, self.video)
        self.single_action_space = gymnasium.spaces.Discrete(LEVELS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._streams: list[np.random.Generator] = []
        self._seeds: list[int] = []
        self._simulator: Simulator | None = None

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random stream of each client."""
        self._seed([None] * self.num_envs)
        return tuple(self._streams)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each client's stream."""
        self._seed([None] * self.num_envs)
        return tuple(self._seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes after their first chunk: observations [N, 6, 6] and info, each key with a mask `_key` [N]."""
        seeds = [None if seed is None else seed + i for i in range(self.num_envs)] if _single(seed) else list(seed)  # type: ignore
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", True))
        if not mask.all():
            raise ValueError("the environments play in lock-step: only all of them can be reset at once")
        self._seed(seeds)
        return self._begin(options)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The next chunk in levels `actions` [N]: observations, rewards [N], terminations [N], truncations [N], info."""
        nothing = np.zeros(self.num_envs, dtype=bool)
        if self._simulator is None:
            raise gymnasium.error.ResetNeeded("no episode has begun: call reset()")
        if self._simulator.chunk >= CHUNKS:
            if self.autoreset_mode is not AutoresetMode.NEXT_STEP:
                raise gymnasium.error.ResetNeeded("all episodes are over: call reset()")
            observations, info = self._begin({})
            return observations, np.zeros(self.num_envs), nothing, nothing.copy(), info
        outcome = self._simulator.step(np.asarray(actions))
        over = np.full(self.num_envs, self._simulator.chunk == CHUNKS)
        observations, info = self._observations(), self._info(outcome)
        if over[0] and self.autoreset_mode is AutoresetMode.SAME_STEP:
            final = np.empty(self.num_envs, dtype=object)
            final[:] = list(observations)
            masks = {"_final_obs": np.ones(self.num_envs, bool), "_final_info": np.ones(self.num_envs, bool)}
            observations, begun = self._begin({})
            info = {**begun, "final_obs": final, "final_info": info, **masks}
        return observations, outcome.reward, over, nothing, info

    def _seed(self, seeds: Sequence[int | None]) -> None:
        """A new stream where there is a seed, or where there is none yet."""
        if not self._streams or all(seed is not None for seed in seeds):
            made = [gymnasium.utils.seeding.np_random(seed) for seed in seeds]
            self._streams, self._seeds = [stream for stream, _ in made], [seed for _, seed in made]
            return
        for i, seed in enumerate(seeds):
            if seed is not None:
                self._streams[i], self._seeds[i] = gymnasium.utils.seeding.np_random(seed)

    def _begin(self, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        chosen = _options(options, self.num_envs)
        self._simulator = _begin(self.traces, self.video, self._streams, self.noise, chosen)
        outcome = self._simulator.step(np.full(self.num_envs, FIRST_LEVEL))
        return self._observations(), self._info(outcome)

    def _observations(self) -> np.ndarray:
        assert self._simulator is not None
        return self._simulator.observe().state.astype(np.float32)

    def _info(self, outcome: Outcome) -> dict[str, Any]:
        assert self._simulator is not None
        info: dict[str, Any] = {}
        for name, values in _told(self._simulator, outcome).items():
            info[name], info[f"_{name}"] = values, np.ones(self.num_envs, dtype=bool)
        return info


def state_space(traces: TraceSet, video: Video) -> gymnasium.spaces.Box:
    """The box of all states that can occur with these traces and this video, noise or not.

    Throughput is bounded by the largest chunk in no more than the round trip, the delay by the slowest of the traces.
    """
    largest = float(video.sizes_bytes[:, :CHUNKS].max())
    high = np.ones((6, 6))
    high[1] = BUFFER_CAP_MS / 1000 / 10
    high[2] = largest / (RTT_MS * NOISE_LOW) / 1000
    high[3] = (max(_slowest_s(trace, largest) for trace in traces.traces) + RTT_MS / 1000) * NOISE_HIGH / 10
    high[4] = float(video.sizes_bytes.max()) / 1e6
    return gymnasium.spaces.Box(np.zeros((6, 6), np.float32), _rounded_up(high), dtype=np.float32)


def _slowest_s(trace: Trace, size_bytes: float) -> float:
    """A time in which `size_bytes` have arrived, wherever in the trace the download starts.

    What is left of the first pass, then as many whole ones as it takes; those start at 0 s.
    """
    pass_s = np.diff(trace.time_s)
    pass_s[0] = trace.time_s[1]
    payload_bytes = float((trace.mbps[1:] * pass_s).sum()) * 1e6 / 8 * PAYLOAD_SHARE
    return trace.duration_s + float(pass_s.sum()) * np.ceil(size_bytes / payload_bytes)


def _rounded_up(values: np.ndarray) -> np.ndarray:
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def _find(traces: str | TraceSet | None, video: str | Video | None, data: str | None) -> tuple[TraceSet, Video]:
    if isinstance(traces, TraceSet) and isinstance(video, Video):
        return traces, video
    registry = find_registry(data)
    if not isinstance(traces, TraceSet):
        traces = registry.trace_set(traces or registry.default_traces("train"))
    if not isinstance(video, Video):
        video = registry.video(video or registry.default_video())
    return traces, video


def _single(seed: Any) -> bool:
    return seed is None or isinstance(seed, int | np.integer)


def _options(options: Mapping[str, Any] | None, count: int) -> list[dict[str, Any]]:
    """The options of each of `count` clients. Raises ValueError for unknown ones."""
    given = dict(options or {})
    if unknown := given.keys() - {"trace", "start"}:
        raise ValueError(f"unknown reset options {sorted(unknown)}; known: trace, start")
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in given.items():
        values = [value] * count if isinstance(value, str) or np.ndim(value) == 0 else list(value)
        if len(values) != count:
            raise ValueError(f"reset option {name}: {len(values)} values for {count} environments")
        for client, one in zip(each, values, strict=True):
            client[name] = one
    return each


def _begin(
    traces: TraceSet, video: Video, streams: Sequence[np.random.Generator], noise: bool, chosen: list[dict[str, Any]]
) -> Simulator:
    """A simulator before the first chunk. Every client takes the same draws from its stream, whatever was chosen for it."""
    count = len(streams)
    index, start = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    factors = np.empty((count, CHUNKS)) if noise else None
    names = traces.names if any("trace" in options for options in chosen) else []
    for i, (stream, options) in enumerate(zip(streams, chosen, strict=True)):
        index[i], place = stream.integers(len(traces)), stream.random()
        if factors is not None:
            factors[i] = stream.uniform(NOISE_LOW, NOISE_HIGH, CHUNKS)
        if "trace" in options:
            if options["trace"] not in names:
                raise ValueError(
                    f"trace {options['trace']!r} is not in {traces.name}, which has {', '.join(names):.200}"
                )
            index[i] = names.index(options["trace"])
        last = len(traces.traces[index[i]].mbps) - 1
        start[i] = options.get("start", 1 + int(place * last))
        if not 1 <= start[i] <= last:
            raise ValueError(f"start {start[i]} is outside 1..{last} of trace {traces.traces[index[i]].name}")
    draws = np.ones((count, CHUNKS), dtype=np.int64)  # no policy of ours asks for them here
    return Simulator(traces, video, Episodes(index, start, factors, draws, seed=0, fixed=not noise))


def _told(simulator: Simulator, outcome: Outcome) -> dict[str, np.ndarray]:
    """What `info` says of the chunk just downloaded, arrays [N]."""
    episodes = simulator.episodes
    names = np.array([simulator.traces.traces[index].name for index in episodes.trace_index], dtype=object)
    told = {name: getattr(outcome, name) for name in INFO}
    return told | {
        "level": outcome.level,
        "chunk": np.full(len(episodes), simulator.chunk - 1),
        "trace": names,
        "start": episodes.start_ptr,
    }


gymnasium.register(
    id=ENV_ID, entry_point="netllm_lib.abr.env:AbrEnv", vector_entry_point="netllm_lib.abr.env:AbrVectorEnv"
)
