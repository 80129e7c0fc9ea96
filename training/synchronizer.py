"""Follows a job's round log on behalf of one rank: start, deal, sync round, checkpoint.

`training.agreed_exchange` asks the log, so that all ranks act on the same answer. When a round is posted and
when it is applied follows from the strategy: at once, some inner steps later, or inside the optimizer's step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import structlog
import torch

from training import checkpoint, dealing
from training.agreed_exchange import AgreedExchange, Offer
from training.attempt import AttemptContext
from training.checkpoint import INNER, State, StateHeader, for_joiners, pairs_of, ranges_of, shared_parts
from training.clock import Clock, SystemClock
from training.codecs import CODECS, Values
from training.dealing import Ranges
from training.economy import affordable_codec
from training.errors import CheckpointError, Departure, ExchangeError, ModelError
from training.exchange import Entry, Exchange, MemberSeat, Position, SealedRound, leaves_after
from training.flight import Flight, RoundFigures
from training.outer_share import OuterShare
from training.parameters import Parameters
from training.ranks import Ranks
from training.roundlog.view import GENESIS_HASH
from training.run_start import write_start
from training.spec import Codec

# A round without content still names one fragment, because a contribution is never empty: an fp32
# payload of no elements, which nobody reads.
NO_CONTENT: Final = bytes(CODECS["fp32"].encode(torch.empty(0).numpy(), None)[0])
# A snapshot this small (64 M parameters with velocity) is offered after every round; a bigger one
# at the checkpoint's cadence, and a joiner replays the rounds since.
SNAPSHOT_EACH_ROUND_BYTES_MAX: Final = 1 << 29

log: Final = structlog.get_logger(__name__)


class Synchronizer:
    """One rank's way through the rounds of its job."""

    def __init__(
        self,
        context: AttemptContext,
        share: OuterShare[Parameters],
        ranks: Ranks,
        exchange: Exchange,
        optimizer: torch.optim.Optimizer,
        *,
        clock: Clock | None = None,
    ) -> None:
        """Follow the log behind `exchange`; call `start` first."""
        self.context = context
        self.share = share
        self.members: tuple[MemberSeat, ...] = ()
        self.inner_steps = 0
        self.block_steps = 0
        self._ranks = ranks
        self._exchange = exchange
        self._log = AgreedExchange(exchange, ranks)
        self._optimizer = optimizer
        self._clock = clock or SystemClock()
        self._folder = Path(context.checkpoint_dir)
        self._chain_hash = GENESIS_HASH
        self._outer_hash = ""
        self._is_local = context.sync.strategy == "local"
        self._flight: Flight | None = None
        self._block: Ranges = ()
        self._pending: Ranges = ()  # in flight, and not to be dealt again
        self._owed: Ranges = ()  # whose work waits in this site's carry
        self._resumed_round: int | None = None  # after which a block under way goes on
        self._weight = 0
        self._armed = False
        self._rejoined = False
        self._leaves = False
        self._figures: list[RoundFigures] = []
        self._codec: Codec = context.sync.codec
        self.posted_bytes = 0
        if share.strategy.gradients:
            optimizer.register_step_pre_hook(self._before_step)

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
        if self.context.record_dir is not None:
            state = self._state()
            if state is not None:
                write_start(Path(self.context.record_dir), self.share.fragments, state)

    # A block of samples, from its deal to its round.

    def block(self) -> Ranges | None:
        """Return the samples dealt to this site for the next round; None when all of the job's are done.

        `block_steps` says how many of its steps lie behind a site that resumes in the middle.
        """
        resumed_round, self._resumed_round = self._resumed_round, None
        if resumed_round == self.share.round_number:
            return self._block
        self.block_steps = 0
        if self._is_over():
            return None
        workload = self.context.workload
        taken = dealing.union([*self.share.done, *self._pending, *self._owed])
        steps, batch = self.context.sync.round_steps, workload.batch_per_gpu
        site_id, strategy = self.context.site_id, self.share.strategy
        if strategy.deals_apart:
            self._block = dealing.deal_apart(
                workload.samples,
                taken,
                self.members,
                site_id,
                period_steps=steps,
                batch_per_gpu=batch,
                helps=not strategy.waits,
            )
        else:
            dealt = dealing.deal(workload.samples, taken, self.members, period_steps=steps, batch_per_gpu=batch)
            self._block = dealt.get(site_id, ())
        if not self._block and self._flight is not None:
            # Nothing to train on meanwhile: the round in flight may well be the last.
            self.settle()
            return self.block()
        return self._block

    def _is_over(self) -> bool:
        share = self.share
        if dealing.count(share.done) < self.context.workload.samples:
            return False
        return share.round_number >= share.complete_round + share.strategy.last_rounds

    def before_batch(self) -> None:
        """Let the optimizer's next step exchange gradients, where the strategy does."""
        self._armed = self.share.strategy.gradients

    def stepped(self) -> None:
        """Count an inner step; a round that was to be applied by now is. A collective then."""
        self.inner_steps += 1
        self.block_steps += 1
        if self.share.strategy.gradients:
            if self._armed:
                message = "every_step exchanges gradients inside optimizer.step(), which this batch did not call"
                raise ModelError(message)
            self._stepped_together()
        elif self.block_steps == self.share.strategy.overlap_steps:
            self.settle()

    def finish(self, samples: Ranges) -> None:
        """Post what the model learned from a whole block; where the strategy waits for the round, apply it too."""
        if not self.share.strategy.gradients:
            self.settle()
            self.sync(samples)
        elif not samples:
            # Nothing was dealt to this site, but the others' gradients step its model too.
            self.share.parameters.drop_gradients()
            self.sync(())
            self._step_optimizer()
            self._stepped_together()

    def drain(self) -> list[RoundFigures]:
        """Return the rounds that were settled since the last call."""
        figures, self._figures = self._figures, []
        return figures

    def sync(self, samples: Ranges) -> None:
        """Post a round, and apply it unless the strategy trains on meanwhile."""
        self.post(samples)
        if not self.share.strategy.overlap_steps:
            self.settle()

    def post(self, samples: Ranges) -> None:
        """Contribute what the model learned from `samples` to the next round."""
        assert self._flight is None, "one round is in flight at a time"
        started_s = self._clock.monotonic_s()
        flight = Flight(self.share.round_number + 1, dealing.union([*samples, *self._owed]), started_s)
        self._owed = ()
        weight = dealing.count(flight.samples)
        if not weight and self.share.complete_round:
            weight = self._weight  # a last round: samples are done, but these fragments' work was not sent yet
        self._weight = weight or self._weight
        flight.has_content = weight > 0 and not self._is_local
        if flight.has_content:
            # Alone there is nothing to save by dropping values: see README, Decisions.
            codec = "fp32" if len(self.members) == 1 else self._affordable()
            payloads = self.share.contribution(codec, flight.number)
            flight.elements = self._elements(flight.number)
        else:
            payloads = {0: NO_CONTENT} if self._ranks.rank == 0 else {}
        self._flight = flight
        if not self._catch_up(flight):
            self._offer(flight, payloads, weight)
        flight.stall_s = self._clock.monotonic_s() - started_s
        self._pending = flight.samples

    def _affordable(self) -> Codec:
        """Return the plan's codec, or a smaller one where the job's cap on egress asks for it."""
        plan, workload = self.context.sync, self.context.workload
        samples_left = workload.samples - dealing.count(self.share.done)
        each_round = plan.round_steps * workload.batch_per_gpu * max(1, sum(seat.gpus for seat in self.members))
        rounds_left = max(1.0, samples_left / each_round) + self.share.strategy.last_rounds
        groups = plan.period_steps // plan.round_steps
        elements_left = rounds_left * self.share.parameters.elements / groups
        codec, reason = affordable_codec(
            plan.codec, plan.max_egress_gb, posted_bytes=self.posted_bytes, elements_left=elements_left
        )
        if reason and reason.split()[0] != self._codec and self._ranks.rank == 0:
            log.info("codec_changed", site=self.context.site_id, round=self.share.round_number + 1, reason=reason)
        self._codec = codec
        return codec

    def _catch_up(self, flight: Flight) -> bool:
        """Apply the rounds that were sealed while this site computed, and offer what it has to the next one.

        Only where sites do not wait for each other. Returns whether there were any.
        """
        strategy, late = self.share.strategy, 0
        while not strategy.waits and (sealed := self._log.sealed_already(flight.number)) is not None:
            late += 1
            self._settle_round(flight, sealed, is_last=late >= strategy.offers)
        if late and flight.is_open:
            self._offer(flight, self.share.offered_again(flight.number), dealing.count(flight.samples))
        return late > 0

    def settle(self) -> None:
        """Apply the round in flight, if there is one, once it is sealed. A collective."""
        flight, strategy = self._flight, self.share.strategy
        if flight is None:
            return
        self._flight = None
        started_s = self._clock.monotonic_s()
        while flight.is_open:
            sealed = self._log.sealed(flight.number)
            if sealed is None:
                flight.is_open = False
                self._rejoin()
                break
            self._settle_round(flight, sealed, is_last=flight.late_rounds + 1 >= strategy.offers)
            if flight.is_open:
                self._offer(flight, self.share.offered_again(flight.number), dealing.count(flight.samples))
        self._pending = ()
        if not strategy.gradients:
            self._keep()
        now_s = self._clock.monotonic_s()
        self._figures.append(flight.figures(now_s - started_s, now_s, self.share.statistics))

    def _settle_round(self, flight: Flight, sealed: SealedRound, *, is_last: bool) -> None:
        """Apply a round, and say whether the contribution in flight is in it, goes on to the next, or has to wait."""
        offers_again = flight.is_open and not is_last and bool(flight.samples)
        counted, fetched = self._apply(sealed, offer_again=offers_again)
        flight.count_fetched(fetched)
        flight.sites_merged = sum(entry.weight > 0 for entry in counted)
        flight.number = sealed.number + 1
        if any(entry.site_id == self.context.site_id for entry in counted):
            flight.counted, flight.is_open = True, False
        if not flight.is_open:
            return
        flight.late_rounds += 1
        flight.samples = dealing.without(flight.samples, self.share.done)
        if offers_again and flight.samples:
            return
        flight.is_open = False
        self.share.shelve()
        if self.share.strategy.deals_apart:
            self._owed = flight.samples

    def _elements(self, number: int) -> int:
        return sum(self.share.fragments[fragment].elements for fragment in self.share.travelling(number))

    def save(self) -> None:
        """Write a checkpoint of the present round, on all ranks' behalf: it is whole when the first of them goes on."""
        if (state := self._state()) is not None:
            checkpoint.write_checkpoint(self._folder, state, dealing.count(self.share.done))
        self._ranks.barrier()

    # Gradients.

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401, ARG002 - torch's hook
        """Put the sites' mean gradient in place of this site's, before the optimizer's step."""
        if self._armed:
            self._armed = False
            self.sync(self._block)

    def _step_optimizer(self) -> None:
        self._armed = False
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _stepped_together(self) -> None:
        if not self._rejoined:
            self.share.adopt()
        self._rejoined = False
        self._keep()

    # Start.

    def _position(self) -> Position:
        position = self._log.position()
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
            sealed = self._log.sealed(self.share.round_number + 1)
            if sealed is None:
                message = "the log dropped the rounds that this site lacks while it caught up; start the site again"
                raise ExchangeError(message)
            self._apply(sealed)
            if self.share.strategy.gradients:
                self._step_optimizer()
                self.share.adopt()

    def _resume(self, path: Path) -> None:
        state = checkpoint.read_state(path, self.share.fragments, self.share.layout)
        # An heir takes the place of a site that left, so what that one still owed is its own.
        is_own = state.header.site_id in {self.context.site_id, self.context.heir_of}
        if is_own or self.share.strategy.gradients:
            self._restore_optimizer(state)
        if is_own:
            buffers = dict(self.share.parameters.module.named_buffers())
            for name, saved in state.buffers.items():
                if name in buffers:
                    buffers[name].copy_(self.share.parameters.sharded_like(buffers[name], saved))
            checkpoint.restore_random(state, self._ranks.rank)
            self.inner_steps = state.header.inner_steps
            self._owed = ranges_of(state.header.owed)
            self.posted_bytes = state.header.posted_bytes
        outer = state.outer if is_own else shared_parts(state.outer)
        inner = outer.get(INNER, {})
        self._restore(state, {part: each for part, each in outer.items() if part != INNER}, path, joined=not is_own)
        if inner:
            self.share.scatter_inner(inner)
            self._block, self.block_steps = ranges_of(state.header.block), state.header.block_steps
            self._resumed_round = self.share.round_number

    def _restore_optimizer(self, state: State) -> None:
        parameters, groups = self.share.parameters, state.header.optimizer_groups
        checkpoint.restore_optimizer(self._optimizer, parameters, state.optimizer, groups)

    def _restore(self, state: State, outer: dict[str, dict[int, Values]], path: Path, *, joined: bool) -> None:
        self.share.restore(state.header.round_number, state.done, outer, joined=joined)
        self.share.complete_round = state.header.complete_round
        self._chain_hash = state.header.chain_hash
        self._outer_hash = self.share.state_hash()
        if self._outer_hash != state.header.outer_hash:
            message = f"{path.name} does not have the outer state that its header states; start from an older one"
            raise CheckpointError(message)

    def _take_snapshot(self) -> None:
        """Take a peer's outer state, and keep this site's own carry."""
        path = self._folder / "joined.safetensors"
        self._log.fetch_snapshot(path)
        state = checkpoint.read_state(path, self.share.fragments, self.share.layout)
        carry = {number: owned.carry for number, owned in self.share.owned.items()}
        outer = shared_parts(state.outer)
        self._restore(state, {**outer, "carry": carry}, path, joined=True)
        if self.share.strategy.gradients:
            self._restore_optimizer(state)
        if state.header.pending:
            # The offering site trains on these now. This site sits the round out and is dealt to from the next one on.
            self._block, self._resumed_round, self.block_steps = (), self.share.round_number, 0
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
        if self.share.strategy.gradients:
            self.share.parameters.drop_gradients()  # the step under way belongs to a state that is gone
            self._rejoined = True

    # One round.

    def _offer(self, flight: Flight, payloads: dict[int, bytes], weight: int) -> None:
        """Post and commit. A refusal is no error: the round goes on without us."""
        fragments = len(self.share.travelling(flight.number)) if flight.has_content else 1
        posted = self._log.offer(Offer(flight.number, weight, flight.samples, fragments, self._outer_hash), payloads)
        flight.bytes_posted += posted
        self.posted_bytes += posted

    def _apply(self, sealed: SealedRound, *, offer_again: bool = False) -> tuple[tuple[Entry, ...], dict[str, int]]:
        """Fetch, judge, merge and report; return the entries that count and this site's bytes fetched by site."""
        share, number = self.share, sealed.number
        payloads: dict[tuple[str, int], bytes] = {}
        for entry in sealed.entries:
            if share.has_content(entry, number):
                for place, _ in share.owned_places(number):
                    payloads[entry.site_id, place] = self._log.fetch(number, entry.site_id, place)
        counted = share.verdict(sealed.entries, payloads, number)
        if self._is_local:
            share.adopt()
        share.apply(
            number,
            counted,
            payloads,
            own_counts=any(entry.site_id == self.context.site_id for entry in counted),
            scatter=not self._is_local,
            offer_again=offer_again,
        )
        if share.strategy.gradients and not any(share.has_content(entry, number) for entry in counted):
            share.parameters.drop_gradients()
        self.members = sealed.members
        self._leaves |= leaves_after(sealed, self.context.site_id)
        self._chain_hash = sealed.manifest_hash
        self._outer_hash = share.state_hash()
        self._log.report_applied(number, self._outer_hash)
        return counted, self._log.fetched_bytes(sealed.entries, payloads, except_site=self.context.site_id)

    # What is kept.

    def _keep(self) -> None:
        """Offer a snapshot and write a checkpoint, where they are due; end here where the site was asked to leave."""
        if self._leaves and not self._is_over():
            self.save()
            raise Departure(self.share.round_number)
        is_checkpoint_due = self.share.round_number % self.context.sync.checkpoint_rounds == 0
        is_small = 8 * self.share.parameters.elements <= SNAPSHOT_EACH_ROUND_BYTES_MAX
        is_snapshot_due = not self._is_local and (is_small or is_checkpoint_due)
        if not is_checkpoint_due and not is_snapshot_due:
            return
        if (state := self._state()) is None:
            return
        if is_snapshot_due:
            path = self._folder / "snapshot.safetensors"
            checkpoint.write_state(path, for_joiners(state, gradients=self.share.strategy.gradients))
            self._exchange.offer_snapshot(self.share.round_number, str(path))
        if is_checkpoint_due:
            checkpoint.write_checkpoint(self._folder, state, dealing.count(self.share.done))

    def _state(self) -> State | None:
        """Return the whole state on rank 0, None elsewhere. A collective."""
        outer = self.share.gathered()
        randoms = self._ranks.gather(checkpoint.torch_random_state())
        parameters = self.share.parameters
        overlaps = self.share.strategy.overlap_steps > 0
        if overlaps:
            outer[INNER] = self.share.inner()
        tensors, groups = checkpoint.optimizer_state(self._optimizer, parameters)
        buffers = {name: parameters.whole(name, each) for name, each in parameters.module.named_buffers()}
        if self._ranks.rank != 0:
            return None
        header = StateHeader(
            format="hansa-state-1",
            site_id=self.context.site_id,
            round_number=self.share.round_number,
            chain_hash=self._chain_hash,
            outer_hash=self._outer_hash,
            layout=self.share.layout,
            done=pairs_of(self.share.done),
            inner_steps=self.inner_steps,
            optimizer_groups=groups,
            python_random=checkpoint.python_random_state(),
            parts=tuple(part for part in outer if part not in {"theta", "velocity", "carry"}),
            pending=pairs_of(self._block) if overlaps else (),
            block=pairs_of(self._block) if overlaps else (),
            block_steps=self.block_steps if overlaps else 0,
            owed=pairs_of(self._owed),
            posted_bytes=self.posted_bytes,
            complete_round=self.share.complete_round,
        )
        kept = {name: each for name, each in buffers.items() if each is not None}
        return State(header, outer, tensors, kept, tuple(torch.from_numpy(each) for each in randoms))
