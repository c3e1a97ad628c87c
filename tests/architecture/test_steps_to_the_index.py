"""What the way in knows of the steps is what the topology says."""

from schemas.topics import TO_THE_INDEX
from streams.topology import TOPOLOGY, StepName


def test_events_reach_the_index_by_the_steps_that_ingest_waits_for():
    assert tuple((TOPOLOGY[step].reads, str(step)) for step in (StepName.PREPARE, StepName.INDEX)) == TO_THE_INDEX
