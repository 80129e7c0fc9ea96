"""Neighbours only: each site mixes its parameters with those of its neighbours, and no global model exists.

The family of D-PSGD (arXiv 1705.09056) and of Nearest Neighbours Training, with the compressed differences of
CHOCO-SGD (arXiv 1902.00340): site i posts Q(x_i - c_i), where c_i is the copy of x_i that everybody can compute from the
log, and c_i takes the same step everywhere. Then x_i <- x_i + gamma sum_j W_ij (c_j - c_i). What the codec drops stays in
x_i - c_i and travels next time, so no carry is kept beside it.

The copies are the state on which sites agree; each x_i is its own site's. The model that the job delivers is the mean of the
copies. A site that is missing from a round is not mixed in it, and whoever joins starts from that mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from training.attempt import LinkSpeed
from training.codecs import Values
from training.merge import weighted_mean
from training.outer import PLAIN, fragment_digest
from training.outer_fragment import OwnedFragment, Received
from training.spec import Codec, Topology
from training.strategies.diloco import Diloco
from training.strategies.mixing import mixing_matrix

_COPY: Final = "copy."
# Consensus steps that a coarse codec's error does not drive apart (CHOCO's gamma, below one for them).
_GAMMA: Final[dict[str, float]] = {"sign": 0.25, "topk2": 0.25, "lowrank": 0.25}


class Neighbour(Diloco):
    """Gossip over the log. `velocity` holds the mean of the copies."""

    keeps_carry = False

    def __init__(self, site_id: str, topology: Topology, codec: Codec, links: tuple[LinkSpeed, ...]) -> None:
        """Mix as `site_id`, by a matrix of `topology` whose edges are weighted by the links' bandwidth."""
        super().__init__(PLAIN)
        self._site_id = site_id
        self._topology = topology
        self._links = {(link.from_site, link.to_site): link.bandwidth_bits_per_s for link in links}
        self._gamma = np.float32(_GAMMA.get(codec, 1.0))
        self._sites: set[str] = set()

    @property
    def extras(self) -> tuple[str, ...]:  # type: ignore[override]  # grows with the sites that have been seen
        """The copies, in site order."""
        return tuple(_COPY + site for site in sorted(self._sites))

    def begin(self, owned: OwnedFragment, *, joined: bool) -> None:
        """Start where everybody starts: at the common parameters, or at the mean of the copies."""
        if not self._sites:
            owned.velocity = owned.theta.copy()
        elif joined:
            owned.theta = owned.velocity.copy()

    def expect(self, extras: Collection[str]) -> None:
        """Know the sites whose copies a restored state has."""
        self._sites = {name.removeprefix(_COPY) for name in extras}

    def moved(self, owned: OwnedFragment, present: Values) -> Values:
        """Return how far the site's parameters are from its copy."""
        owned.theta = present
        return present - owned.extra.get(_COPY + self._site_id, owned.velocity)

    def observe(self, site_ids: Sequence[str]) -> None:
        """Know the sites that have a copy from now on."""
        self._sites |= set(site_ids)

    def merge(self, owned: OwnedFragment, received: Sequence[Received], round_number: int) -> None:
        """Let the copies of all who took part step, then mix this site's parameters with its neighbours' copies."""
        for each in received:
            name = _COPY + each.site_id
            owned.extra[name] = owned.extra.get(name, owned.velocity) + each.values
        present = [each.site_id for each in received]
        owned.velocity = weighted_mean((1, owned.extra[name]) for name in sorted(owned.extra))
        if self._site_id not in present:
            return
        row = mixing_matrix(self._topology, present, round_number, self._links)[present.index(self._site_id)]
        own = owned.extra[_COPY + self._site_id]
        pull = np.zeros_like(own)
        for site_id, weight in zip(present, row, strict=True):
            if site_id != self._site_id and weight > 0:
                pull += np.float32(weight) * (owned.extra[_COPY + site_id] - own)
        owned.theta = owned.theta + self._gamma * pull

    def digest(self, owned: OwnedFragment) -> bytes:
        """Return the digest of the copies and their mean."""
        return fragment_digest(owned.velocity, *(owned.extra[name] for name in sorted(owned.extra)))

    def final(self, owned: OwnedFragment) -> Values:
        """Return the mean of the copies."""
        return owned.velocity
