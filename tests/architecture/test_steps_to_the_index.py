"""The steps that ingestion waits for are those of the topology."""

from schemas.topics import TO_THE_INDEX
from streams.topology import TOPOLOGY, StepName


def test_ingestion_waits_for_the_steps_of_the_topology_up_to_the_index():
    assert tuple((TOPOLOGY[step].reads, str(step)) for step in (StepName.PREPARE, StepName.INDEX)) == TO_THE_INDEX
