"""Follows a job's round log on behalf of one rank: start, deal, sync round, checkpoint.

Rank 0 alone asks the log what is decided (position, seals, members) and tells the other ranks, so
that all act on the same answer; every rank moves the bytes of the fragments that it owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter

from training import checkpoint, dealing
from training.attempt import AttemptContext
from training.checkpoint import State, StateHeader
from training.codecs import CODECS, Values
from training.dealing import Ranges
from training.errors import CheckpointError, ExchangeError
from training.exchange import Entry, Exchange, MemberSeat, Position, SealedRound
from training.outer_share import OuterShare
from training.ranks import Json, Ranks
from training.roundlog.errors import ExchangeRefusedError, Reason
from training.roundlog.view import GENESIS_HASH

# A round without content still names one fragment, because a contribution is never empty: an fp32
# payload of no elements, which nobody reads.
NO_CONTENT: Final = bytes(CODECS["fp32"].encode(torch.empty(0).numpy(), None)[0])
# A snapshot this small (64 M parameters with velocity) is offered after every round; a bigger one
# at the checkpoint's cadence, and a joiner replays the rounds since.
SNAPSHOT_EACH_ROUND_BYTES_MAX: Final = 1 << 29

_POSITION: Final = TypeAdapter(Position)
_SEALED: Final = TypeAdapter(SealedRound)


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """What one round cost and how it went, at this rank."""

    counted: bool
    sites_merged: int
    bytes_posted: int
    bytes_fetched: int


class Synchronizer:
    """One rank's way through the rounds of its job."""

    def __init__(
        self,
        context: AttemptContext,
        share: OuterShare,
        ranks: Ranks,
        exchange: Exchange,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Follow the log behind `exchange`; call `start` first."""
        self.context = context
        self.share = share
        self.members: tuple[MemberSeat, ...] = ()
        self.inner_steps = 0
        self._ranks = ranks
        self._exchange = exchange
        self._optimizer = optimizer
        self._folder = Path(context.checkpoint_dir)
        self._chain_hash = GENESIS_HASH
        self._outer_hash = ""
        self._is_local = context.sync.strategy == "local"

    @property
    def outer_hash(self) -> str:
        """The hash of the outer state after the last applied round."""
        return self._outer_hash

    def start(self) -> None:
        """Take this site's place in the log: from the beginning, a checkpoint or a peer's snapshot.

        Raises CheckpointError where the state to start from is unusable, ExchangeError after patience.
        """
        position = self._position()
        if self.context.resume_from is not None:
            self._resume(Path(self.context.resume_from))
        else:
            self.share.scatter()
            self.share.done = dealing.union(position.done) if position.base_round == 0 else ()
            self._outer_hash = self.share.state_hash()
        self._reach(position)

    def block(self) -> Ranges | None:
        """Return the samples dealt to this site for the next round; None when all of the job's are done."""
        workload = self.context.workload
        if dealing.count(self.share.done) >= workload.samples:
            return None
        dealt = dealing.deal(
            workload.samples,
            self.share.done,
            self.members,
            period_steps=self.context.sync.period_steps,
            batch_per_gpu=workload.batch_per_gpu,
        )
        return dealt.get(self.context.site_id, ())

    def sync(self, samples: Ranges) -> RoundFigures:
        """Contribute what the model learned from `samples`, and apply the round once it is sealed."""
        number = self.share.round_number + 1
        posted = self._contribute(number, samples)
        sealed = self._sealed(number)
        if sealed is None:
            self._rejoin()
            return RoundFigures(counted=False, sites_merged=0, bytes_posted=posted, bytes_fetched=0)
        counted, fetched = self._apply(sealed)
        self._keep()
        merged = sum(entry.weight > 0 for entry in counted)
        is_counted = any(entry.site_id == self.context.site_id for entry in counted)
        return RoundFigures(counted=is_counted, sites_merged=merged, bytes_posted=posted, bytes_fetched=fetched)

    def save(self) -> None:
        """Write a checkpoint of the present round. A collective."""
        state = self._state()
        if state is not None:
            checkpoint.write_checkpoint(self._folder, state, dealing.count(self.share.done))

    # Start.

    def _position(self) -> Position:
        answer = self._on_rank_0(lambda: _POSITION.dump_python(self._exchange.position(), mode="json"))
        position = _POSITION.validate_python(answer)
        self.members = position.members
        if self._is_local and len(position.members) > 1:
            message = "a job with strategy local was placed on several sites; it can use one only"
            raise ExchangeError(message)
        return position

    def _reach(self, position: Position) -> None:
        """Come from the state at hand to where the log wants this site to start."""
        if position.needs_snapshot:
            self._take_snapshot()
        elif self.share.round_number > position.base_round:
            message = (
                f"the state at hand stands after round {self.share.round_number}, but the log's base is round "
                f"{position.base_round}; start from the checkpoint of that round"
            )
            raise CheckpointError(message)
        if self.share.round_number == position.base_round:
            self._chain_hash = position.base_hash
        while self.share.round_number < position.base_round:
            sealed = self._sealed(self.share.round_number + 1)
            if sealed is None:
                message = "the log dropped the rounds that this site lacks while it caught up; start the site again"
                raise ExchangeError(message)
            self._apply(sealed)

    def _resume(self, path: Path) -> None:
        state = checkpoint.read_state(path, self.share.fragments, self.share.layout)
        is_own = state.header.site_id == self.context.site_id
        if is_own:
            checkpoint.restore_optimizer(self._optimizer, state.optimizer, state.header.optimizer_groups)
            buffers = dict(self.share.parameters.module.named_buffers())
            for name, saved in state.buffers.items():
                if name in buffers:
                    buffers[name].copy_(saved)
            checkpoint.restore_random(state, self._ranks.rank)
            self.inner_steps = state.header.inner_steps
        outer = state.outer if is_own else {part: state.outer[part] for part in ("theta", "velocity")}
        self._restore(state, outer, path)

    def _restore(self, state: State, outer: dict[str, dict[int, Values]], path: Path) -> None:
        self.share.restore(state.header.round_number, state.done, outer)
        self._chain_hash = state.header.chain_hash
        self._outer_hash = self.share.state_hash()
        if self._outer_hash != state.header.outer_hash:
            message = f"{path.name} does not have the outer state that its header states; start from an older one"
            raise CheckpointError(message)

    def _take_snapshot(self) -> None:
        """Take a peer's outer state, and keep this site's own carry."""
        path = self._folder / "joined.safetensors"
        self._on_rank_0(lambda: {"round": self._exchange.fetch_snapshot(str(path))})
        state = checkpoint.read_state(path, self.share.fragments, self.share.layout)
        carry = {number: owned.carry for number, owned in self.share.owned.items()}
        self._restore(state, {"theta": state.outer["theta"], "velocity": state.outer["velocity"], "carry": carry}, path)
        self._ranks.barrier()
        if self._ranks.rank == 0:
            path.unlink()

    def _rejoin(self) -> None:
        """Come back to a chain that this site's state has left; its unsealed work goes to its carry."""
        self.share.shelve()
        position = self._position()
        if not position.needs_snapshot:
            message = "the log sent this site for a snapshot and then offered none; start it from its newest checkpoint"
            raise ExchangeError(message)
        self._reach(position)

    # One round.

    def _contribute(self, number: int, samples: Ranges) -> int:
        """Post and commit; return the bytes posted. A refusal is no error: the round goes on without us."""
        payloads = self._payloads(has_content=bool(samples) and not self._is_local)
        refused = False
        try:
            for fragment, payload in payloads.items():
                self._exchange.post_fragment(number, fragment, payload)
        except ExchangeRefusedError as refusal:
            refused = _is_passing(refusal)
        # Also the barrier that rank 0 needs before it commits.
        (refused,) = self._ranks.any_of([refused])
        if not refused:
            self._on_rank_0(lambda: self._commit(number, samples))
        return sum(map(len, payloads.values()))

    def _payloads(self, *, has_content: bool) -> dict[int, bytes]:
        if not has_content:
            return {0: NO_CONTENT} if self._ranks.rank == 0 else {}
        # Alone there is nothing to save by dropping values: see README, Decisions.
        return self.share.contribution("fp32" if len(self.members) == 1 else self.context.sync.codec)

    def _commit(self, number: int, samples: Ranges) -> Json:
        fragments = 1 if self._is_local or not samples else len(self.share.fragments)
        try:
            self._exchange.commit(
                number,
                weight=dealing.count(samples),
                samples=samples,
                fragments=fragments,
                outer_hash=self._outer_hash,
            )
        except ExchangeRefusedError as refusal:
            return {"refused": _is_passing(refusal)}
        return {"refused": False}

    def _sealed(self, number: int) -> SealedRound | None:
        """Return the sealed round, None where this site must take a snapshot instead."""

        def ask() -> Json:
            try:
                return {"sealed": _SEALED.dump_python(self._exchange.await_sealed(number), mode="json")}
            except ExchangeRefusedError as refusal:
                if refusal.reason != Reason.SNAPSHOT_NEEDED:
                    raise
                return {"sealed": None}

        answer = self._on_rank_0(ask)["sealed"]
        return None if answer is None else _SEALED.validate_python(answer)

    def _apply(self, sealed: SealedRound) -> tuple[tuple[Entry, ...], int]:
        """Fetch, judge, merge and report; return the entries that count and the bytes fetched."""
        payloads: dict[tuple[str, int], bytes] = {}
        for entry in filter(self.share.has_content, sealed.entries):
            for number in self.share.owned:
                payloads[entry.site_id, number] = self._exchange.fetch_fragment(sealed.number, entry.site_id, number)
        counted = self.share.verdict(sealed.entries, payloads)
        if self._is_local:
            self.share.adopt()
        self.share.apply(
            sealed.number,
            counted,
            payloads,
            own_counts=any(entry.site_id == self.context.site_id for entry in counted),
            scatter=not self._is_local,
        )
        self.members = sealed.members
        self._chain_hash = sealed.manifest_hash
        self._outer_hash = self.share.state_hash()
        self._on_rank_0(lambda: self._report_applied(sealed.number))
        fetched = sum(len(each) for (site, _), each in payloads.items() if site != self.context.site_id)
        return counted, fetched

    def _report_applied(self, number: int) -> Json:
        self._exchange.applied(number, self._outer_hash)
        return {}

    def _on_rank_0(self, ask: Callable[[], Json]) -> Json:
        """Return rank 0's answer on every rank. If rank 0 meets an ExchangeError, every rank raises it."""
        answer: Json | None = None
        failure: ExchangeError | None = None
        if self._ranks.rank == 0:
            try:
                answer = {"answer": ask()}
            except ExchangeError as error:
                answer, failure = {"error": str(error)}, error
        answer = self._ranks.broadcast_json(answer)
        if failure is not None:
            raise failure
        if "error" in answer:
            raise ExchangeError(answer["error"])
        result: Json = answer["answer"]
        return result

    # What is kept.

    def _keep(self) -> None:
        """Offer a snapshot and write a checkpoint, where they are due."""
        is_checkpoint_due = self.share.round_number % self.context.sync.checkpoint_rounds == 0
        is_small = 8 * self.share.parameters.elements <= SNAPSHOT_EACH_ROUND_BYTES_MAX
        is_snapshot_due = not self._is_local and (is_small or is_checkpoint_due)
        if not is_checkpoint_due and not is_snapshot_due:
            return
        state = self._state()
        if state is None:
            return
        if is_snapshot_due:
            path = self._folder / "snapshot.safetensors"
            outer = {part: state.outer[part] for part in ("theta", "velocity")}
            bare = state.header.model_copy(update={"optimizer_groups": "[]", "python_random": ""})
            checkpoint.write_state(path, State(bare, outer))
            self._exchange.offer_snapshot(self.share.round_number, str(path))
        if is_checkpoint_due:
            checkpoint.write_checkpoint(self._folder, state, dealing.count(self.share.done))

    def _state(self) -> State | None:
        """Return the whole state on rank 0, None elsewhere. A collective."""
        outer = self.share.gathered()
        randoms = self._ranks.gather(checkpoint.torch_random_state())
        if self._ranks.rank != 0:
            return None
        tensors, groups = checkpoint.optimizer_state(self._optimizer)
        header = StateHeader(
            format="hansa-state-1",
            site_id=self.context.site_id,
            round_number=self.share.round_number,
            chain_hash=self._chain_hash,
            outer_hash=self._outer_hash,
            layout=self.share.layout,
            done=tuple((each.start, each.stop) for each in self.share.done),
            inner_steps=self.inner_steps,
            optimizer_groups=groups,
            python_random=checkpoint.python_random_state(),
        )
        buffers = {name: each.detach().to("cpu").clone() for name, each in self.share.parameters.module.named_buffers()}
        return State(header, outer, tensors, buffers, tuple(torch.from_numpy(each) for each in randoms))


def _is_passing(refusal: ExchangeRefusedError) -> bool:
    """Return True for a refusal after which the site's work waits in its carry; raise any other."""
    passing = {
        Reason.ROUND_SEALED,
        Reason.NOT_MEMBER,
        Reason.SAMPLES_OVERLAP,
        Reason.SNAPSHOT_NEEDED,
        Reason.CHAIN_BROKEN,
        Reason.VIEW_OLDER,
    }
    if refusal.reason not in passing:
        raise refusal
    return True
