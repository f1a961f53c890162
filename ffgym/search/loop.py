"""One search: an agent spends its tokens on an environment, then finals choose the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv, Step
from ffgym.errors import PluginError
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import CALL_ON_UPDATE, call_plugin, check_state, check_update
from ffgym.plugins.manager import described
from ffgym.search.finalists import Candidate, contenders, finalists, starting_points
from ffgym.search.finals import run_finals
from ffgym.search.log import Recorder
from ffgym.types import Episode, OnShare, Update, do_nothing


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        finalists: the candidates that were measured again, the chosen one first.
        dense_loss: dense loss on the windows that the candidates' losses are of; ``None`` where no finals were run.
        history: every episode.
        search_tokens: tokens that the agent's episodes took.
        final_tokens: tokens that the finals took.
        seconds: wall time of the search and its finals, including earlier sessions of an interrupted search. Finals of
            other points of a front are not counted.
        final_seconds: of them, those of the finals.
        target: the target sparsity of the search, or of this point of a front.
    """

    finalists: tuple[Candidate, ...] = field(repr=False)
    dense_loss: float | None
    history: tuple[Episode, ...] = field(repr=False)
    search_tokens: int
    final_tokens: int
    seconds: float
    final_seconds: float
    target: float

    @property
    def best(self) -> Candidate:
        """The chosen candidate."""
        return self.finalists[0]


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search that has finished at least one episode.

    Attributes:
        found: the best so far: what the agent recommends, or else the episode of the greatest reward at the hardest
            stage; no finals were run. Under a range, at the environment's own target.
    """

    def __init__(self, found: SearchResult) -> None:
        super().__init__("Ctrl-C; the attribute found holds the best so far")
        self.found = found


def search_front(
    env: PruningEnv,
    agent: Agent,
    schedule: Schedule,
    targets: Sequence[float],
    *,
    episodes: int,
    episodes_per_update: int,
    finalist_count: int,
    seed: int,
    log: Path | None = None,
    on_episode: Callable[[Episode], None] = do_nothing,
    on_update: Callable[[Sequence[Episode], Update], None] = do_nothing,
    on_point: Callable[[SearchResult], None] = do_nothing,
    on_progress: Callable[[float], None] = do_nothing,
    on_finals: OnShare = do_nothing,
) -> list[SearchResult]:
    """Let the agent spend its tokens, then choose at every target.

    Args:
        env: the stationary task.
        agent: who searches.
        schedule: ramps, or the range that the updates' targets are drawn from.
        targets: the points of the front, rising; one for a search at a single target.
        episodes: at full fidelity; times the tokens of an episode they are the token budget.
        episodes_per_update: episodes that one policy update learns from.
        finalist_count: allocations that are measured again, on what the environment reserves.
        seed: of the agent and of the subsets: same seed, same search, bit for bit at equal thread count.
        log: JSONL file of episodes. What it holds already is replayed instead of measured, so that an interrupted
            search goes on where it stopped.
        on_episode: called after each episode.
        on_update: called after each update with its episodes and what the agent said.
        on_point: called after the finals of each target.
        on_progress: called with the tokens of the running update that have been measured.
        on_finals: called with the share of the finals of a target that has been measured, from 0 to 1.

    Returns:
        one for every target; they share the history, and each has its own finals.

    Raises:
        SearchInterrupted: Ctrl-C after at least one episode.
        DataError: the log belongs to another search.
    """
    # How far from its target an episode may stand for a point of a front: half the way to the next point.
    reach = None if len(targets) == 1 else float(np.diff(targets).max()) / 2
    points: list[SearchResult] = []
    with Recorder(log) as recorder:

        def record(episode: Episode) -> None:
            recorder.record(episode)
            on_episode(episode)

        vector = _SearchEnv(
            env,
            schedule,
            num_envs=agent.update_size(episodes_per_update),
            token_budget=episodes * env.episode_tokens,
            slope_episodes=agent.slope_episodes,
            # A log's objectives can then be compared within an update: they depend on the text and the examples.
            pair_text=agent.pair_text and not env.reward.has_objectives,
            on_episode=record,
            on_progress=on_progress,
            replay=recorder.earlier.episodes,
            log_name=str(log),
        )

        def found(
            target: float, ranked: Sequence[Candidate], dense_loss: float | None, final_tokens: int
        ) -> SearchResult:
            final_seconds = recorder.count()
            return SearchResult(
                finalists=tuple(ranked),
                dense_loss=dense_loss,
                history=tuple(vector.history),
                search_tokens=vector.tokens_spent,
                final_tokens=final_tokens,
                seconds=recorder.seconds - sum(point.final_seconds for point in points),
                final_seconds=final_seconds,
                target=target,
            )

        starts = [starting_points(env, agent, target) for target in targets]
        try:
            _learn(agent, vector, seed, on_update)
            recorder.count()
            for target, own in zip(targets, starts, strict=True):
                candidates = contenders(env, agent, vector.history, finalist_count, target, reach, own)
                points.append(found(target, *run_finals(env, candidates, seed, on_finals)))
                on_point(points[-1])
        except KeyboardInterrupt as stop:
            if len(vector.history) < max(1, len(recorder.earlier.episodes)):  # an earlier session handed over more
                raise
            try:
                best = finalists(env, agent, vector.history, 1, env.sparsity, reach)
            except PluginError:  # an agent that has learnt nothing yet may have nothing to recommend
                raise stop from None
            raise SearchInterrupted(found(env.sparsity, best, None, 0)) from None
    return points


class _NotTheAgents(BaseException):
    """An error of measuring or of a callback on its way through the agent's code, which shall not catch it.

    Attributes:
        error: what it was.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@contextmanager
def _not_the_agents() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _NotTheAgents(error) from None


class _SearchEnv(PruningVectorEnv):
    """The vector environment that the agent of a search sees; the update that crosses the token budget is the last."""

    def step(self, actions: np.ndarray) -> Step:
        if self.tokens_left == 0:
            raise RuntimeError(
                f"step after all {self.token_budget:,} tokens were spent: stop when env.tokens_left is 0"
            )
        return super().step(actions)

    def measure(self, actions: np.ndarray) -> Step:
        with _not_the_agents():
            return super().measure(actions)


def _learn(
    agent: Agent, vector: PruningVectorEnv, seed: int, on_update: Callable[[Sequence[Episode], Update], None]
) -> None:
    """Let the agent search; what it raises by itself is a `PluginError`, what measuring or telling raises stays.

    Raises:
        PluginError: it broke, took no step, or did not tell of its updates.
    """
    updates, reported = 0, 0

    def tell(update: Update) -> None:
        nonlocal updates, reported
        new, reported = vector.history[reported:], len(vector.history)
        if not new:
            raise PluginError(
                f"{described(agent)}: learn called on_update without a step before it", hint=CALL_ON_UPDATE
            )
        check_update(agent, update, len(new))
        if updates == 0:  # not only after the search, which may take days
            check_state(agent)
        with _not_the_agents():
            on_update(new, update)
        updates += 1

    stopped: Exception | None = None
    try:
        call_plugin(agent, lambda: agent.learn(vector, seed=seed, on_update=tell), "searching")
    except _NotTheAgents as carrier:
        stopped = carrier.error
    if stopped is not None:
        raise stopped
    if not vector.history:
        raise PluginError(f"{described(agent)}: learn returned without a step", hint="Call env.step in learn.")
    if updates == 0:
        raise PluginError(
            f"{described(agent)}: learn never called on_update, so its episodes were not reported", hint=CALL_ON_UPDATE
        )
